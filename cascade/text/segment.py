"""One file of an embedding cache: captions' states, rounded, trimmed, and with checksums.

    states [T, D]       float16, bfloat16 or int8: all captions' states, one after another, each
                        caption's without its padding
    scales [T] float32  beside int8: a state is scales[i] · states[i]
    starts [N + 1] i64  caption n owns states[starts[n] : starts[n + 1]]
    keys   [N, 2] u64   128 bits of blake2b of each caption's UTF-8
    checks [N] u64      64 bits of blake2b of each caption's stored states and scales

The header says which encoder made it, in which dtype, and holds a checksum of these words and of
all but the states. So opening a file verifies what it reads of it, and reading a caption verifies
that caption: no file is ever read whole just to trust it.
"""

import contextlib
import itertools
import os
import uuid
from hashlib import blake2b
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from cascade.errors import UserError

# A config's word for it -> numpy's, and safetensors'.
DTYPES = {
    "float16": (np.dtype(np.float16), "F16"),
    "bfloat16": (np.dtype(jnp.bfloat16), "BF16"),
    "int8": (np.dtype(np.int8), "I8"),
}
ORIGIN = ("made_by", "fingerprint", "dtype")  # of a header; the rest is the checksum
MISFIT = "its parts don't fit together"


def rounded(states: np.ndarray, dtype: str) -> dict[str, np.ndarray]:
    """States [l, D] float32 as they are stored: {"states"} and, for int8, {"scales"}.

    int8 is symmetric and per token: scale = max|state| / 127, stored = round(state / scale), so no
    value is off by more than scale / 2.

    Raises:
      UserError: a state isn't finite, or not in float16, which ends at 65504.
    """
    if dtype == "int8":
        scales = np.abs(states).max(axis=1, initial=0.0) / np.float32(127)
        scales[scales < np.finfo(np.float32).tiny] = 0  # subnormal numbers divide badly
        divisors = np.where(scales == 0, np.float32(np.inf), scales)[:, None]
        with np.errstate(invalid="ignore"):
            stored = {"states": np.rint(states / divisors).astype(np.int8), "scales": scales}
    else:
        with np.errstate(over="ignore"):
            stored = {"states": states.astype(DTYPES[dtype][0])}
    if not all(np.isfinite(part.astype(np.float32)).all() for part in stored.values()):
        raise UserError(
            f"The text encoder gives states that {dtype} can't hold (up to"
            f" {np.abs(states).max():.3g}); set config.text_cache.dtype to 'bfloat16' or, where"
            " they aren't finite at all, get the encoder's weights again."
        )
    return stored


def restored(states: np.ndarray, scales: np.ndarray | None = None) -> np.ndarray:
    """The float32 states [l, D] that stored ones stand for."""
    states = states.astype(np.float32)
    return states if scales is None else states * scales[:, None]


class Segment:
    """A mapped file: its index in memory, its states on disk until they are asked for.

    Attributes:
      path: the file.
      keys: [N, 2] uint64.
      origin: of the header, `made_by`, `fingerprint` and `dtype`.
      tokens: T.
      identity: which file it was, in case another takes its place.
    """

    def __init__(self, path: Path):
        """Opens a file and verifies its index.

        Raises:
          SafetensorError: the file is cut short, or isn't of this kind.
          ValueError: its parts don't fit together, or its checksum isn't theirs.
          OSError: it can't be read.
        """
        self.identity = identity(path)
        file = safe_open(path, "np")
        header = file.metadata() or {}
        if header.keys() != {*ORIGIN, "checksum"}:
            raise ValueError("it does not say which encoder made it")
        self.path, self.origin = path, {key: header[key] for key in ORIGIN}
        self.tokens = _check_layout(file, self.origin["dtype"])
        self.keys, self._starts, self._checks = map(file.get_tensor, ("keys", "starts", "checks"))
        if header["checksum"] != _checksum(self.origin, self._starts, self.keys, self._checks):
            raise ValueError("its checksum isn't that of its contents")
        ends = self._starts[0] == 0 and self._starts[-1] == self.tokens
        if not ends or (self._starts[1:] < self._starts[:-1]).any():
            raise ValueError(MISFIT)
        self._states, self._scales = file.get_slice("states"), None
        if self.origin["dtype"] == "int8":
            self._scales = file.get_slice("scales")

    def __len__(self) -> int:
        """N, how many captions it holds."""
        return len(self.keys)

    def read(self, n: int) -> np.ndarray:
        """The states [l, D] float32 of the n-th caption.

        Raises:
          ValueError: they aren't what was stored.
        """
        start, stop = self._starts[n : n + 2]
        if start == stop:  # a caption without text; safetensors takes no empty slice
            return np.zeros((0, self._states.get_shape()[1]), np.float32)
        states = self._states[start:stop]
        scales = None if self._scales is None else self._scales[start:stop]
        if _check(states, scales) != self._checks[n]:
            raise ValueError("its states' checksum isn't that of what was stored")
        return restored(states, scales)

    def verify(self):
        """Reads every caption; raises ValueError as `read` does."""
        for n in range(len(self)):
            self.read(n)


