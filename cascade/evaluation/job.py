"""An evaluation: real pictures, what of them is known, and the folder where all is written."""

import functools
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from cascade.arguments import whole
from cascade.data.preprocess import BrokenPicture
from cascade.errors import UserError
from cascade.evaluation import page, pictures, scores
from cascade.evaluation.composition import (
    add_composition,
    check_scenes,
    scenes_of,
    thumbnails,
)
from cascade.evaluation.features import efficientnet_lite0, fid_inception
from cascade.evaluation.pictures import SPLITS, Data, Reader, is_config, open_data
from cascade.evaluation.record import Record
from cascade.parallel.mesh import all_devices, on_all_processes, on_first_process
from cascade.parallel.processes import agree
from cascade.text.encoders import minilm

LEAST = 10  # pictures, of which anything can be said
READ = 128  # tokens of a caption, where it is compared with another


class Against(NamedTuple):
    """What pictures are compared with, and how.

    Attributes:
      source, split, overrides: see `open_data`.
      out: folder of the evaluation. Features go there as they come: a run with the same settings
        goes on there, and another number of pictures or another way to draw uses what is there.
      real: of the source's pictures, how many; None is all.
      among_all: known drawings, for retrieval and alignment, are those of both splits of a config.
      seed: of the drawing, and of the order in which the source is taken.
      resolution: side at which pictures are compared; None is that of the drawn ones.
      inception, inception_resize: also measure on Inception's features, see `fid_inception`.
      mesh: devices that draw and measure; None is all.
    """

    source: str
    out: str | os.PathLike
    split: str = "heldout"
    overrides: Sequence[str] = ()
    real: int | None = None
    among_all: bool = False
    seed: int = 0
    resolution: int | None = None
    inception: str = ""
    inception_resize: str = "antialiased"
    mesh: Mesh | None = None


