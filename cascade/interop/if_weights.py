"""Which tensors of diffusers' U-Net are which of ours, in which layout.

A convolution's kernel is stored [out, in, h, w] there and [h, w, in, out] here, a matrix [out, in]
there and [in, out] here: each is the other with its axes turned round, but for h and w. Ours then
splits what belongs to attention heads, and joins queries, keys and values along an axis before.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np

from cascade.errors import UserError
from cascade.interop.folders import Weights
from cascade.shards import named

MATRIX, HEADS_OUT, CONVOLUTION, POINTWISE = "matrix", "heads out", "convolution", "pointwise"

# Module of ours -> modules of diffusers', of which ours has one after the other, and the layout.
ENDS = {
    "conv_in": (("conv_in",), CONVOLUTION),
    "logsnr_embedding/dense_in": (("time_embedding.linear_1",), MATRIX),
    "logsnr_embedding/dense_out": (("time_embedding.linear_2",), MATRIX),
    "aug_embedding/dense_in": (("class_embedding.linear_1",), MATRIX),
    "aug_embedding/dense_out": (("class_embedding.linear_2",), MATRIX),
    "text_in": (("encoder_hid_proj",), MATRIX),
    "text_pool/norm_in": (("add_embedding.norm1",), MATRIX),
    "text_pool/q": (("add_embedding.pool.q_proj",), MATRIX),
    "text_pool/kv": (("add_embedding.pool.k_proj", "add_embedding.pool.v_proj"), MATRIX),
    "text_pool/out": (("add_embedding.proj",), MATRIX),
    "text_pool/norm_out": (("add_embedding.norm2",), MATRIX),
    "norm_out": (("conv_norm_out",), MATRIX),
    "conv_out": (("conv_out",), CONVOLUTION),
}
RESIDUAL = {
    "norm_in": (("norm1",), MATRIX),
    "conv_in": (("conv1",), CONVOLUTION),
    "modulation": (("time_emb_proj",), MATRIX),
    "norm_out": (("norm2",), MATRIX),
    "conv_out": (("conv2",), CONVOLUTION),
    "shortcut": (("conv_shortcut",), POINTWISE),
}
ATTENTION = {
    "norm": (("group_norm",), MATRIX),
    "q": (("to_q",), MATRIX),
    "qkv": (("to_q", "to_k", "to_v"), MATRIX),
    "text_norm": (("norm_cross",), MATRIX),
    "text_kv": (("add_k_proj", "add_v_proj"), MATRIX),
    "out": (("to_out.0",), HEADS_OUT),
}
LEVELS = re.compile(
    r"(down|middle|up)(?:_(\d+))?/"
    r"(?:resample/residual|block_(\d+)/(residual|attention))/(\w+)"
)


class Stored(NamedTuple):
    """How diffusers stores one tensor of ours: under these names, each of this shape."""

    names: tuple[str, ...]
    shape: tuple[int, ...]


def stored(path: str, shape: tuple[int, ...], levels: int) -> Stored:
    """Where diffusers has the parameter `path` of ours, whose shape is `shape`.

    Args:
      path: joined by "/".
      levels: how many the network has.

    Raises:
      UserError: diffusers' U-Net has no place for it.
    """
    if path == "text_pool/query":
        return Stored(("add_embedding.pool.positional_embedding",), (1, *shape))
    module, leaf = path.rsplit("/", 1)
    names, layout = _module(module, levels)
    if len(names) > 1:
        shape = shape[:-3] + shape[-2:]
    names = tuple(f"{name}.{'bias' if leaf == 'bias' else 'weight'}" for name in names)
    if leaf != "kernel":
        return Stored(names, (math.prod(shape),))
    if layout == CONVOLUTION:
        return Stored(names, (shape[3], shape[2], *shape[:2]))
    inputs = math.prod(shape[:-1]) if layout == HEADS_OUT else shape[0]
    outputs = math.prod(shape) // inputs
    return Stored(names, (outputs, inputs, *((1, 1) if layout == POINTWISE else ())))


def _module(module: str, levels: int) -> tuple[tuple[str, ...], str]:
    """Names of diffusers' modules that make up `module` of ours, and their layout."""
    if module in ENDS:
        return ENDS[module]
    match = LEVELS.fullmatch(module)
    table = ATTENTION if match and match[4] == "attention" else RESIDUAL
    if not match or match[5] not in table:
        raise UserError(
            f"The network has {module!r}, which diffusers' U-Net has no place for; export one "
            "with `resampling` 'block' and without `scan_blocks`."
        )
    way, level, block = match[1], int(match[2] or 0), match[3]
    names, layout = table[match[5]]
    kind = "attentions" if table is ATTENTION else "resnets"
    # Levels count from the finest here; diffusers' way up counts from the coarsest. Going down,
    # a level's resampling comes first here and last, in the level before, there.
    if way == "middle":
        place = f"mid_block.{kind}.{block}"
    elif way == "down":
        place = (
            f"down_blocks.{level - 1}.downsamplers.0"
            if block is None
            else f"down_blocks.{level}.{kind}.{block}"
        )
    else:
        inside = "upsamplers.0" if block is None else f"{kind}.{block}"
        place = f"up_blocks.{levels - 1 - level}.{inside}"
    return tuple(f"{place}.{name}" for name in names), layout


