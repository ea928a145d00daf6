"""The job `cascade evaluate`: draw captions of a source, compare with its pictures, report."""

import hashlib
import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cascade.arguments import MAX_BATCH, enlarging, whole
from cascade.errors import UserError
from cascade.evaluation import drawn, pictures, scores
from cascade.evaluation.job import LEAST, Against, Job, first_caption
from cascade.evaluation.pictures import Data, Made, Reader
from cascade.parallel.mesh import on_all_processes
from cascade.pipeline import Cascade


def score_bundles(
    against: Against,
    bundles: Sequence[str | os.PathLike],
    *,
    guidance: Sequence | None = None,
    steps: Sequence | None = None,
    samplers: Sequence[str] | None = None,
    aug_level: Sequence | None = None,
    **how: Any,
) -> str:
    """Has every bundle draw in every combination of ways, and compares; see `score_drawings`.

    Args:
      guidance, steps, samplers, aug_level: see `cascade.evaluation.drawn.settings`.
      **how: num, stage, batch_size, text_weights.
    """
    ways = drawn.settings(guidance, steps, samplers, aug_level)
    drawings = [
        drawn.Drawing(bundle, way, {"bundle": str(bundle)} if len(bundles) > 1 else {})
        for bundle in bundles
        for way in ways
    ]
    return score_drawings(against, drawings, **how)


def score_drawings(
    against: Against,
    drawings: Sequence[drawn.Drawing],
    *,
    num: int = 1000,
    stage: int | None = None,
    batch_size: int | None = None,
    text_weights: str = "",
) -> str:
    """Draws the same captions of a source in every way, and compares all in one table.

    Args:
      drawings: who draws and how; a bundle's together, since one is held at a time.
      num: pictures of each; captions come again where there are fewer.
      stage: of a super-resolution stage alone: it enlarges the source's pictures, shrunk to what it
        was trained to take. None draws from text by all stages.
      batch_size, text_weights: as in `cascade sample`.

    Returns:
      See `Job.report`.

    Raises:
      UserError: anything that can't be read, drawn, compared or written; of what is asked for,
        before anything is drawn.
    """
    if batch_size is not None:
        whole("--batch-size", batch_size, 1, MAX_BATCH)
    job = Job(against, num)
    artist = drawn.Artist(text_weights, job.mesh)
    # Backwards, so that the first is held.
    asked = [_asked(artist(each.bundle), each, stage) for each in reversed(drawings)][::-1]
    sides = sorted({each.side for each in asked})
    if against.resolution is None and len(sides) > 1:
        raise UserError(
            f"One bundle draws {sides[0]} pixels a side and another {sides[-1]}; give --resolution,"
            " a side to which pictures are shrunk."
        )
    known = [[each.digest, each.about] for each in asked]
    job.begin(sides[0], 1 if stage is None else sides[-1], drawings=known)
    shared = {"source": job.data.about, "seed": against.seed}
    if stage is None:
        taken = on_all_processes(lambda: list(itertools.islice(job.captions(), num)), job.mesh)
        places, prompts = zip(*taken, strict=True)
    else:
        shared["enlarged"] = against.real
        places = np.resize(job.real.shared("place")[: against.real], num).tolist()
        prompts = on_all_processes(lambda: job.told(job.data, places), job.mesh)
    sets = []
    for (bundle, way, _), each in zip(drawings, asked, strict=True):
        record = job.record(each.name, bundle=each.digest, **shared, stages=each.settings)
        if record.count < num:
            told = (prompts, way, against.seed, batch_size, job.resolution, job.extractors)
            enlarged = None if stage is None else _enlarged(job, stage, each.side, places)
            drawn.measure(record, artist(bundle), *told, each.title, enlarged)
        sets.append(scores.Scored(each.about, record, num, prompts, places))
    return job.report(sets)


class _Asked(NamedTuple):
    """What a drawing amounts to; see `Setting.told` and `Setting.stages`."""

    digest: str  # the bundle's
    side: int
    about: dict[str, str]
    settings: list[dict[str, Any]]

    @property
    def name(self) -> str:
        """Of its folder; two bundles' names may be too long, or too like, for that."""
        parts = {**self.about, "bundle": self.digest[:12]} if "bundle" in self.about else self.about
        return "_".join(f"{key}-{value.replace('/', '-')}" for key, value in parts.items())

    @property
    def title(self) -> str:
        """Of its bar."""
        return ", ".join(f"{key} {value}" for key, value in self.about.items())


def _asked(pipe: Cascade, drawing: drawn.Drawing, stage: int | None) -> _Asked:
    """Raises a UserError where the bundle can't draw so."""
    bundle, way, said = drawing
    drawing_stage = pipe.stages[-1 if stage is None else enlarging(pipe.stages, stage)]
    digest = hashlib.sha256(Path(bundle, "cascade.json").read_bytes()).hexdigest()
    about = {**said, **way.told(pipe, stage)}
    return _Asked(digest, drawing_stage.config.resolution, about, way.stages(pipe, stage))


def _enlarged(job: Job, stage: int, side: int, places: Sequence[int]) -> drawn.Enlarged:
    """The source's pictures at those places, as large as a stage draws."""
    reader = Reader(job.data, job.order(job.data), side, strict=True)
    return drawn.Enlarged(stage, lambda i: reader(places[i]))


def score_folders(against: Against, folders: Sequence[str], *, num: int | None = None) -> str:
    """Compares folders of pictures that were made elsewhere.

    Args:
      folders: see `cascade.evaluation.pictures.Made`; all of one size, or `against.resolution` says
        at which to compare.
      num: pictures of each; None is all.

    Returns, Raises: as `score_drawings`.
    """
    job = Job(against, num)
    made = on_all_processes(lambda: [Made(folder) for folder in folders], job.mesh)
    side = on_all_processes(lambda: pictures.side(made, against.resolution), job.mesh)
    job.begin(side, pictures=[source.contents["digest"] for source in made])
    sets = []
    for i, (folder, source) in enumerate(zip(folders, made, strict=True)):
        held = {key: source.contents[key] for key in ("files", "bytes", "digest")}
        record = job.record(f"pictures-{i}", source=held)
        data = Data(source, held, max_broken_rate=0.0)
        most = min(num or len(source), len(source))
        if most < max(num or 0, LEAST):
            raise UserError(
                f"{folder!r} holds {len(source)} pictures, fewer than {max(num or 0, LEAST)}; "
                "give more."
            )
        reader = Reader(data, range(len(source)), job.resolution, strict=True)
        pictures.measure(record, reader, most, job.extractors, folder)
        prompts = [first_caption(data, j) for j in range(most)]
        prompts = prompts if all(prompts) else ()
        sets.append(scores.Scored({"folder": folder}, record, most, prompts))
    return job.report(sets)
