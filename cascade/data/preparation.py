"""`cascade data prepare`: any source -> shards that training reads fast, on Apache Beam.

    ranges of the source ─► parts: refined records, and beside them their looks and numbers
    looks of all parts ─► bands ─► later duplicates ─► by part ─► shards ─► statistics

Part and shard k come from records k·n … (k+1)·n - 1 of the source and from nothing else but the
list of duplicates, so what is written depends neither on the runner nor on the order of its work.
Every file is written under a temporary name and renamed: a run that is stopped goes on from the
parts and shards that are whole, and a finished one is left alone.
"""

import collections
import contextlib
import json
import logging
import shutil
import threading
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import apache_beam as beam
import numpy as np
from apache_beam.options.pipeline_options import PipelineOptions
from tqdm import tqdm

from cascade import config as configs
from cascade.data.duplicates import Look, bands, later_duplicates
from cascade.data.preprocess import BrokenPicture, Filtered, colour
from cascade.data.record_files import read_file, to_example, write_file
from cascade.data.refine import reason_of, refine
from cascade.data.sources import SOURCES
from cascade.data.statistics import histograms, write_statistics
from cascade.errors import UserError
from cascade.files import write_whole
from cascade.registry import build
from cascade.text.encoders import ENCODERS

# Beam's own runner on this machine; what it calls DirectRunner may first fetch a program.
RUNNER = "--runner=FnApiRunner"
# What may differ between runs that go on with one another's work.
FREE = ("max_broken_rate", "samples")
PARTS = ".parts"
EXAMPLES = 3  # records named for each reason


def prepare(config, out: str | Path, flags: Sequence[str] = ()) -> dict:
    """Writes `out/pictures-*.array_record`, statistics.json and statistics.html.

    Args:
      config: a config of `cascade.schema.PREPARATION`, checked.
      out: the folder; an unfinished one of the same config and data is completed, a finished one
        is returned as it is. All of the runner's workers must see it, and the source, as a folder.
      flags: Beam's own, "--runner=FlinkRunner", "--direct_num_workers=8", ….

    Returns:
      The statistics.

    Raises:
      UserError: bad data, too many broken records, or a folder that holds something else.
    """
    settings, folder = configs.to_json(config), Path(out).absolute()
    colour(settings["picture"]["ground"])
    source = build("data source", SOURCES, config.source)
    if len(source) == 0:
        raise UserError(f"The data source {config.source.name!r} holds no record.")
    count = -(-len(source) // settings["shard_records"])
    work = Work(settings, str(folder), count)
    try:
        finished = _claim(folder, settings, source.fingerprint)
        if finished:
            return finished
        _run(work, flags)
        told = write_statistics(folder, work.summaries(), settings)
        shutil.rmtree(folder / PARTS)
        return told
    except OSError as error:
        raise UserError(f"Cannot write to {folder}: {error}; choose another --out.") from error


def _claim(folder: Path, settings: Mapping, fingerprint: str) -> dict | None:
    """Marks the folder as this preparation's, or gives the statistics if all is done."""
    mine = {key: value for key, value in settings.items() if key not in FREE}
    mark = {"settings": mine, "source": fingerprint}
    path, done = folder / "preparation.json", folder / "statistics.json"
    if not path.exists():
        if folder.exists() and any(folder.iterdir()):
            raise UserError(f"{folder} holds other files; give a new folder's name.")
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(mark, indent=2))
    if json.loads(path.read_text()) != mark:
        raise UserError(
            f"{folder} holds a preparation with other settings or of data that has changed; "
            "choose another --out or remove it."
        )
    if done.exists():
        return json.loads(done.read_text())
    for stale in folder.glob(".pictures-*.tmp"):  # of a run that was killed
        stale.unlink()
    (folder / PARTS).mkdir(exist_ok=True)
    return None


def _run(work: "Work", flags: Sequence[str]):
    """The two pipelines. The second begins once all is known of how many records are broken."""
    logging.getLogger("apache_beam").setLevel(logging.WARNING)
    options = PipelineOptions([RUNNER, *flags])  # of two runners, the last counts
    numbers = list(range(work.count))
    with work.watched("part", "refine"), beam.Pipeline(options=options) as pipeline:
        _ = (
            pipeline
            | "parts" >> beam.Create(numbers)
            | "spread" >> beam.Reshuffle()
            | "refine" >> beam.ParDo(MakePart(work))
        )
    work.check_broken()
    with work.watched("shard", "write"), beam.Pipeline(options=options) as pipeline:
        parts = pipeline | "parts" >> beam.Create(numbers) | "spread" >> beam.Reshuffle()
        most = work.settings["filter"]["duplicate_bits"]
        dropped = (
            parts
            | "looks" >> beam.FlatMap(work.banded_looks)
            | "same band" >> beam.GroupByKey()
            | "duplicates" >> beam.FlatMap(_later_in_band, most)
            | "to parts" >> beam.Map(work.of_part)
        )
        _ = (
            {"kept": parts | beam.Map(lambda number: (number, None)), "dropped": dropped}
            | "by part" >> beam.CoGroupByKey()
            | "shards" >> beam.MapTuple(work.write_shard)
        )


def _later_in_band(group: tuple, most: int) -> list[int]:
    return later_duplicates([(index, Look(*look)) for index, look in group[1]], most)


