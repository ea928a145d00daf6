"""Weights of one network as safetensors files: parameter paths joined by "/", small shards.

A tensor too large for a shard is stored flat, in pieces named `path#1of3`, `path#2of3`, ….

Reading runs no code and believes nothing: what the files hold must be, to a name, a shape and a
dtype, what the network asks for.
"""

import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save as to_safetensors

from cascade.errors import UserError
from cascade.files import replacing
from cascade.parallel.mesh import put

DTYPES = {"float32": ("F32", np.dtype("float32")), "bfloat16": ("BF16", np.dtype(jnp.bfloat16))}
HEADER = 200  # bytes a tensor takes in a file's header besides its name, generously
LEAST_SHARD_BYTES = 1000  # room for any name, its header and some numbers
PIECE = re.compile(r"(.+)#([1-9]\d{0,5})of([1-9]\d{0,5})")


def write_shards(folder: Path, stem: str, params: Any, dtype: str, shard_bytes: int) -> list[Path]:
    """Writes `stem-00001.safetensors`, …, each of at most `shard_bytes`.

    Args:
      params: a tree of arrays, or of what NumPy can make arrays of, one at a time.
      dtype: a key of `DTYPES`; values are rounded to it.

    Raises:
      UserError: a value isn't finite, in `params` or once it is rounded; or shards are to be
        smaller than `LEAST_SHARD_BYTES`.
    """
    if shard_bytes < LEAST_SHARD_BYTES:
        raise UserError(
            f"Shards of {shard_bytes} bytes can't hold weights; give {LEAST_SHARD_BYTES} or more."
        )
    paths = []
    for i, shard in enumerate(_shards(stem, params, DTYPES[dtype][1], shard_bytes)):
        paths.append(folder / f"{stem}-{i + 1:05d}.safetensors")
        write_durably(paths[-1], to_safetensors(shard))
    return paths


def _shards(stem: str, params: Any, dtype: np.dtype, most: int) -> Iterator[dict[str, np.ndarray]]:
    """Each file's tensors, one file after another, so that no more than that is in memory."""
    shard, room = {}, most
    for path, leaf in named(params):
        tensor = np.asarray(leaf, dtype=dtype, order="C")
        check_finite(stem, path, tensor)
        for name, piece in _pieces(path, tensor, most):
            size = piece.nbytes + len(name) + HEADER
            if size > room:
                yield shard
                shard, room = {}, most
            shard[name] = piece
            room -= size
    yield shard


def _pieces(name: str, tensor: np.ndarray, shard_bytes: int) -> list[tuple[str, np.ndarray]]:
    """The tensor under its name, or flat pieces of it that each fit a shard.

    Flat, because one row of a large convolution's first axis may be too large already.
    """
    most = shard_bytes - HEADER - len(name) - len("#999999of999999")
    if tensor.nbytes <= most:
        return [(name, tensor)]
    length = most // tensor.itemsize
    starts = range(0, tensor.size, length)
    flat = tensor.reshape(-1)
    return [
        (f"{name}#{i}of{len(starts)}", flat[start : start + length])
        for i, start in enumerate(starts, 1)
    ]


def read_shards(
    where: str, files: Iterable[tuple[str, bytes]], dtype: str, template: Any, placed: Any = None
) -> Any:
    """The parameter tree that files hold, as arrays of the template's dtypes.

    Args:
      where: whose weights, for messages: "stage 0".
      files: (name, contents) of each file.
      dtype: a key of `DTYPES`, which every tensor must have.
      template: a tree of `jax.ShapeDtypeStruct`.
      placed: a like tree of shardings: each tensor goes to its place on the devices once it is
        read, of which this process fills its own, and the host holds one at a time. None leaves
        NumPy arrays on the host.

    Raises:
      UserError: a file that can't be parsed; a tensor that is missing, foreign, double, in pieces
        that don't make a whole, of another shape or dtype, or not finite.
    """
    wanted = dict(named(template))
    places = {} if placed is None else dict(named(placed))
    leaves = {}
    for name, tensor in _joined(where, _tensors(files, dtype), wanted):
        leaf = wanted.get(name)
        if leaf is None or leaf.shape != tensor.shape:
            leaves[name] = jax.ShapeDtypeStruct(tensor.shape, tensor.dtype)  # for the message
            continue
        check_finite(where, name, tensor)
        leaves[name] = tensor.astype(leaf.dtype, copy=False)
        if name in places:
            leaves[name] = put(leaves[name], places[name])
    check_shapes(where, leaves, template)
    return jax.tree.unflatten(jax.tree.structure(template), [leaves[name] for name in wanted])


