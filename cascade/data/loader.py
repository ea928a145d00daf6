"""The grain pipeline: records in a seeded order -> preprocessed pictures -> batches.

    positions ─► slice of this process ─► Order ─► Prepare (in workers) ─► Judge ─► Collate

Everything up to `Prepare` is a pure function of (seed, position), so an iterator's state is a
position, a resumed run continues with the very next batch, and workers change nothing but speed.
"""

import atexit
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np
from absl import flags
from grain.experimental import ThreadPrefetchIterDataset

from cascade.data.buckets import Bucketed
from cascade.data.decoded import decoded
from cascade.data.judge import PADDING, Fill, Judge, Skipped
from cascade.data.mixture import Mixture
from cascade.data.order import MixedOrder, Order
from cascade.data.preprocess import (
    CROPS,
    BrokenPicture,
    Filtered,
    PairCrop,
    Preprocess,
    colour,
)
from cascade.data.sources import SOURCES, captions_of, read_record
from cascade.errors import UserError
from cascade.registry import build

ENDLESS = 2**62
READY_BATCHES = 2


class Prepare(NamedTuple):
    """(position, generator) -> one prepared picture, or `Skipped`. Runs in the workers."""

    source: Any
    order: Order | MixedOrder
    preprocess: Preprocess | Bucketed | None  # None: the source's pictures are preprocessed already
    pair: PairCrop
    train: bool
    random_crop: bool

    def __call__(self, position: int, rng: np.random.Generator):
        """Reads, preprocesses and crops a record; its caption is drawn, or the first."""
        index = self.order(position)
        if index is None:
            return PADDING
        key = self.source.key(index)
        try:
            record = read_record(self.source, index)
            key, picture = record["key"], record["image"]
            if self.preprocess is not None:
                picture = self.preprocess(picture, rng if self.random_crop else None)
        except (BrokenPicture, Filtered) as reason:
            return Skipped(index, key, str(reason), isinstance(reason, BrokenPicture))
        choice = int(rng.integers(len(record["captions"]))) if self.train else 0
        offset = self.pair.offset(rng if self.train else None, picture.shape[:2])
        return {"caption": record["captions"][choice], **self.pair(picture, offset)}

    def blank(self) -> dict[str, Any]:
        """A black picture with some caption of the source."""
        side = self.pair.resolution
        black = self.pair(np.zeros((side, side, 3), np.uint8), (0, 0))
        caption = next(captions_of(self.source), None)
        if caption is None:
            raise UserError("No record of the evaluation source can be read; check its files.")
        return {"caption": caption, **black}


class SameData(grain.DatasetIterator):
    """An iterator whose state says which data it is a position in, and fits no other."""

    def __init__(self, batches: grain.DatasetIterator, held: dict[str, Any]):
        super().__init__(batches)
        self._batches, self._held = batches, held

    def __next__(self):
        return next(self._batches)

    def get_state(self) -> dict[str, Any]:
        """The position, and the data's contents."""
        return {"position": self._batches.get_state(), "data": self._held}

    def set_state(self, state: dict[str, Any]):
        """Goes to a position.

        Raises:
          UserError: the data isn't what it was when the state was taken.
        """
        then, now = state["data"], self._held
        if then != now:
            told = "{records} records in {files} files of {bytes} bytes (names and sizes {digest})"
            raise UserError(
                f"The training data changed under this run: it was {told.format(**then)} at the "
                f"checkpoint and is {told.format(**now)} now; put back what was there, or train "
                "in another --workdir."
            )
        self._batches.set_state(state["position"])


class Collate(NamedTuple):
    """Prepared pictures -> one batch of arrays, see `make_loader`."""

    texts: Callable[[list[str]], dict[str, np.ndarray]]

    def __call__(self, elements: Sequence[dict[str, Any]]) -> dict[str, np.ndarray]:
        """Stacks, scales to [-1, 1] and turns captions into arrays."""
        batch = dict(self.texts([element["caption"] for element in elements]))
        for name in ("image", "lowres"):
            if name in elements[0]:
                # As `images.to_float`, but means of pixels, in lowres, keep their fractions.
                pixels = np.empty((len(elements), *elements[0][name].shape), np.float32)
                for element, place in zip(elements, pixels, strict=True):
                    np.divide(element[name], np.float32(127.5), out=place)
                    place -= np.float32(1)
                batch[name] = pixels
        if "valid" in elements[0]:
            batch["valid"] = np.array([element["valid"] for element in elements])
        return batch


def make_source(section: Mapping[str, Any], *, train: bool):
    """Builds `section.source`, or `section.eval_source` if not `train`.

    Raises:
      UserError: a bad section, missing data, or a source without records.
    """
    chosen = section["source" if train else "eval_source"]
    source = build("data source", SOURCES, chosen)
    if len(source) == 0:
        raise UserError(f"The data source {chosen['name']!r} holds no record; {dict(chosen)}.")
    return source


