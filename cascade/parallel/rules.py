"""Sharding as data: a list of (path pattern, spec) laid over a tree of parameters.

The model knows nothing of this. Optimiser state and EMA repeat the parameters' paths at the end
of their own, so one pattern places all three.
"""

import math
import re
from collections.abc import Sequence

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

# (pattern searched in the path, spec); the first match wins, and what none matches
# falls to `fsdp_spec`. A spec names an array's last axes: one before them, along which equal
# blocks are stacked, stays whole.
Rules = Sequence[tuple[str, P]]

# The U-Net's own. Over `tensor` lie attention's heads, and the channels between a residual block's
# two convolutions, so that each of the two takes one sum between devices (Shoeybi et al. 2019).
UNET: Rules = (
    (r"attention/q/kernel$", P("fsdp", "tensor", None)),
    (r"attention/(qkv|text_kv)/kernel$", P("fsdp", None, "tensor", None)),
    (r"attention/out/kernel$", P("tensor", None, "fsdp")),
    (r"residual/conv_in/kernel$", P(None, None, "fsdp", "tensor")),
    (r"residual/conv_out/kernel$", P(None, None, "tensor", "fsdp")),
)

SMALLEST_SHARDED = 2**16  # elements; below this a gather costs more than a copy


def of_config(config) -> Rules:
    """A config's own rules, `config.sharding_rules`; hashable."""
    return tuple((pattern, P(*spec)) for pattern, spec in config.sharding_rules)


def fsdp_spec(shape: tuple[int, ...], mesh: Mesh) -> P:
    """Shards the largest axis that `fsdp` divides; small or indivisible arrays stay whole."""
    size = mesh.shape["fsdp"]
    divisible = [axis for axis, length in enumerate(shape) if length % size == 0]
    if size == 1 or math.prod(shape) < SMALLEST_SHARDED or not divisible:
        return P()
    widest = max(divisible, key=lambda axis: shape[axis])
    return P(*("fsdp" if axis == widest else None for axis in range(len(shape))))


def mesh_axes(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes that one entry of a spec names."""
    return () if entry is None else entry if isinstance(entry, tuple) else (entry,)


def fits(spec: P, shape: tuple[int, ...], mesh: Mesh) -> bool:
    """Whether an array's last axes can be laid out so: enough of them, each divisible.

    Adafactor's factored moments carry a kernel's path but not its axes.
    """
    parts = [mesh_axes(entry) for entry in spec]
    return len(parts) <= len(shape) and all(
        length % math.prod(mesh.shape[name] for name in names) == 0
        for length, names in zip(shape[len(shape) - len(parts) :], parts, strict=True)
    )


def spec_of(name: str, shape: tuple[int, ...], mesh: Mesh, rules: Rules = ()) -> P:
    """How one array is laid out: by `rules`, else by `UNET`, else by `fsdp_spec`.

    Args:
      name: its path, like `params/down_0/block_0/residual/conv_in/kernel`.
      rules: (pattern, spec) pairs, searched in order with `re.search`; one that doesn't fit the
        array's axes is passed over.
    """
    own = UNET if math.prod(shape) >= SMALLEST_SHARDED else ()
    for pattern, spec in (*rules, *own):
        if re.search(pattern, name) and fits(spec, shape, mesh):
            return P(*[None] * (len(shape) - len(spec)), *spec)
    return fsdp_spec(shape, mesh)


def shardings(tree, mesh: Mesh, rules: Rules = ()):
    """A tree of shardings for a tree of arrays or `jax.ShapeDtypeStruct`s; see `spec_of`."""

    def place(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return NamedSharding(mesh, spec_of(name, leaf.shape, mesh, rules))

    return jax.tree_util.tree_map_with_path(place, tree)