def to_ours(parts: list[np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    """Turns diffusers' tensors into the one of ours that they make up."""
    parts = [part.transpose(2, 3, 1, 0) if part.ndim == 4 else part.T for part in parts]
    if len(parts) == 1:
        return parts[0].reshape(shape)
    return np.stack([part.reshape(shape[:-3] + shape[-2:]) for part in parts], -3)


def to_diffusers(ours: np.ndarray, place: Stored) -> dict[str, np.ndarray]:
    """The inverse of `to_ours`: diffusers' tensors by name."""
    parts = np.moveaxis(ours, -3, 0) if len(place.names) > 1 else [ours]
    if len(place.shape) == 4:
        out, inputs, height, width = place.shape
        turned = [p.reshape(height, width, inputs, out).transpose(3, 2, 0, 1) for p in parts]
    else:
        turned = [part.reshape(place.shape[::-1]).T for part in parts]
    return dict(zip(place.names, turned, strict=True))


def places(tree: Any, levels: int) -> dict[str, Stored]:
    """Where diffusers has each parameter of a tree of arrays or their shapes, by our path."""
    return {path: stored(path, leaf.shape, levels) for path, leaf in named(tree)}


@dataclass(frozen=True)
class Pending:
    """An array that is read when NumPy asks for it, and not kept: a stage needn't fit in memory."""

    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return np.asarray(self.read(), dtype)


def read_params(
    weights: Weights, template: Any, levels: int, done: Callable[[], Any] = lambda: None
) -> Any:
    """A U-Net's parameters out of a diffusers folder, each read when it is asked for.

    Args:
      weights: the folder's.
      template: the tree of `jax.ShapeDtypeStruct` that they must fill.
      levels: how many the network has.
      done: called after each parameter that was read.

    Raises:
      UserError: naming a tensor that is missing, foreign or of another shape.
    """
    sources = places(template, levels)
    _check(weights, {name: at.shape for at in sources.values() for name in at.names})

    def pending(path, shape):
        def read():
            value = to_ours([weights.read(name) for name in sources[path].names], shape)
            done()
            return value

        return Pending(shape, read)

    leaves = [pending(path, leaf.shape) for path, leaf in named(template)]
    return jax.tree.unflatten(jax.tree.structure(template), leaves)


def _check(weights: Weights, wanted: Mapping[str, tuple[int, ...]]):
    """Holds a folder's tensors against those that its config.json asks for."""
    where = f"The weights in {str(weights.folder)!r}"
    held = set(weights.names())
    for name in wanted:
        if name not in held:
            raise UserError(
                f"{where} lack the tensor {name!r} that config.json asks for; give both from one "
                "source, whole."
            )
        if weights.shape(name) != wanted[name]:
            raise UserError(
                f"{where} hold {name!r} with the shape {weights.shape(name)} where config.json "
                f"asks for {wanted[name]}; give both from one source."
            )
    for name in sorted(held - wanted.keys()):
        raise UserError(
            f"{where} hold the tensor {name!r}, which config.json has no place for; give both from "
            "one source."
        )