class MakePart(beam.DoFn):
    """Refines one range of the source into a part, unless that is there already."""

    def __init__(self, work: "Work"):
        self._work = work

    def setup(self):
        """Opens the source and the tokenizer, once a worker."""
        settings = configs.from_json(self._work.settings)
        self._source = build("data source", SOURCES, settings.source)
        self._encoder = build("text encoder", ENCODERS, settings.text)

    def process(self, number: int):
        """Writes part `number`."""
        work = self._work
        if work.path("part", number, "json").exists():
            return
        size, columns = work.settings["shard_records"], collections.defaultdict(list)
        reasons = collections.defaultdict(lambda: {"count": 0, "examples": []})
        indices = range(number * size, min((number + 1) * size, len(self._source)))

        def examples() -> Iterator[bytes]:
            for index in indices:
                try:
                    refined = refine(self._source, index, self._encoder, work.settings)
                except (BrokenPicture, Filtered) as error:
                    kind = "broken" if isinstance(error, BrokenPicture) else "filtered"
                    told = reasons[f"{kind}: {reason_of(error)}"]
                    told["count"] += 1
                    told["examples"] = [*told["examples"], self._source.key(index)][:EXAMPLES]
                    continue
                numbers = {"index": index, "bits": refined.look.bits, **refined.numbers}
                for name, value in numbers.items():
                    columns[name].append(value)
                columns["thumb"].append(np.frombuffer(refined.look.thumb, np.uint8))
                yield to_example(refined.example)

        write_file(work.path("part", number, "array_record"), examples())
        arrays = {name: _column(name, values) for name, values in columns.items()}
        temporary = work.path("part", number, f"{uuid.uuid4().hex}.tmp")
        with open(temporary, "wb") as file:
            np.savez(file, **arrays)
        temporary.replace(work.path("part", number, "npz"))
        summary = {"read": len(indices), "reasons": reasons}
        write_whole(work.path("part", number, "json"), json.dumps(summary))


def _column(name: str, values: list) -> np.ndarray:
    return np.array(values, {"bits": np.uint64, "thumb": np.uint8}.get(name, np.int64))


class Work:
    """Where a preparation's files lie, and what is done with them, a part at a time."""

    def __init__(self, settings: dict, folder: str, count: int):
        self.settings, self.folder, self.count = settings, folder, count

    def path(self, kind: str, number: int, suffix: str) -> Path:
        """A file of part or shard `number` in the folder of what is unfinished."""
        return Path(self.folder) / PARTS / f"{kind}-{number:05d}.{suffix}"

    def shard(self, number: int) -> Path:
        """A finished shard."""
        return Path(self.folder) / f"pictures-{number:05d}-of-{self.count:05d}.array_record"

    @contextlib.contextmanager
    def watched(self, kind: str, doing: str) -> Iterator[None]:
        """A progress bar that counts finished parts or shards, whichever machine makes them."""
        done = threading.Event()

        def watch(bar: tqdm):
            while not done.wait(1):
                bar.update(len(list((Path(self.folder) / PARTS).glob(f"{kind}-*.json"))) - bar.n)

        with tqdm(total=self.count, desc=doing, unit=kind, disable=None, delay=5) as bar:
            watcher = threading.Thread(target=watch, args=(bar,))
            watcher.start()
            try:
                yield
            finally:
                done.set()
                watcher.join()

    def of_part(self, index: int) -> tuple[int, int]:
        """(part, index) of the source's record `index`."""
        return index // self.settings["shard_records"], index

    def columns(self, number: int) -> dict[str, np.ndarray]:
        """What is known of a part's records, an array [N, ...] each."""
        with np.load(self.path("part", number, "npz")) as file:
            return dict(file)

    def banded_looks(self, number: int) -> Iterator[tuple[tuple, tuple]]:
        """(band, (index, look)) of each record, once for each band."""
        most, columns = self.settings["filter"]["duplicate_bits"], self.columns(number)
        if most < 0 or not columns:
            return
        for index, bits, thumb in zip(
            columns["index"].tolist(), columns["bits"].tolist(), columns["thumb"], strict=True
        ):
            for band in bands(bits, most):
                yield band, (index, (bits, thumb.tobytes()))

    def write_shard(self, number: int, grouped: Mapping):
        """Copies a part without its duplicates, unless that is done; leaves a summary beside it."""
        summary = self.path("shard", number, "json")
        if summary.exists():
            return
        columns, dropped = self.columns(number), set(grouped["dropped"])
        indices = columns["index"].tolist() if columns else []
        keep = np.array([index not in dropped for index in indices], bool)
        part = self.path("part", number, "array_record")
        if keep.any():
            examples = (e for e, kept in zip(read_file(part), keep, strict=True) if kept)
            write_file(self.shard(number), examples)
        kept = {name: values[keep] for name, values in columns.items()}
        told = {"kept": int(keep.sum()), "duplicates": len(dropped), "histograms": histograms(kept)}
        write_whole(summary, json.dumps(told))
        part.unlink(missing_ok=True)

    def summaries(self) -> Iterator[dict]:
        """Each part's and its shard's counts, together."""
        for number in range(self.count):
            both = (self.path(kind, number, "json").read_text() for kind in ("part", "shard"))
            yield {key: value for text in both for key, value in json.loads(text).items()}

    def check_broken(self):
        """Raises a UserError if more of the source is broken than `max_broken_rate` allows."""
        read, broken = 0, collections.Counter()
        examples = {}
        for number in range(self.count):
            summary = json.loads(self.path("part", number, "json").read_text())
            read += summary["read"]
            for reason, told in summary["reasons"].items():
                if reason.startswith("broken: "):
                    broken[reason] += told["count"]
                    examples.setdefault(reason, told["examples"][0])
        rate = self.settings["max_broken_rate"]
        if broken.total() > rate * read:
            (reason, count), *_ = broken.most_common(1)
            raise UserError(
                f"{broken.total()} of {read} records are broken, more than max_broken_rate {rate}; "
                f"{count} of them {reason.removeprefix('broken: ')!r}, like "
                f"{examples[reason]!r}: repair them or raise the rate, and run the command again."
            )
