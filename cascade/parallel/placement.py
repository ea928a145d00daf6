"""`cascade describe --mesh`: how a training state is split, what stays whole, and why."""

import functools
import itertools
import math
from typing import NamedTuple

import jax
from jax.sharding import AbstractMesh
from ml_collections import ConfigDict

from cascade.errors import UserError
from cascade.parallel.mesh import AXES
from cascade.parallel.rules import SMALLEST_SHARDED, mesh_axes, of_config, spec_of
from cascade.stage import Stage
from cascade.training.optim import make_optimizer
from cascade.training.state import init_state


class Placed(NamedTuple):
    """One array of a training state.

    Attributes:
      part: "params", "ema_params", "opt_state" or "step".
      name: its path below that.
      parts: along each axis, over which mesh axes it is split, "" where it isn't.
      elements, bytes: of the whole array.
      share: into how many parts it is split.
    """

    part: str
    name: str
    parts: tuple[str, ...]
    elements: int
    bytes: int
    share: int


def placement(config: ConfigDict, sizes: dict[str, int]) -> list[Placed]:
    """Every array of a stage's training state as `cascade train` lays it over such a mesh.

    Args:
      sizes: axis -> size, as `cascade.parallel.mesh.parse_mesh` gives it.

    Raises:
      UserError: a size isn't said.
    """
    if min(sizes.values()) < 1:
        raise UserError(
            "A mesh is described by its sizes, and one of them is left open; say it as a number."
        )
    mesh = AbstractMesh(tuple(sizes[axis] for axis in AXES), AXES)
    create = functools.partial(init_state, Stage(config.stage), make_optimizer(config.train))
    state = jax.eval_shape(create, jax.random.key(0))
    rules = of_config(config)
    found = []
    for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        spec = tuple(spec_of(name, leaf.shape, mesh, rules))
        axes = [
            tuple(axis for axis in mesh_axes(entry) if sizes[axis] > 1)
            for entry in spec + (None,) * (len(leaf.shape) - len(spec))
        ]
        share = math.prod(sizes[name] for names in axes for name in names)
        part, _, rest = name.partition("/")
        parts = tuple("·".join(names) for names in axes)
        size = math.prod(leaf.shape)
        found.append(Placed(part, rest, parts, size, size * leaf.dtype.itemsize, share))
    return found


def describe_placement(config: ConfigDict, sizes: dict[str, int]) -> str:
    """A table of a stage's parameters by layout, then each device's bytes, then why some are whole.

    Args, raises: as `placement`.
    """
    arrays = placement(config, sizes)
    params = [array for array in arrays if array.part == "params"]
    mesh = ", ".join(f"{axis}={sizes[axis]}" for axis in AXES)
    lines = [f"On a mesh of {mesh} ({math.prod(sizes.values())} devices):"]
    lines.append(
        f"{'axes split over':<34}{'arrays':>8}{'parameters':>16}{'MB a device':>14}  such as"
    )

    def layout(array: Placed) -> tuple[int, tuple[str, ...]]:
        return array.share, array.parts if array.share > 1 else ()

    for (share, parts), rows in itertools.groupby(sorted(params, key=layout, reverse=True), layout):
        rows = list(rows)
        named = " × ".join(part or "-" for part in parts) or "whole"
        held = sum(a.bytes for a in rows) / share / 1e6
        largest = max(rows, key=lambda a: a.elements)
        lines.append(
            f"{named:<34}{len(rows):>8}{sum(a.elements for a in rows):>16,}{held:>14,.1f}"
            f"  {largest.name}"
        )
    held = {
        what: sum(a.bytes / a.share for a in arrays if a.part == part) / 1e9
        for part, what in {
            "params": "parameters",
            "ema_params": "their average",
            "opt_state": "the optimiser's state",
        }.items()
    }
    each = ", ".join(f"{what} {size:,.2f} GB" for what, size in held.items())
    lines.append(f"Each device holds {sum(held.values()):,.2f} GB between steps: {each}.")
    lines += whole(params)
    return "\n".join(lines)


def whole(params: list[Placed]) -> list[str]:
    """Sentences on the parameters that every device holds whole."""
    kept = [array for array in params if array.share == 1]
    small = [array for array in kept if array.elements < SMALLEST_SHARDED]
    large = [array for array in kept if array.elements >= SMALLEST_SHARDED]
    said = []
    if small:
        said.append(
            f"{len(small)} arrays stay whole since they have fewer than {SMALLEST_SHARDED:,} "
            f"elements, {sum(a.elements for a in small):,} in all."
        )
    if large:
        names = ", ".join(array.name for array in large[:8]) + (", …" if len(large) > 8 else "")
        said.append(
            f"{len(large)} larger arrays stay whole, {sum(a.elements for a in large):,} elements "
            "in all, since neither a rule nor fsdp divides any of their axes, or both have size 1: "
            f"{names}."
        )
    return said