class Job:
    """An evaluation: its data is open from the start, its real pictures measured by `begin`."""

    def __init__(self, against: Against, num: int | None):
        """Opens the data; nothing is written.

        Args:
          num: pictures of each set; None is as many as there are.

        Raises:
          UserError: numbers out of range, or no such data.
        """
        whole("--seed", against.seed, 0, 2**32 - 1)
        for option, number in (("--num", num), ("--real", against.real)):
            if number is not None:
                whole(option, number, LEAST)
        self.against, self.num, self.out = against, num, Path(against.out)
        self.mesh = against.mesh or all_devices()
        if against.among_all and not is_config(against.source):
            raise UserError("--among-all wants a config's two splits; name one as --source.")
        splits = SPLITS if against.among_all else (against.split,)
        opened = {
            split: on_all_processes(
                functools.partial(open_data, against.source, split, against.overrides), self.mesh
            )
            for split in sorted(splits, key=lambda split: split != against.split)
        }
        self.data, *self.others = opened.values()
        self.scenes = on_all_processes(lambda: scenes_of(self.data.source), self.mesh)

    def begin(self, side: int, least: int = 1, **asked: Any):
        """Measures the real pictures.

        Args:
          side: of the pictures that are scored.
          least: real pictures have at least this side, and at least what they are compared at.
          asked: what else all processes must agree on.

        Raises:
          UserError: a resolution that the pictures don't have, scenes of drawings that aren't
            known, too few pictures, or weights of Inception that can't be read.
        """
        against = self.against
        on_all_processes(functools.partial(check_scenes, self.scenes.values()), self.mesh)
        self.resolution = side if against.resolution is None else against.resolution
        whole("--resolution", self.resolution, 1, side)
        self.least = max(least, self.resolution)
        self.extractors = [efficientnet_lite0(self.mesh)]
        if against.inception:
            resize = against.inception_resize
            self.extractors.append(fid_inception(against.inception, self.mesh, resize))
        self.networks = tuple(self.extractors)
        if self.scenes:
            self.extractors.append(thumbnails(self.mesh))
        told = {"source": self.data.about, "seed": against.seed, "real": against.real}
        agree("request", {**told, "num": self.num, "resolution": self.resolution, **asked})
        self.real = self._measured(self.data, "real", against.real)
        self._known = [(self.data, self.real, against.real)]
        for data in self.others:
            self._known.append((data, self._measured(data, "real-other-split", None), None))

    def record(self, name: str, **settings: Any) -> Record:
        """A set's record, in a folder of that name."""
        networks = {extractor.name: extractor.fingerprint for extractor in self.extractors}
        common = {"resolution": self.resolution, "features": networks}
        return Record(self.out / name, {**settings, **common}, self.mesh)

    def order(self, data: Data) -> np.ndarray:
        """Numbers of records in the order in which they are taken: the first N are any N."""
        return np.random.default_rng(self.against.seed).permutation(len(data.source))

    def captions(self) -> Iterator[tuple[int, str]]:
        """Places in the order of the source, and the plainest captions there, over and over.

        Raises:
          UserError: no record has a caption that can be read.
        """
        told = True
        while told:
            told = False
            for place, number in enumerate(self.order(self.data)):
                caption = first_caption(self.data, int(number))
                if caption:
                    told = True
                    yield place, caption
        raise UserError("No record of the source has a caption to draw; give another --source.")

    def _measured(self, data: Data, name: str, most: int | None) -> Record:
        order, seed = self.order(data), self.against.seed
        larger = {"least": self.least} if self.least > self.resolution else {}
        record = self.record(name, source=data.about, seed=seed, **larger)
        reader = Reader(data, order, self.resolution, strict=False, least=self.least)
        found = pictures.measure(record, reader, most or len(order), self.extractors, name)
        if found < (most or LEAST):
            if found < LEAST:
                record.remove()  # another --resolution may do, which it would stand in the way of
            raise UserError(
                f"{found} of {len(order)} pictures of the source can be used at "
                f"{self.least}×{self.least}, fewer than {most or LEAST}; the others are "
                "smaller, too long or broken: compare at a smaller --resolution, or give more."
            )
        return record

    def known(self) -> scores.Known:
        """All measured pictures that have captions, with these; of the first process."""
        features, captions = [], []
        for data, record, most in self._known:
            rows = record.read(most)
            told = self.told(data, rows["place"])
            features.append(rows[self.extractors[0].name][[bool(text) for text in told]])
            captions += filter(None, told)
        return scores.Known(np.concatenate(features), captions)

    def told(self, data: Data, places: Iterable[int]) -> list[str]:
        """The plainest captions of records by their places in the order; "" without one."""
        order = self.order(data)
        return [first_caption(data, int(order[place])) for place in places]

    def report(self, sets: Sequence[scores.Scored]) -> str:
        """Scores sets and writes metrics.json, metrics.md, sheet.png and report.html.

        A row a set first, then one of real pictures, half of them compared with the others; and of
        a source of scenes two more, of real scenes with their own captions and with others'.

        Returns:
          The metrics as a Markdown table, and notes; "" but on the first process.

        Raises:
          UserError: too few pictures in a set, or files that can't be written.
        """
        written = []

        def write():
            real = self.real.read(self.against.real)
            references = [scores.Reference(real[e.name], e.name) for e in self.networks]
            encoder = minilm(max_length=READ, weights="")
            rows, notes = scores.score(sets, references, self.known(), encoder)
            if self.scenes:
                captions = self.told(self.data, real["place"])
                add_composition(rows, sets, self.scenes, real["thumbnail"], captions)
            about = {
                "source": self.against.source,
                "split": self.against.split,
                "seed": self.against.seed,
                "resolution": self.resolution,
            }
            written.append(page.write(self.out, rows, notes, sets, self.real, about))

        on_first_process(write, self.mesh)
        return "".join(written)


def first_caption(data: Data, number: int) -> str:
    """The plainest caption of a record, "" where none can be read."""
    with suppress(BrokenPicture):
        return next(iter(data.source.captions(number)), "").strip()
    return ""