def identity(path: Path) -> tuple[int, int, int]:
    """What tells a file from one that takes its place: inode, time of the last change, size."""
    stat = path.stat()
    return stat.st_ino, stat.st_mtime_ns, stat.st_size


def remove(path: Path, seen: tuple[int, int, int]):
    """Deletes the file of that identity; not the whole one that another builder put there since."""
    with contextlib.suppress(FileNotFoundError):
        if identity(path) == seen:
            path.unlink()


def write(
    path: Path,
    origin: dict[str, str],
    keys: np.ndarray,
    starts: np.ndarray,
    stored: dict[str, np.ndarray],
):
    """Writes a segment: whole, under its name, or not at all.

    Args:
      origin: `ORIGIN`'s entries.
      keys, starts: as the file holds them.
      stored: "states" [T, D] and, for int8, "scales" [T], as `rounded` gives them.
    """
    spans = list(itertools.pairwise(starts))
    scales = stored.get("scales")
    checks = np.array(
        [_check(stored["states"][a:b], None if scales is None else scales[a:b]) for a, b in spans],
        np.uint64,
    )
    header = {**origin, "checksum": _checksum(origin, starts, keys, checks)}
    temporary = path.parent / f".{uuid.uuid4().hex}.tmp"
    try:
        save_file({**stored, "starts": starts, "keys": keys, "checks": checks}, temporary, header)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _check_layout(file, dtype: str) -> int:
    """T, once the names, dtypes and shapes of a file's tensors are those of a segment.

    Raises:
      ValueError: they aren't, or the dtype is unknown.
    """
    found = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
    found = {name: (part.get_dtype(), part.get_shape()) for name, part in found.items()}
    if dtype not in DTYPES or not {"states", "checks"} <= found.keys():
        raise ValueError(MISFIT)
    sizes = found["states"][1], found["checks"][1]
    if [len(shape) for shape in sizes] != [2, 1]:
        raise ValueError(MISFIT)
    (tokens, width), (n,) = sizes
    wanted = {
        "states": (DTYPES[dtype][1], [tokens, width]),
        "starts": ("I64", [n + 1]),
        "keys": ("U64", [n, 2]),
        "checks": ("U64", [n]),
        **({"scales": ("F32", [tokens])} if dtype == "int8" else {}),
    }
    if found != wanted:
        raise ValueError(MISFIT)
    return tokens


def _check(states: np.ndarray, scales: np.ndarray | None) -> int:
    """64 bits of blake2b of a caption's stored numbers."""
    digest = blake2b(states.tobytes(), digest_size=8)
    if scales is not None:
        digest.update(scales.tobytes())
    return int.from_bytes(digest.digest(), "little")


def _checksum(origin: dict[str, str], *arrays: np.ndarray) -> str:
    """blake2b of the header's words and the index."""
    digest = blake2b("\0".join(origin[key] for key in ORIGIN).encode(), digest_size=32)
    for array in arrays:
        digest.update(array.tobytes())
    return digest.hexdigest()
