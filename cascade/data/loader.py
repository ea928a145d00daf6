"""The grain pipeline: records in a seeded order -> preprocessed pictures -> batches.

    positions ─► this process's share ─► Order ─► Prepare (in workers) ─► Judge ─► Collate

Everything up to `Prepare` is a pure function of (seed, position), so an iterator's state is a
position, a resumed run continues with the very next batch, and workers change nothing but speed.
Global batch k is the positions from k·B to (k + 1)·B in their order, whoever loads which part of
it: the number of processes changes nothing but speed either.
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
from cascade.data.fingerprint import first_change
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
# Keeps a picture's draws apart from an order's, which come from (seed, pass) or (seed, block).
OF_A_PICTURE = 1


class Share(NamedTuple):
    """Which part of each global batch a process loads: the index-th of `count` equal blocks."""

    index: int
    count: int
    size: int  # of one block

    def position(self, place: int) -> int:
        """The place-th picture of this process -> its position in the common order."""
        batch, row = divmod(place, self.size)
        return (batch * self.count + self.index) * self.size + row

    def place(self, position: int) -> int:
        """The way back, of a position in this share."""
        batch, row = divmod(position, self.count * self.size)
        return batch * self.size + row - self.index * self.size


class Prepare(NamedTuple):
    """Place in a share -> one prepared picture, or `Skipped`. Runs in the workers."""

    source: Any
    order: Order | MixedOrder
    preprocess: Preprocess | Bucketed | None  # None: the source's pictures are preprocessed already
    pair: PairCrop
    train: bool
    random_crop: bool
    mirror: float
    seed: int
    share: Share

    def __call__(self, place: int):
        """Reads, preprocesses, crops and mirrors a record; its caption is drawn, or the first."""
        position = self.share.position(place)
        rng = np.random.default_rng([self.seed, position, OF_A_PICTURE])
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
        caption = record["captions"][choice]
        cut = self.pair(picture, offset)
        # Drawn last, so that what is drawn before doesn't depend on whether any are mirrored.
        if self.train and rng.random() < self.mirror:
            cut = {name: np.ascontiguousarray(pixels[:, ::-1]) for name, pixels in cut.items()}
        return {"caption": caption, "position": position, **cut}

    def blank(self) -> dict[str, Any]:
        """A black picture with some caption of the source."""
        side = self.pair.resolution
        black = self.pair(np.zeros((side, side, 3), np.uint8), (0, 0))
        caption = next(captions_of(self.source), None)
        if caption is None:
            raise UserError("No record of the evaluation source can be read; check its files.")
        return {"caption": caption, "position": -1, **black}


class Position(grain.DatasetIterator):
    """An iterator over batches whose state is a position in the common order of certain data.

    Args:
      begin: a place in the share -> the stream of (next position, batch) from there on.
      share: this process's.
      held: what tells the data from other data.
    """

    def __init__(self, begin: Callable[[int], grain.DatasetIterator], share: Share, held: dict):
        self._begin, self._share, self._held = begin, share, held
        self._next = share.position(0)
        super().__init__()
        self._batches = begin(0)

    def __next__(self):
        self._next, batch = next(self._batches)
        return batch

    def get_state(self) -> dict[str, Any]:
        """The position of the next picture, in which share, and the data's contents."""
        share = {"index": self._share.index, "count": self._share.count}
        return {"position": self._next, "share": share, "data": self._held}

    def set_state(self, state: dict[str, Any] | Sequence[dict[str, Any]]):
        """Goes to a position.

        A state of the same share is taken up with the very next picture. Among those of other
        shares, since a batch is the same whoever loads it, this goes on after the last batch that
        all of them have finished. They have finished equally many unless pictures were skipped:
        then a few that some had met already come once more, rather than never.

        Args:
          state: what `get_state` gave, or the list of what it gave on all processes.

        Raises:
          UserError: the data isn't what it was when the state was taken.
        """
        states = [state] if isinstance(state, dict) else state
        for then in states:
            self._check_same(then["data"])
        mine = {"index": self._share.index, "count": self._share.count}
        for then in states:
            if then["share"] == mine:
                self._next = then["position"]
                break
        else:
            together = self._share.count * self._share.size
            batches = min(then["position"] // together for then in states)
            self._next = self._share.position(batches * self._share.size)
        self._batches.close()
        self._batches = self._begin(self._share.place(self._next))

    def start_prefetch(self):
        """Begins to make the next batches; see `grain.DatasetIterator`."""
        self._batches.start_prefetch()

    def close(self):
        """Stops the threads and workers that make batches."""
        self._batches.close()
        super().close()

    def _check_same(self, then: dict[str, Any]):
        if then != self._held:
            told = "{records} records in {files} files of {bytes} bytes (digest {digest})"
            named = first_change(then.get("listing", {}), self._held["listing"])
            raise UserError(
                f"The training data changed under this run{named and ': '}{named}. It was "
                f"{told.format(**then)} at the checkpoint and is {told.format(**self._held)} now; "
                "put back what was there, or train in another --workdir."
            )


class Collate(NamedTuple):
    """Prepared pictures -> one batch of arrays, see `make_loader`."""

    texts: Callable[[list[str]], dict[str, np.ndarray]]
    share: Share

    def __call__(self, elements: Sequence[dict[str, Any]]) -> tuple[int, dict[str, np.ndarray]]:
        """Stacks, scales to [-1, 1] and turns captions into arrays; says what comes next."""
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
        following = self.share.position(self.share.place(elements[-1]["position"]) + 1)
        return following, batch


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

    Training goes on for ever, each pass in a new order; captions, crops and which pictures are
    mirrored, left for right, are drawn anew at each visit. Evaluation is one pass in the source's
    order with first captions and centre crops, and mirrors none; its last batch is padded, and
    "valid" [B] bool says which pictures count.

    A state fits a loader of the same section, sizes and global batch, and no other; of how many
    processes is all the same, see `Position.set_state`.

    Args:
      section: config.data.
      resolution: side of the whole pictures; with `crop_resolution` 0, of the batch's too.
      lowres_resolution: side of a super-resolution stage's input, 0 for none.
      crop_resolution: side of a super-resolution stage's training crops, 0 for whole pictures.
      texts: captions -> their arrays [B, ...] in a batch; stays in this process. See
        `EmbeddingCache.lookup` and `cascade.text.on_the_fly.Tokenized`.
      seed: decides order, captions, crops and mirroring.
      batch_size: of one process: of a global batch it loads the process_index-th block.
      train: which source, and which of the two ways above.
      source: what `make_source` gave, to build it only once; None builds it here.
      process_index, process_count: among those that load different blocks.

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
    limits = {"ground": colour(section["ground"]), **section["filter"]}
    preprocess = Preprocess(resolution, **limits)
    if section["buckets"]:
        preprocess = Bucketed(section["buckets"], **limits).check(pair)
    if section["cache_decoded"] and source.folder is not None:
        source, preprocess = decoded(source, preprocess), None
    mixed = train and isinstance(source, Mixture)
    order = source.order(seed) if mixed else Order(len(source), seed if train else None)
    share = Share(process_index, process_count, batch_size)
    chances = {"random_crop": random_crop, "mirror": section["mirror"], "seed": seed}
    prepare = Prepare(source, order, preprocess, pair, train, share=share, **chances)
    places = ENDLESS if train else -(-len(source) // (batch_size * process_count)) * batch_size
    judge = Judge(len(source), section["max_broken_rate"])
    fill = None if train else Fill(prepare.blank(), judge)

    def begin(place: int) -> grain.DatasetIterator:
        prepared = grain.MapDataset.range(place, places).map(prepare)
        stream = _in_workers(prepared, section["workers"])
        stream = stream.filter(judge) if train else stream.map(fill)
        batches = stream.batch(batch_size, drop_remainder=True, batch_fn=Collate(texts, share))
        # A thread makes the next batches while a step runs.
        return iter(ThreadPrefetchIterDataset(batches, prefetch_buffer_size=READY_BATCHES))

    loader = Position(begin, share, held)
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
