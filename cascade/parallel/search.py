"""`cascade plan --search`: which batch, recomputation and mesh fit a topology best."""

import itertools
import sys
from typing import NamedTuple

from ml_collections import ConfigDict
from tqdm import tqdm

from cascade.errors import UserError
from cascade.networks.levels import REMAT
from cascade.parallel.estimate import Estimate, estimate
from cascade.parallel.mesh import AXES
from cascade.parallel.plan import Measured, changed, measure
from cascade.parallel.topology import KINDS, LOCAL, parse

LARGEST = 8  # times the config's batch: beyond it, training is another
NOTHING = Estimate({}, None, None, False, None)  # of what couldn't be compiled
HEAD = f"{'batch':>7} {'remat':<9}{'mesh':<30}{'GB a chip':>10}{'images/s':>12}  binds"


class Found(NamedTuple):
    """One compiled candidate; `problem` says why it couldn't be, where there is no `measured`."""

    batch: int
    remat: str
    mesh: dict[str, int]
    measured: Measured | None
    estimate: Estimate
    problem: str = ""


def search(
    config: ConfigDict, topology: str, *, tries: int, utilisation: float, **options
) -> list[Found]:
    """Compiles candidates, the config itself first, and returns them, what fits best first.

    First come the meshes, with the config's batch and recomputation. Then, for each mesh and each
    way of recomputation, the batch is doubled while it fits (to at most 8 times the config's), or
    halved until it does. The best fits the memory and makes the most images a second; of equals,
    the one that takes less memory. Each is printed on standard error as it is found.

    Args:
      config: what is varied; its batch is where each mesh begins.
      tries: compilations at most; earlier ones that are kept count too.
      utilisation: as `cascade.parallel.estimate.estimate`.
      **options: of `cascade.parallel.plan.measure`.

    Raises:
      UserError: the config's own step can't be compiled, or the chip isn't known.
    """
    start, own = config.train.batch_size, config.stage.network.remat
    found: dict[tuple, Found] = {}

    def attempt(mesh: dict[str, int], remat: str, batch: int) -> Found:
        candidate = changed(config, batch=batch)
        candidate.mesh, candidate.stage.network.remat = mesh, remat
        try:
            measured = measure(candidate, topology, **options)
            result = estimate(measured, batch, utilisation)
            one = Found(batch, remat, measured.mesh, measured, result)
        except UserError as error:
            if not found:  # the config itself
                raise
            one = Found(batch, remat, mesh, None, NOTHING, str(error))
        found[(*one.mesh.values(), remat, batch)] = one
        tqdm.write(row(one), file=sys.stderr)
        bar.update()
        return one

    with tqdm(total=tries, unit="compilation") as bar:
        tqdm.write(HEAD, file=sys.stderr)
        first = attempt(config.mesh.to_dict(), own, start)
        if first.measured.device_kind not in KINDS:
            raise UserError(
                "--search compares speeds, and what this device can do isn't known "
                f"({first.measured.device_kind}); give a TPU topology."
            )
        slices = 1 if topology == LOCAL else parse(topology).slices
        layouts = meshes(first.mesh, first.measured.devices, slices)
        for mesh in layouts[1:tries]:
            if _divides(start, mesh, config):
                attempt(mesh, own, start)
        remats = dict.fromkeys([own, *REMAT])
        for mesh, remat in itertools.product(layouts, remats):
            batch, way = start, None
            while _divides(batch, mesh, config) and batch <= LARGEST * start:
                known = found.get((*mesh.values(), remat, batch))
                if known is None and len(found) == tries:
                    break
                fits = (known or attempt(mesh, remat, batch)).estimate.fits
                if way is not None and fits != way:  # doubled once too often, or halved enough
                    break
                batch, way = (2 * batch if fits else batch // 2), fits
    return sorted(found.values(), key=_merit, reverse=True)


def table(found: list[Found]) -> str:
    """What was compiled, a line each, and how to train with the best."""
    rows, best = [HEAD, *map(row, found)], found[0]
    if not best.estimate.fits:
        return "\n".join([*rows, "Nothing that was tried fits; shard over more chips."])
    sizes = (f"--config.mesh.{axis}={size}" for axis, size in best.mesh.items())
    options = (
        f"--config.train.batch_size={best.batch}",
        f"--config.stage.network.remat={best.remat}",
        *sizes,
    )
    return "\n".join([*rows, f"Best of these: {' '.join(options)}"])


def row(one: Found) -> str:
    """A candidate's line of the table, below `HEAD`."""
    mesh = ", ".join(f"{axis}={size}" for axis, size in one.mesh.items())
    memory, speed, binds = "", "", one.problem or "does not fit"
    if one.measured:
        memory = f"{one.measured.peak_bytes / 1e9:.2f}"
    if one.estimate.fits:
        speed, binds = f"{one.estimate.images_per_second:,.0f}", one.estimate.binds
    return f"{one.batch:>7} {one.remat:<9}{mesh:<30}{memory:>10}{speed:>12}  {binds}"


def _divides(batch: int, mesh: dict[str, int], config: ConfigDict) -> bool:
    shares = mesh["data"] * mesh["fsdp"] * config.train.microbatches
    return batch > 0 and batch % shares == 0


def _merit(found: Found) -> tuple:
    speed = found.estimate.images_per_second or 0.0
    memory = found.measured.peak_bytes if found.measured else float("inf")
    return bool(found.estimate.fits), speed, -memory


def meshes(own: dict[str, int], devices: int, slices: int) -> list[dict[str, int]]:
    """The config's mesh, then with parameters over all devices, over 8, and whole.

    Slices hold whole copies: "data" is a multiple of their number.
    """
    rest = devices // own["tensor"]
    splits = dict.fromkeys([own["fsdp"], rest, 8, 1])
    return [
        dict(zip(AXES, (rest // fsdp, fsdp, own["tensor"]), strict=True))
        for fsdp in splits
        if fsdp <= rest and rest % fsdp == 0 and rest // fsdp % slices == 0
    ]
