"""The job `cascade tune-steps`: the levels at which one stage draws best in few steps.

From the same noise every deterministic sampler comes to the same picture, given steps enough. So
pictures are drawn once in many steps, and levels for few are searched that come near to them; a
second set of noises, which the search never saw, says what that is worth.
"""

import contextlib
import functools
import math
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import FrozenConfigDict
from tqdm import tqdm

from cascade import bundle, manifest
from cascade.arguments import checked_prompts, part_section, whole
from cascade.batches import picture_keys
from cascade.config import from_json, to_json
from cascade.diffusion.samplers import RANDOM_SAMPLERS, SAMPLERS
from cascade.diffusion.spacings import karras, uniform, uniform_logsnr
from cascade.errors import UserError
from cascade.files import check_place, check_writable, whole_folder
from cascade.images import to_float
from cascade.level_search import losses_at_most, search_levels
from cascade.parallel.mesh import all_devices, split_rows
from cascade.pipeline import Cascade
from cascade.request import Request, request
from cascade.stage import Stage

REFERENCE = {"sampler": {"name": "heun"}, "spacing": {"name": "uniform"}}
KARRAS = (0.002, 80.0)  # sigma_min and sigma_max of EDM


class Tuned(NamedTuple):
    """What a search found.

    sampler, steps: what for.
    levels: logsnr, N + 1.
    before, after: root mean square distance to the reference in [-1, 1], over noises that weren't
      searched on, at the levels that the bundle had and at these.
    stored: whether they are better, and so in the bundle.
    """

    sampler: str
    steps: int
    levels: tuple[float, ...]
    before: float
    after: float
    stored: bool