def make_loader(
    section: Mapping[str, Any],
    *,
    resolution: int,
    lowres_resolution: int,
    crop_resolution: int,
    texts: Callable[[list[str]], dict[str, np.ndarray]],
    seed: int,
    batch_size: int,
    train: bool,
    source: Any = None,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.DatasetIterator:
    """An iterator over this process's batches; `get_state` and `set_state` save its position.

    Training goes on for ever, each pass in a new order; captions and crops are drawn anew at each
    visit. Evaluation is one pass in the source's order with first captions and centre crops; its
    last batch is padded, and "valid" [B] bool says which pictures count.

    A state fits a loader of the same section, sizes, batch and process count, and no other.

    Args:
      section: config.data.
      resolution: side of the whole pictures; with `crop_resolution` 0, of the batch's too.
      lowres_resolution: side of a super-resolution stage's input, 0 for none.
      crop_resolution: side of a super-resolution stage's training crops, 0 for whole pictures.
      texts: captions -> their arrays [B, ...] in a batch; stays in this process. See
        `EmbeddingCache.lookup` and `cascade.text.on_the_fly.Tokenized`.
      seed: decides order, captions and crops.
      batch_size: of one process.
      train: which source, and which of the two ways above.
      source: what `make_source` gave, to build it only once; None builds it here.
      process_index, process_count: process p takes every count-th record of the order, from p.

    Yields:
      {"image": [B, H, W, 3] float32 in [-1, 1], what `texts` gives, and in a super-resolution
      stage "lowres": [B, h, w, 3] float32 in [-1, 1]}.

    Raises:
      UserError: a bad section, missing data, sizes that don't divide, or (while iterating) too many
        broken records.
    """
    if section["crop"] not in CROPS:
        raise UserError(f"Unknown crop {section['crop']!r}; choose from {', '.join(CROPS)}.")
    random_crop = train and section["crop"] == "random"
    if source is None:
        source = make_source(section, train=train)
    _check_cache(section, source, random_crop)
    held = {"records": len(source), **source.contents}
    pair = PairCrop(resolution, lowres_resolution, crop_resolution).check()
    limits = (
        colour(section["ground"]),
        *(section["filter"][k] for k in ("min_side", "max_aspect")),
    )
    preprocess = Preprocess(resolution, *limits)
    if section["buckets"]:
        preprocess = Bucketed(section["buckets"], *limits).check(pair)
    if section["cache_decoded"] and source.folder is not None:
        source, preprocess = decoded(source, preprocess), None
    mixed = train and isinstance(source, Mixture)
    order = source.order(seed) if mixed else Order(len(source), seed if train else None)
    prepare = Prepare(source, order, preprocess, pair, train, random_crop)
    together = batch_size * process_count
    positions = ENDLESS if train else -(-len(source) // together) * together
    # The generator belongs to the position in the common order, so it comes before the slice.
    prepared = grain.MapDataset.range(positions).seed(seed).random_map(prepare)
    stream = _in_workers(prepared[process_index::process_count], section["workers"])
    judge = Judge(len(source), section["max_broken_rate"])
    stream = stream.filter(judge) if train else stream.map(Fill(prepare.blank(), judge))
    batches = stream.batch(batch_size, drop_remainder=True, batch_fn=Collate(texts))
    # A thread makes the next batches while a step runs; the state stays that of the last one given.
    ready = iter(ThreadPrefetchIterDataset(batches, prefetch_buffer_size=READY_BATCHES))
    loader = SameData(ready, held)
    atexit.register(_close, weakref.ref(loader))  # left to the interpreter's end, it would complain
    return loader


def _check_cache(section: Mapping[str, Any], source: Any, random_crop: bool):
    """Raises a UserError where pictures can't be cached as they are wanted."""
    if not section["cache_decoded"]:
        return
    if random_crop:
        raise UserError(
            "crop 'random' and cache_decoded contradict each other, since a cached picture is "
            "already cropped; set crop to 'centre' or cache_decoded to False."
        )
    if section["buckets"] or isinstance(source, Mixture):
        what = "pictures in buckets" if section["buckets"] else "the pictures of a mixture"
        raise UserError(
            f"cache_decoded can't keep {what}; set it to False, and prepare slow sources with "
            "`cascade data prepare`."
        )


def _in_workers(prepared: grain.MapDataset, workers: int) -> grain.IterDataset:
    """The data set as a stream, made in this process or in spawned ones; the order is the same."""
    stream = prepared.to_iter_dataset(grain.ReadOptions(num_threads=0))
    if workers == 0:
        return stream
    if not flags.FLAGS.is_parsed():  # grain reads its own flags, which only absl programs parse
        flags.FLAGS.mark_as_parsed()
    return stream.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))


def _close(loader: weakref.ref):
    """Stops a loader's threads and workers, if it still exists."""
    if loader() is not None:
        loader().close()
