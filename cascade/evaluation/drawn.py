"""What a bundle draws, measured as it is drawn: features and seconds, and no picture kept long."""

import contextlib
import functools
import itertools
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from cascade.batches import Batch
from cascade.data.preprocess import all_resized
from cascade.evaluation.features import Extractor
from cascade.evaluation.record import SHOWN, Record
from cascade.parallel.mesh import on_all_processes, whole_on_host
from cascade.pipeline import Cascade, load
from cascade.request import default_batch_size

PROMPTS = 256  # prompts whose embeddings are held; a multiple of it goes through in whole batches


class Setting(NamedTuple):
    """One way to draw.

    Attributes:
      guidance, steps, aug_level: one value, or one a stage; None is the bundle's.
      sampler: its name; None is the bundle's.
    """

    guidance: float | tuple[float, ...] | None = None
    steps: int | tuple[int, ...] | None = None
    sampler: str | None = None
    aug_level: float | tuple[float, ...] | None = None

    def stages(self, pipe: Cascade, stage: int | None = None) -> list[dict[str, Any]]:
        """Each stage's sampling settings, or one's, the bundle's own included, as plain types.

        Raises:
          UserError: a value that a stage can't take, or a wrong number of them.
        """
        return [each.to_dict() for each in pipe.settings(**self._asdict(), stage=stage)]

    def told(self, pipe: Cascade, stage: int | None = None) -> dict[str, str]:
        """Guidance, steps and sampler as a person reads them: one for all stages or one for each.

        {"guidance": "3/1", "steps": "64/30", "sampler": "ddim"}; of one `stage` its number too, and
        "aug_level", as where that was asked for.
        """
        stages = self.stages(pipe, stage)
        columns = {} if stage is None else {"stage": [str(stage)]}
        columns |= {
            "guidance": [f"{each['guidance']:g}" for each in stages],
            "steps": [str(each["steps"]) for each in stages],
            "sampler": [each["sampler"]["name"] for each in stages],
        }
        if stage is not None or self.aug_level is not None:
            columns["aug_level"] = [f"{each['aug_level']:g}" for each in stages]
        return {
            name: "/".join(values if len(set(values)) > 1 else values[:1])
            for name, values in columns.items()
        }


def settings(
    guidance: Sequence | None,
    steps: Sequence | None,
    samplers: Sequence[str] | None,
    aug_level: Sequence | None = None,
) -> list[Setting]:
    """Every combination; None leaves the bundle's own."""
    given = (guidance, steps, samplers, aug_level)
    choices = [[None] if values is None else values for values in given]
    return [Setting(*chosen) for chosen in itertools.product(*choices)]


class Drawing(NamedTuple):
    """Who draws, and how.

    Attributes:
      bundle: its folder.
      setting: the way.
      said: what tells it from others before that does: {"by": "teacher"}.
    """

    bundle: str | os.PathLike
    setting: Setting
    said: Mapping[str, str]


class Artist:
    """Bundles that draw, of which one is held at a time."""

    def __init__(self, text_weights: str, mesh: Mesh):
        """Args: see `cascade.pipeline.load`."""
        self._how = {"text_weights": text_weights, "mesh": mesh}
        self._held: tuple[str | os.PathLike, Cascade] | None = None

    def __call__(self, bundle: str | os.PathLike) -> Cascade:
        """The one that is held, or another, read in its place.

        Raises:
          UserError: as `cascade.pipeline.load`.
        """
        if self._held is None or self._held[0] != bundle:
            self._held = None  # its memory goes first
            self._held = (bundle, load(bundle, **self._how))
        return self._held[1]


class Enlarged(NamedTuple):
    """What one super-resolution stage alone is given.

    Attributes:
      stage: its number.
      picture: number -> uint8 [R, R, 3], R the stage's resolution, which is shrunk as in training.
    """

    stage: int
    picture: Callable[[int], np.ndarray]

    def pictures(self, numbers: Iterable[int]) -> np.ndarray:
        """Several, [N, R, R, 3]."""
        return np.stack([self.picture(number) for number in numbers])


def measure(
    record: Record,
    pipe: Cascade,
    prompts: Sequence[str],
    setting: Setting,
    seed: int,
    batch_size: int | None,
    resolution: int,
    extractors: Sequence[Extractor],
    what: str,
    enlarged: Enlarged | None = None,
):
    """Draws one picture a prompt, and adds to a record what the pictures of it lack.

    All processes call this together. Picture i has index i, so a record that is gone on with holds
    what one without a break does. Rows are the extractors' features by their names, and "seconds":
    what a batch took, without its text's encoding, over its pictures; NaN of the first one, which
    compiles.

    Args:
      batch_size: as in `cascade sample`.
      resolution: side to which pictures that are drawn larger are shrunk, by area.
      what: names the progress bar.
      enlarged: None draws by the whole cascade.

    Raises:
      UserError: as `Cascade.draw_batches`, or the record can't be written.
    """
    first, done = True, record.count
    rows = batch_size
    if rows is None:  # the same wherever an interrupted evaluation goes on
        side = max(stage.config.resolution for stage in pipe.stages)
        rows = default_batch_size(pipe.mesh, side, PROMPTS)
    quiet = jax.process_index() > 0
    bar = tqdm(total=len(prompts), initial=done, desc=what, unit="picture", disable=quiet)
    with bar:
        while done < len(prompts):
            told = prompts[done : done + PROMPTS]
            how = {"seed": seed, "first_index": done, "batch_size": rows, "progress": False}
            if enlarged is None:
                batches = pipe.draw_batches(told, **how, **setting._asdict())
            else:
                numbers = range(done, done + len(told))
                read = functools.partial(enlarged.pictures, numbers)
                images = on_all_processes(read, record.mesh)
                batches = pipe.upscale_batches(
                    images, told, enlarged.stage, **how, **setting._asdict()
                )
            began = time.perf_counter()
            with contextlib.closing(batches):
                for batch in batches:
                    seconds = (time.perf_counter() - began) / len(batch.stages[-1])
                    _add(record, batch, done, resolution, extractors, np.nan if first else seconds)
                    first, done = False, done + batch.count
                    bar.update(batch.count)
                    began = time.perf_counter()
    record.write()


def _add(
    record: Record,
    batch: Batch,
    start: int,
    resolution: int,
    extractors: Sequence[Extractor],
    seconds: float,
):
    """A batch's rows; `start` is the index of its first picture."""
    pictures = batch.stages[-1]
    shrinks = pictures.shape[1] != resolution
    if shrinks or start < SHOWN:
        whole = np.asarray(batch[-1])
        record.keep(dict(enumerate(whole, start)))
    if shrinks:
        small = all_resized(whole, resolution)
        filling = len(pictures) - len(small)
        pictures = np.pad(small, [(0, filling), (0, 0), (0, 0), (0, 0)], "edge")
    measured = {e.name: whole_on_host(e(pictures))[: batch.count] for e in extractors}
    record.add(**measured, seconds=np.full(batch.count, seconds))