def tune_steps(
    folder: str | os.PathLike,
    prompts: Sequence[str],
    *,
    stage: int = 0,
    steps: int | None = None,
    sampler: str | None = None,
    pictures: int = 16,
    reference_steps: int = 128,
    rounds: int = 12,
    seed: int = 0,
    batch_size: int | None = None,
    text_weights: str = "",
    out: str | os.PathLike | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> Tuned:
    """Searches levels for a stage of a bundle and stores them in it, where they are better.

    Args:
      folder: the bundle.
      prompts: what is drawn, in turn; as varied as what will be.
      stage: which; one that enlarges is given what the stages before it draw.
      steps, sampler: what the levels are for; None is the bundle's. Deterministic samplers alone.
      pictures: to search on, and as many to judge by, rounded up to whole batches.
      reference_steps: of Heun's method, of two evaluations each.
      rounds: the most rounds of the search, each of up to 2 `steps` draws of all pictures.
      seed, batch_size, text_weights: as in `Cascade.__call__` and `cascade.load`.
      out: a new bundle's folder; None writes into the one that was read.
      overwrite: replace a bundle that is at `out`.

    Raises:
      UserError: as `cascade.load`; a stage or sampler whose steps can't be searched, a number out
        of range, or an `out` that can't be written, before anything is drawn.
    """
    prompts = checked_prompts(prompts)
    for name, value in {"pictures": pictures, "rounds": rounds}.items():
        whole(name, value, 1, 100_000)
    if out is None:
        check_writable(Path(folder), "bundle")
    else:
        check_place(out, **bundle.PLACE, overwrite=overwrite, sources=[folder])
    mesh = all_devices()
    loaded = bundle.load_bundle(folder, None, text_weights, mesh)
    settings = _settings(loaded.stages, stage, steps, sampler, reference_steps)
    below = Cascade(loaded.stages[:stage], *loaded[1:], mesh) if stage else None
    how = seed, "", 0, min(8, pictures) if batch_size is None else batch_size
    wanted = request(loaded.text_encoder, mesh, prompts, 2 * len(prompts), *how)
    batches = math.ceil(pictures / wanted.rows)
    trained = loaded.stages[stage]
    reference = trained.stage.settings(
        **{**settings.to_dict(), **REFERENCE, "steps": reference_steps}
    )
    own = np.asarray(trained.stage.levels(settings), np.float64)
    starts = _starts(trained.stage, own)
    total = 2 * batches + losses_at_most(len(starts), settings.steps, rounds) * batches
    with tqdm(total=total + 2 * batches, unit="batch", disable=not progress) as bar:
        bar.set_description(f"reference, {reference_steps} steps of Heun")
        sets = [
            _noises(below, trained, mesh, wanted, prompts, reference, range(first, first + batches))
            for first in (0, batches)
        ]
        bar.update(2 * batches)
        squares = _squares(trained, settings)
        searched, held_out = (functools.partial(_distance, squares, each, bar) for each in sets)
        levels, _ = search_levels(
            searched, starts, rounds, lambda least: bar.set_description(f"distance {least:.5f}")
        )
        bar.total = bar.n + 2 * batches  # it may have ended early
        before, after = held_out(own), held_out(levels)
    name, levels = settings.sampler["name"], tuple(float(np.float32(level)) for level in levels)
    stored = after < before
    if stored:
        _store(Path(folder), out, overwrite, stage, name, levels)
    return Tuned(name, settings.steps, levels, before, after, stored)


def _settings(
    stages: Sequence[bundle.TrainedStage], index: int, steps, sampler, reference_steps
) -> FrozenConfigDict:
    """The settings to find levels for, checked."""
    whole("stage", index, 0, len(stages) - 1)
    stage = stages[index].stage
    if stage.config.distilled.steps:
        raise UserError(
            f"Stage {index} was distilled to {stage.config.distilled.steps} steps and knows their "
            "levels alone; tune its teacher."
        )
    if not stages[0].stage.is_base:
        raise UserError(
            "This bundle has no base stage to draw what the others enlarge; tune the steps of a "
            "whole cascade."
        )
    changes = {} if steps is None else {"steps": whole("steps", steps, 2, 1000)}
    if sampler is not None:
        changes["sampler"] = part_section(sampler, SAMPLERS)
    settings = stage.settings(**changes)
    whole("reference_steps", reference_steps, settings.steps + 1, 10_000)
    whole("steps", settings.steps, 2, 1000)
    name = settings.sampler["name"]
    if name in RANDOM_SAMPLERS:
        able = ", ".join(each for each in SAMPLERS if each not in RANDOM_SAMPLERS)
        raise UserError(
            f"The sampler {name!r} draws by chance, so from one noise it has no picture to come "
            f"near to; give one of {able}."
        )
    if settings.guidance_schedule["name"] == "oscillating":
        raise UserError(
            "Oscillating guidance is another at every number of steps, so that many steps are no "
            "reference for few; tune a bundle whose guidance_schedule is constant or interval."
        )
    return settings


def _starts(stage: Stage, own: np.ndarray) -> list[np.ndarray]:
    """Levels to begin from: those that would be drawn with, and the usual spacings."""
    largest, least = (math.exp(-0.5 * float(stage.schedule(jnp.array(t)))) for t in (1.0, 0.0))
    edm = karras(sigma_min=max(KARRAS[0], 1.1 * least), sigma_max=min(KARRAS[1], largest))
    spacings = uniform(), uniform_logsnr(), edm
    usual = [np.asarray(each(stage.schedule, len(own) - 1), np.float64) for each in spacings]
    return [levels for levels in (own, *usual) if np.all(np.diff(levels) > 0)]


class _Noises(NamedTuple):
    """One batch: conditions, the noises' keys, and the pictures that they should become."""

    cond: dict
    null_cond: dict
    keys: jax.Array
    reference: jax.Array


def _noises(
    below: Cascade | None,
    trained: bundle.TrainedStage,
    mesh: Mesh,
    wanted: Request,
    prompts: Sequence[str],
    settings: FrozenConfigDict,
    batches: Sequence[int],
) -> list[_Noises]:
    """Batches with their reference pictures, with the keys that `cascade sample` draws them by.

    `below` draws what a stage enlarges.
    """
    split, rows = functools.partial(split_rows, mesh=mesh), wanted.rows
    null = {key: split(np.repeat(value, rows, axis=0)) for key, value in wanted.null.items()}
    side = trained.stage.config.resolution
    stage = np.uint32(len(below.stages) if below else 0)
    made = []
    for i in batches:
        which = np.arange(i * rows, (i + 1) * rows) % len(prompts)
        cond = {key: split(value[which]) for key, value in wanted.text.items()}
        if below:
            texts = [prompts[k] for k in which]
            how = {"first_index": i * rows, "batch_size": rows, "progress": False}
            cond["lowres"] = split(to_float(below(texts, seed=wanted.seed, **how)))
        indices = split(np.arange(i * rows, (i + 1) * rows, dtype=np.uint32))
        keys = picture_keys(np.uint32(wanted.seed), indices, stage)
        x = trained.stage.draw(trained.params, cond, null, keys, settings, (side, side))
        if not jnp.isfinite(x).all():
            raise UserError(
                f"The stage of {side}×{side} pixels drew NaN; train it anew and then tune it."
            )
        made.append(_Noises(cond, null, keys, x))
    return made


def _squares(trained: bundle.TrainedStage, settings: FrozenConfigDict) -> Callable:
    """A program for any levels: (batch, levels) -> the mean of the squared distance."""
    side = trained.stage.config.resolution

    @jax.jit
    def squares(params, batch, levels):
        inputs = params, batch.cond, batch.null_cond, batch.keys
        x = trained.stage.sample(*inputs, settings, (side, side), levels=levels)
        return jnp.mean(jnp.square(x - batch.reference))

    return functools.partial(squares, trained.params)


def _distance(squares: Callable, noises: Sequence[_Noises], bar: tqdm, levels) -> float:
    """The root of the mean square over all pictures, infinite where one isn't finite."""
    total = 0.0
    for batch in noises:
        total += float(squares(batch, jnp.asarray(levels, jnp.float32)))
        bar.update()
    return math.sqrt(total / len(noises)) if math.isfinite(total) else math.inf


def _store(folder: Path, out, overwrite: bool, stage: int, sampler: str, levels: tuple):
    """Writes the levels into cascade.json, of a copy of the bundle where `out` is given."""
    contents = manifest.read(folder)
    entry = contents["stages"][stage]
    config = from_json(entry["config"])
    others = [
        each
        for each in config.sampling.searched
        if (each[0], len(each[1])) != (sampler, len(levels))
    ]
    config.sampling.searched = (*others, (sampler, levels))
    entry["config"] = to_json(config)
    contents = {key: contents[key] for key in ("text", "stages")}
    new = contextlib.nullcontext(folder)
    if out is not None:
        new = whole_folder(out, **bundle.PLACE, overwrite=overwrite)
    with new as place:
        if out is not None:
            shutil.copytree(folder, place, dirs_exist_ok=True)
        manifest.write(place, contents)
