"""Weights come back bit for bit from shards below any limit, and lies about them are noticed."""

import tracemalloc

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save

from cascade import shards
from cascade.errors import UserError

LIMIT = shards.LEAST_SHARD_BYTES
KERNEL = "conv/kernel"


def tree(*shape):
    rng = np.random.default_rng(0)
    return {
        "conv": {
            "bias": rng.normal(size=7).astype(np.float32),
            "kernel": rng.normal(size=shape).astype(np.float32),
        },
        "scale": np.float32(3.0),
    }


def template(params):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)


def read(params, files, dtype="float32"):
    return shards.read_shards("stage 0", files, dtype, template(params))


@settings(deadline=None, max_examples=40)
@given(
    shape=st.lists(st.integers(1, 13), max_size=3),
    limit=st.integers(LIMIT, 4 * LIMIT),
    dtype=st.sampled_from(list(shards.DTYPES)),
)
def test_there_and_back_below_any_limit(tmp_path_factory, shape, limit, dtype):
    params = tree(*shape)
    paths = shards.write_shards(tmp_path_factory.mktemp("s"), "stage0", params, dtype, limit)
    assert max(path.stat().st_size for path in paths) <= limit
    back = read(params, [(path.name, path.read_bytes()) for path in reversed(paths)], dtype)
    rounded = jax.tree.map(
        lambda leaf: leaf.astype(shards.DTYPES[dtype][1]).astype(np.float32), params
    )
    jax.tree.map(np.testing.assert_array_equal, back, rounded)


def test_one_row_may_be_larger_than_a_shard(tmp_path):
    params = tree(2, 3000)
    paths = shards.write_shards(tmp_path, "stage0", params, "float32", LIMIT)
    assert any(f"{KERNEL}#2of" in name for path in paths for name in load_file(path))
    back = read(params, [(path.name, path.read_bytes()) for path in paths])
    np.testing.assert_array_equal(back["conv"]["kernel"], params["conv"]["kernel"])


def test_a_limit_below_any_tensor(tmp_path):
    with pytest.raises(UserError, match="999 bytes"):
        shards.write_shards(tmp_path, "stage0", tree(2), "float32", 999)


def edited(edit):
    """A tree, and its one file with the tensors changed by `edit`."""
    params = tree(3, 4)
    tensors = dict(shards.named(params))
    edit(tensors)
    return params, [("a", save({name: np.array(t, order="C") for name, t in tensors.items()}))]


def cut(tensors, names, lengths):
    """Replaces the kernel by flat pieces of these names and lengths."""
    flat = tensors.pop(KERNEL).reshape(-1)
    starts = np.cumsum([0, *lengths[:-1]])
    for name, start, length in zip(names, starts, lengths, strict=True):
        tensors[KERNEL + name] = flat[start : start + length]


def test_pieces_are_put_together_in_their_order():
    params, files = edited(lambda t: cut(t, ["#2of3", "#1of3", "#3of3"], [5, 4, 3]))
    kernel = params["conv"]["kernel"].reshape(-1)
    back = read(params, files)["conv"]["kernel"].reshape(-1)
    np.testing.assert_array_equal(back, [*kernel[5:9], *kernel[:5], *kernel[9:]])


@pytest.mark.parametrize(
    ("names", "lengths"),
    [
        (["#1of1"], [12]),
        (["#1of2"], [12]),
        (["#1of2", "#3of2"], [4, 8]),
        (["#1of2", "#2of3"], [4, 8]),
        (["#0of2", "#1of2"], [4, 8]),
        (["#1of2", "#02of2"], [4, 8]),
        (["#1of999999", "#2of999999"], [4, 8]),
        (["#1of2", "#2of2"], [4, 7]),
        (["#1of3", "#2of3", "#3of3"], [4, 8, 0]),
        (["#1of2", "#2of2", "#2of3"], [4, 4, 4]),
        (["#1of2", "#2of2", ""], [4, 4, 4]),
        (["#1of2", "#2of2#1of2"], [4, 8]),
    ],
)
def test_pieces_that_do_not_make_a_whole(names, lengths):
    params, files = edited(lambda t: cut(t, names, lengths))
    with pytest.raises(UserError, match=KERNEL):
        read(params, files)


def test_pieces_are_flat_and_come_once():
    def halves(tensors):
        for i, half in enumerate(np.split(tensors.pop(KERNEL), [1]), 1):
            tensors[f"{KERNEL}#{i}of2"] = half

    params, files = edited(halves)
    with pytest.raises(UserError, match="pieces"):
        read(params, files)
    params, files = edited(lambda t: cut(t, ["#1of2", "#2of2"], [4, 8]))
    with pytest.raises(UserError, match="twice"):
        read(params, files * 2)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop(KERNEL), "conv/kernel.*is missing"),
        (lambda t: t.update(extra=np.zeros(3, np.float32)), "extra.*isn't part"),
        (lambda t: t.update({KERNEL: t[KERNEL][..., :-1]}), "conv/kernel.*shape"),
        (lambda t: t.update({KERNEL: t[KERNEL].astype(np.float64)}), "conv/kernel.*F64"),
        (lambda t: t.update({KERNEL: t[KERNEL].astype(np.int32)}), "conv/kernel.*I32"),
        (lambda t: t[KERNEL].__setitem__((0, 0), np.nan), "conv/kernel.*NaN"),
        (lambda t: t[KERNEL].__setitem__((0, 0), -np.inf), "conv/kernel.*NaN"),
    ],
)
def test_tensors_that_are_not_the_networks(edit, message):
    params, files = edited(edit)
    with pytest.raises(UserError, match=message):
        read(params, files)


def test_reading_holds_weights_little_more_than_once(tmp_path):
    """Of tensors in pieces too, no second copy of all is made: a network may fill the memory."""
    rng = np.random.default_rng(0)
    params = {f"kernel_{i}": rng.normal(size=(250, 1000)).astype(np.float32) for i in range(16)}
    paths = shards.write_shards(tmp_path, "stage0", params, "float32", 400_000)
    total = sum(leaf.nbytes for leaf in params.values())
    tracemalloc.start()
    back = read(params, ((path.name, path.read_bytes()) for path in paths))
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert back.keys() == params.keys() and total <= most < 1.3 * total
