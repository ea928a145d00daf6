"""The loader: order, resume, processes that share it, workers, evaluation."""

import numpy as np
import pytest
from tiny_loader import (
    FLOAT32,
    RECORDS,
    assert_same,
    loader,
    name,
    section,
    shared,
    spelled,
    take,
    together,
)

from cascade.data.loader import make_source
from cascade.errors import UserError


def test_batches(pictures):
    batch = next(loader(section(pictures), lowres_resolution=2, crop_resolution=4))
    assert {k: (v.shape, v.dtype.name) for k, v in batch.items()} == {
        "image": ((4, 4, 4, 3), "float32"),
        "lowres": ((4, 1, 1, 3), "float32"),
        "text_emb": ((4, 40, 1), "float32"),
        "text_mask": ((4, 40), "bool"),
    }
    for text, image, low in zip(spelled(batch), batch["image"], batch["lowres"], strict=True):
        i = int(name(text))
        expected = np.array([i * 10, 0, 255 - i * 10]) / 127.5 - 1
        np.testing.assert_allclose(image, np.broadcast_to(expected, (4, 4, 3)), rtol=FLOAT32)
        np.testing.assert_allclose(low, np.broadcast_to(expected, (1, 1, 3)), rtol=FLOAT32)


def test_each_pass_visits_every_record_once_in_a_new_order(pictures):
    texts = [t for b in take(loader(section(pictures), batch_size=RECORDS), 2) for t in spelled(b)]
    first, second = [name(t) for t in texts[:RECORDS]], [name(t) for t in texts[RECORDS:]]
    everything = [f"{i:02d}" for i in range(RECORDS)]
    assert sorted(first) == sorted(second) == everything
    assert first != second and first != everything
    assert {t.split(" ")[0] for t in texts} == {"first", "second"}


def test_order_is_the_seed_s(pictures):
    data = section(pictures)
    assert_same(take(loader(data), 12), take(loader(data), 12))
    one, two = (spelled(next(loader(data, seed=seed, batch_size=RECORDS))) for seed in (0, 1))
    assert one != two


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_in_the_middle_of_a_pass(pictures, workers):
    data = section(pictures, workers=workers)
    unbroken = loader(data)
    take(unbroken, 7)
    state = unbroken.get_state()
    rest = take(unbroken, 8)
    resumed = loader(data)
    resumed.set_state(state)
    assert_same(take(resumed, 8), rest)
    unbroken.close()
    resumed.close()


def test_workers_change_nothing_but_speed(pictures):
    (pictures / "03.png").write_bytes(b"broken")
    alone, helped = (loader(section(pictures, workers=w), resolution=4) for w in (0, 2))
    assert_same(take(alone, 14), take(helped, 14))
    helped.close()


@pytest.mark.parametrize("count", [2, 3])
def test_processes_share_each_batch_as_one_would_load_it(pictures, count):
    data = section(pictures, crop="random")
    passes = 6 * RECORDS // 6
    whole, shares = (together(shared(data, n), passes) for n in (1, count))
    assert_same(whole, shares)
    texts = [name(t) for batch in shares for t in spelled(batch)]
    assert sorted(texts) == sorted(6 * [f"{i:02d}" for i in range(RECORDS)])


@pytest.mark.parametrize(("before", "after"), [(1, 2), (3, 1), (2, 3)])
def test_another_number_of_processes_goes_on_with_the_next_batch(pictures, before, after):
    data = section(pictures)
    unbroken = shared(data, before)
    together(unbroken, 5)
    states = [part.get_state() for part in unbroken]
    rest = together(unbroken, 9)
    resumed = shared(data, after)
    for part in resumed:
        part.set_state(states)
    assert_same(together(resumed, 9), rest)


def test_skipped_pictures_lose_none_to_another_number_of_processes(pictures):
    for i in (3, 11):
        (pictures / f"{i:02d}.png").write_bytes(b"broken")
    data = section(pictures)
    before = shared(data, 3)
    texts = [t for batch in together(before, 2) for t in spelled(batch)]
    resumed = shared(data, 2)
    for part in resumed:
        part.set_state([part.get_state() for part in before])
    texts += [t for batch in together(resumed, 3) for t in spelled(batch)]
    assert {name(t) for t in texts} == {f"{i:02d}" for i in range(RECORDS)} - {"03", "11"}


@pytest.mark.parametrize("count", [1, 2])
def test_evaluation_is_one_pass_in_order_with_first_captions(pictures, count):
    parts = shared(section(pictures), count, train=False)
    batches = together(parts, -(-RECORDS // 6))
    assert all(next(part, None) is None for part in parts)
    texts = [t for batch in batches for t in spelled(batch)]
    valid = np.concatenate([batch["valid"] for batch in batches])
    assert valid.sum() == RECORDS and valid[:RECORDS].all()
    assert texts[:RECORDS] == [f"first of {i:02d}" for i in range(RECORDS)]


@pytest.mark.parametrize("train", [True, False])
def test_a_source_can_be_built_beforehand(pictures, monkeypatch, train):
    data = section(pictures)
    source = make_source(data, train=train)
    expected = take(loader(data, train=train), 6)
    monkeypatch.setattr("cascade.data.loader.build", None)
    assert_same(take(loader(data, train=train, source=source), 6), expected)


def test_contradictions_are_named(pictures):
    with pytest.raises(UserError, match=r"'random'.*cache_decoded"):
        loader(section(pictures, crop="random", cache_decoded=True))
    with pytest.raises(UserError, match="crop 'middle'"):
        loader(section(pictures, crop="middle"))
    with pytest.raises(UserError, match="lowres_resolution 3"):
        loader(section(pictures), lowres_resolution=3)
    with pytest.raises(UserError, match=r"'pth'.*'path'"):
        make_source(section(pictures, source={"name": "folder", "pth": "x"}), train=True)
