"""Mixtures: shares, coverage, resumption, refusals."""

import pickle
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_loader import data_section

from cascade.data.loader import make_loader, make_source
from cascade.data.order import BLOCK, MixedOrder, shares
from cascade.data.sources import SOURCES, captions_of
from cascade.errors import UserError
from cascade.registry import build

WEIGHTS = {"few": 0.7, "many": 0.2, "some": 0.1}
RECORDS = {"few": 3, "many": 500, "some": 40}


def section(weights=WEIGHTS, records=RECORDS) -> dict:
    return {
        "name": "mixture",
        "sources": {
            name: {"name": "synthetic", "records": n, "side": 8, "captions": n, "seed": 0}
            for name, n in records.items()
        },
        "weights": dict(weights),
    }


def data(**changes):
    return data_section(section(), **{"max_broken_rate": 0.0, **changes})


def told(captions):
    """The numbers in "picture of class 17"."""
    return {"text": np.array([int(c.split()[-1]) for c in captions])}


def loader(config, **changes):
    sizes = dict(resolution=8, lowres_resolution=0, crop_resolution=0, seed=1, batch_size=16)
    return make_loader(config, texts=told, **{**sizes, "train": True, **changes})


@given(
    weights=st.lists(st.fractions(Fraction(1, 1000), 1000), min_size=1, max_size=6),
    positions=st.integers(0, 10**15),
)
def test_shares_sum_up_grow_and_follow_the_weights(weights, positions):
    now, then = shares(positions, weights), shares(positions + 1, weights)
    assert sum(now) == positions
    assert sum(b - a for a, b in zip(now, then, strict=True)) == 1 and min(
        b - a for a, b in zip(now, then, strict=True)
    ) in (0, 1)
    for count, weight in zip(now, weights, strict=True):
        assert abs(count - positions * weight / sum(weights)) <= len(weights)


def test_each_source_comes_by_its_weight_and_whole():
    source = build("data source", SOURCES, section())
    order = source.order(seed=5)
    indices = np.array([order(p) for p in range(3 * BLOCK)])
    starts = np.cumsum([0, *(RECORDS[name] for name in sorted(RECORDS))])
    for name, start, end in zip(sorted(RECORDS), starts, starts[1:], strict=False):
        drawn = indices[(start <= indices) & (indices < end)]
        assert abs(len(drawn) - WEIGHTS[name] * len(indices)) <= len(WEIGHTS)
        passes = len(drawn) // (end - start)
        assert passes >= 1  # and every pass sees each record once
        for number in range(passes):
            one = drawn[number * (end - start) : (number + 1) * (end - start)]
            assert sorted(one) == list(range(start, end))


@pytest.mark.parametrize("count", [2, 3])
def test_every_process_sees_the_shares(count):
    """No pattern of the sources falls in with the processes' turns."""
    order = MixedOrder([10, 10], [0.5, 0.5], seed=0)
    first = np.array([order(p) < 10 for p in range(BLOCK)])
    for p in range(count):
        mine = first[p::count]
        assert abs(mine.mean() - 0.5) < 4 * 0.5 / np.sqrt(len(mine))


def test_any_position_is_found_at_once_and_by_any_copy():
    source = build("data source", SOURCES, section())
    order, copy = source.order(seed=5), pickle.loads(pickle.dumps(source)).order(seed=5)
    walked = [order(p) for p in range(2 * BLOCK)]
    for p in (2 * BLOCK - 1, 0, BLOCK, 77):
        assert copy(p) == walked[p] == pickle.loads(pickle.dumps(order))(p)
    assert [source.order(seed=6)(p) for p in range(50)] != walked[:50]


def test_a_resumed_loader_goes_on_where_it_was():
    stream = loader(data())
    for _ in range(5):
        next(stream)
    state = stream.get_state()
    expected = [next(stream) for _ in range(5)]
    again = loader(data())
    again.set_state(state)
    for batch in expected:
        for name, array in next(again).items():
            np.testing.assert_array_equal(array, batch[name])


def test_evaluation_sees_each_record_once():
    batches = list(loader(data(), train=False))
    seen = np.concatenate([b["text"][b["valid"]] for b in batches])
    assert sorted(seen) == sorted(i for n in RECORDS.values() for i in range(n))


def test_records_say_whose_they_are():
    source = make_source(data(), train=True)
    assert [source.key(i) for i in (2, 3, 502, 503)] == [
        "few: 2",
        "many: 0",
        "many: 499",
        "some: 0",
    ]
    assert source[503]["key"] == "some: 0" and source[503]["captions"] == source.captions(503)
    assert len(list(captions_of(source))) == len(source) == 543


def test_the_order_of_names_changes_nothing():
    turned = section(dict(reversed(WEIGHTS.items())), dict(reversed(RECORDS.items())))
    one, two = (build("data source", SOURCES, s) for s in (section(), turned))
    assert one.fingerprint == two.fingerprint
    assert [one.order(0)(p) for p in range(99)] == [two.order(0)(p) for p in range(99)]
    heavier = build("data source", SOURCES, section({**WEIGHTS, "few": 0.8}))
    assert heavier.fingerprint != one.fingerprint


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"weights": {"few": 1.0}}, "one weight"),
        ({"weights": {**WEIGHTS, "few": 0}}, "weight of 'few' is 0"),
        ({"weights": {**WEIGHTS, "few": float("nan")}}, "weight of 'few' is nan"),
        ({"weights": 3}, "weights are 3"),
        ({"sources": {}, "weights": {}}, "none"),
        ({"sources": {"x": section()}, "weights": {"x": 1}}, "can't hold a mixture"),
        ({"sources": {"x": {"name": "folders"}}, "weights": {"x": 1}}, "name 'folders'"),
    ],
)
def test_refusals(change, what):
    with pytest.raises(UserError, match=what):
        build("data source", SOURCES, {**section(), **change})


def test_decoded_pictures_of_a_mixture_are_not_cached():
    with pytest.raises(UserError, match=r"cache_decoded can.t keep .* a mixture"):
        loader(data(cache_decoded=True))
