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
# falls to `fsdp_spec`.
Rules = Sequence[tuple[str, P]]

SMALLEST_SHARDED = 2**16  # elements; below this a gather costs more than a copy


def fsdp_spec(shape: tuple[int, ...], mesh: Mesh) -> P:
    """Shards the largest axis that `fsdp` divides; small or indivisible arrays stay whole."""
    size = mesh.shape["fsdp"]
    divisible = [axis for axis, length in enumerate(shape) if length % size == 0]
    if size == 1 or math.prod(shape) < SMALLEST_SHARDED or not divisible:
        return P()
    widest = max(divisible, key=lambda axis: shape[axis])
    return P(*("fsdp" if axis == widest else None for axis in range(len(shape))))


def fits(spec: P, shape: tuple[int, ...], mesh: Mesh) -> bool:
    """Whether an array of `shape` can be laid out so: enough axes, each of them divisible.

    Adafactor's factored moments carry a kernel's path but not its axes.
    """
    parts = [
        () if names is None else names if isinstance(names, tuple) else (names,) for names in spec
    ]
    return len(parts) <= len(shape) and all(
        length % math.prod(mesh.shape[name] for name in names) == 0
        for length, names in zip(shape, parts, strict=False)
    )


def shardings(tree, mesh: Mesh, rules: Rules = ()):
    """A tree of shardings for a tree of arrays or `jax.ShapeDtypeStruct`s.

    Args:
      tree: anything `jax.tree` walks; a leaf's path reads like `params/down_0/conv/kernel`.
      rules: (pattern, spec) pairs, searched in order with `re.search`; one that doesn't fit an
        array's axes is passed over.
    """

    def place(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        for pattern, spec in rules:
            if re.search(pattern, name) and fits(spec, leaf.shape, mesh):
                return NamedSharding(mesh, spec)
        return NamedSharding(mesh, fsdp_spec(leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(place, tree)
