"""A segment is believed only if its parts fit together, even where its checksum is right."""

import itertools

import numpy as np
import pytest
from safetensors.numpy import save_file

from cascade.text import segment as segments
from cascade.text.segment import Segment

STARTS = np.array([0, 2, 2, 5], np.int64)


def parts(dtype):
    """The tensors of a whole segment: three captions of five states, one of them without any."""
    states = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    stored = segments.rounded(states, dtype)
    scales = stored.get("scales")
    spans = itertools.pairwise(STARTS)
    checks = [
        segments._check(stored["states"][a:b], None if scales is None else scales[a:b])
        for a, b in spans
    ]
    keys = np.arange(6, dtype=np.uint64).reshape(3, 2)
    return {**stored, "starts": STARTS, "keys": keys, "checks": np.array(checks, np.uint64)}


def saved(path, dtype="float16", claimed=None, drop="", **changes):
    """A file of a segment's parts, some of them changed, under a checksum of what it holds."""
    tensors = {**parts(dtype), **changes}
    origin = {"made_by": "toy", "fingerprint": "f" * 64, "dtype": claimed or dtype}
    checksum = segments._checksum(origin, *(tensors[k] for k in ("starts", "keys", "checks")))
    tensors = {name: np.ascontiguousarray(t) for name, t in tensors.items() if name != drop}
    save_file(tensors, path, {**origin, "checksum": checksum})
    return path


@pytest.mark.parametrize("dtype", segments.DTYPES)
def test_a_whole_one_is_read(tmp_path, dtype):
    segment = Segment(saved(tmp_path / "a", dtype))
    segment.verify()
    assert (len(segment), segment.tokens) == (3, 5)
    assert [segment.read(n).shape for n in range(3)] == [(2, 4), (0, 4), (3, 4)]


@pytest.mark.parametrize(
    "change",
    [
        {"claimed": "float8"},
        {"claimed": "int8"},
        {"claimed": "bfloat16"},
        {"starts": np.zeros(0, np.int64)},
        {"starts": STARTS[:-1]},
        {"starts": STARTS.astype(np.int32)},
        {"starts": STARTS.reshape(2, 2)},
        {"starts": np.array([0, 3, 2, 5], np.int64)},
        {"starts": np.array([0, -2, 2, 5], np.int64)},
        {"starts": np.array([1, 2, 2, 5], np.int64)},
        {"starts": np.array([0, 2, 2, 4], np.int64)},
        {"keys": np.zeros((3, 3), np.uint64)},
        {"keys": np.zeros((2, 2), np.uint64)},
        {"keys": np.zeros((3, 2), np.int64)},
        {"checks": np.zeros(2, np.uint64)},
        {"checks": np.zeros((3, 1), np.uint64)},
        {"checks": np.zeros(3, np.float64)},
        {"states": np.zeros((4, 4), np.float16)},
        {"states": np.zeros(5, np.float16)},
        {"states": np.zeros((5, 4), np.float32)},
        {"dtype": "int8", "scales": np.zeros(4, np.float32)},
        {"dtype": "int8", "scales": np.zeros(5, np.float64)},
        {"dtype": "int8", "drop": "scales"},
        {"scales": np.zeros(5, np.float32)},
        *({"drop": name} for name in ("states", "starts", "keys", "checks")),
    ],
)
def test_parts_that_dont_fit_together(tmp_path, change):
    with pytest.raises(ValueError, match="don't fit together"):
        Segment(saved(tmp_path / "a", **change))