def _tensors(files: Iterable[tuple[str, bytes]], dtype: str) -> Iterator[tuple[str, np.ndarray]]:
    """Each tensor in the files, of which no two may have a name and all must have the dtype."""
    code, numpy_dtype = DTYPES[dtype]
    names = set()
    for file, data in files:
        try:
            contents = deserialize(data)
        except SafetensorError as error:
            raise UserError(
                f"{file!r} isn't a safetensors file ({error}); get the bundle again, whole."
            ) from error
        for name, tensor in contents:
            if name in names or tensor["dtype"] != code:
                fault = "comes twice" if name in names else f"is {tensor['dtype']}, not {code}"
                raise UserError(
                    f"The tensor {name!r} in {file!r} {fault}; write the bundle again with "
                    "`cascade bundle`."
                )
            names.add(name)
            yield name, np.frombuffer(tensor["data"], numpy_dtype).reshape(tensor["shape"])


def _joined(
    where: str, tensors: Iterable[tuple[str, np.ndarray]], wanted: Mapping
) -> Iterator[tuple[str, np.ndarray]]:
    """The same, but pieces become one tensor, of the shape that is wanted, once all are there."""
    pieces, whole = {}, set()
    for name, tensor in tensors:
        match = PIECE.fullmatch(name)
        if match:
            name, count = match[1], int(match[3])
            parts = pieces.setdefault(name, {})
            parts[int(match[2]), count] = tensor
            if len(parts) < count and name not in whole:
                continue
            del pieces[name]
            fits = (
                name in wanted
                and name not in whole
                and count > 1
                and sorted(parts) == [(i + 1, count) for i in range(count)]
                and all(part.ndim == 1 and part.size for part in parts.values())
                and sum(part.size for part in parts.values()) == math.prod(wanted[name].shape)
            )
            if not fits:
                raise _not_whole(where, name)
            tensor = np.concatenate([parts[key] for key in sorted(parts)])
            tensor = tensor.reshape(wanted[name].shape)
            parts.clear()  # once they are joined there is no second copy
        elif name in whole:
            raise _not_whole(where, name)
        whole.add(name)
        yield name, tensor
    if pieces:
        raise _not_whole(where, next(iter(pieces)))


def _not_whole(where: str, name: str) -> UserError:
    return UserError(
        f"The tensor {name!r} of {where} is in pieces that don't make it whole; get the bundle "
        "again, or write it anew with `cascade bundle`."
    )


def named(tree: Any) -> list[tuple[str, Any]]:
    """A tree's leaves with their paths joined by "/"."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in leaves]


def check_shapes(where: str, tensors: Mapping[str, Any], template: Any):
    """Holds named arrays against the network they are for.

    Raises:
      UserError: an array that is missing, foreign, or of another shape.
    """
    wanted = dict(named(template))
    missing = [name for name in wanted if name not in tensors]
    foreign = [name for name in tensors if name not in wanted]
    if missing or foreign:
        name, fault = (missing[0], "is missing") if missing else (foreign[0], "isn't part of it")
        raise UserError(
            f"The weights of {where} don't match its network: {name!r} {fault} ({len(missing)} "
            f"missing, {len(foreign)} foreign); use the config that they were trained with."
        )
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != wanted[name].shape:
            raise UserError(
                f"The tensor {name!r} of {where} has the shape {tuple(tensor.shape)} and its "
                f"network needs {wanted[name].shape}; use the config it was trained with."
            )


def check_finite(where: str, name: str, tensor: np.ndarray):
    """Raises a UserError where an array holds NaN or infinity."""
    if not np.isfinite(tensor).all():
        raise UserError(
            f"The tensor {name!r} of {where} has NaN or infinite values, so its training diverged; "
            "take an earlier checkpoint."
        )


def replace_durably(path: Path, data: bytes):
    """Writes a file, all of it or nothing, and waits until it is on the disk."""
    with replacing(path) as temporary:
        write_durably(temporary, data)


def write_durably(path: Path, data: bytes):
    """Writes a file and waits until it is on the disk."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
