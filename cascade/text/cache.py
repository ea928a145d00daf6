"""Embeddings of a data set's captions, computed once and kept on disk.

A cache is a folder, `<folder>/<start of the encoder's fingerprint>-<dtype>`, of segments
(`cascade.text.segment`), each complete in itself. A segment appears by a rename, whole or not at
all, under a name made from its keys. So a killed run loses at most the segment it was at, a cache
grows by adding segments, and processes that build one cache together need no lock: at worst they
compute the same segment twice and rename it to the same name.

Damage is found where it lies: in a segment's index when the cache is opened, in a caption's states
when they are looked up, anywhere by `verify`. A damaged segment is made again, never used.
"""

import copy
import logging
import math
from collections.abc import Iterable, Sequence
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from safetensors import SafetensorError
from tqdm import tqdm

from cascade.errors import UserError
from cascade.parallel.mesh import on_first_process
from cascade.text import segment as segments
from cascade.text.interface import TextEncoder, checked_text, shortened
from cascade.text.segment import DTYPES, Segment

log = logging.getLogger(__name__)

NAME = "captions-{}.safetensors"
TINY = np.finfo(np.float64).tiny
# What a killed run may have to compute again, and what is held in memory until it is written.
SEGMENT = 4096  # captions
SEGMENT_BYTES = 2**30  # if all of them were as long as they may be


class Added(NamedTuple):
    """What `EmbeddingCache.ensure` stored: how many captions, how many were cut, how well.

    `error` is ‖stored − float32‖ / ‖float32‖ over all their states; 0 where there are none.
    """

    captions: int = 0
    truncated: int = 0
    error: float = 0.0


class EmbeddingCache:
    """Text embeddings by caption, read from memory-mapped files.

    Opening it reads no states, and a pickled copy opens the files anew, so it can be handed to data
    loading processes.

    Args:
      folder: may hold the caches of many encoders: each has a folder of its own in it, named by the
        start of the encoder's fingerprint and the dtype.
      encoder: made, or will make, what is in it.
      dtype: how states are stored, a key of `cascade.text.segment.DTYPES`.

    Attributes:
      folder: the encoder's and the dtype's own.

    Raises:
      UserError: the encoder's folder holds what another made, or can't be read.
    """

    def __init__(self, folder: str | Path, encoder: TextEncoder, dtype: str):
        self._parent, self._encoder = Path(folder), encoder
        self.folder = self._parent / f"{encoder.fingerprint[:16]}-{dtype}"
        self._origin = {
            "made_by": f"{encoder.name} with max_length {encoder.max_length}",
            "fingerprint": encoder.fingerprint,
            "dtype": dtype,
        }
        self._damaged = []
        self._open()

    def __len__(self) -> int:
        """How many captions can be looked up."""
        return len(self._places)

    def __contains__(self, caption: str) -> bool:
        """Whether the caption can be looked up."""
        return self._find(caption) is not None

    def __reduce__(self):
        """Pickles as a folder and an encoder, both cheap; files are mapped where it is loaded."""
        return EmbeddingCache, (self._parent, self._encoder, self._origin["dtype"])

    @property
    def tokens(self) -> int:
        """How many states are stored."""
        return sum(segment.tokens for segment in self._segments)

    @property
    def bytes(self) -> int:
        """What the segments take on disk."""
        return sum(segment.path.stat().st_size for segment in self._segments)

    def lookup(self, captions: Sequence[str]) -> dict[str, np.ndarray]:
        """The captions' text_emb [B, L, D] float32, zero at padding, and text_mask [B, L] bool.

        Raises:
          UserError: nobody has embedded one of them yet, or its states are damaged.
        """
        length = self._encoder.max_length
        emb = np.zeros((len(captions), length, self._encoder.width), np.float32)
        mask = np.zeros((len(captions), length), bool)
        for row, caption in enumerate(captions):
            states = self._read(caption)
            emb[row, : len(states)], mask[row, : len(states)] = states, True
        return {"text_emb": emb, "text_mask": mask}

    def ensure(
        self, captions: Iterable[str], mesh: Mesh | None = None, *, progress: bool = True
    ) -> Added:
        """Embeds the captions that are missing, a segment at a time, and stores each segment.

        Args:
          captions: all that will be looked up.
          mesh: where to embed them. All processes of a mesh call this together, with the same
            captions; the first one writes, and all read.

        Raises:
          UserError: a caption is no valid text, the encoder's states don't fit the dtype, or the
            folder can't be written, or not seen by all processes.
        """
        self._open()
        missing = self._missing(captions, mesh)
        if not missing:
            return Added()
        self._tell_siblings(len(missing))
        worker = copy.copy(self._encoder)  # the weights that it loads leave the devices with it
        if mesh is not None:
            worker.place(mesh)
        state_bytes = DTYPES[self._origin["dtype"]][0].itemsize * worker.width
        together = max(1, min(SEGMENT, SEGMENT_BYTES // (worker.max_length * state_bytes)))
        truncated, squares = 0, np.zeros(2)
        try:
            on_first_process(self._make_room, mesh)
            with tqdm(
                total=len(missing), desc="Embedding captions", unit="caption", disable=not progress
            ) as bar:
                for start in range(0, len(missing), together):
                    part = missing[start : start + together]
                    cut, difference = self._add(worker, part, mesh, bar)
                    truncated, squares = truncated + cut, squares + difference
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"Cannot write the embedding cache {str(self.folder)!r} ({error}); make room or"
                " choose another folder."
            ) from error
        if truncated:
            log.warning(
                "%d of %d captions are longer than the %d tokens that %s reads; their ends are"
                " cut off.",
                truncated,
                len(missing),
                worker.max_length,
                worker.name,
            )
        self._open()
        if not all(caption in self for caption in missing):
            raise UserError(
                f"Process {jax.process_index()} doesn't find what process 0 wrote to the embedding"
                f" cache {str(self.folder)!r}; choose a folder that all processes share, or"
                " config.text_cache.folder='' to encode captions as they are needed."
            )
        return Added(len(missing), truncated, math.sqrt(squares[0] / max(squares[1], TINY)))

    def verify(self, mesh: Mesh | None = None, *, progress: bool = True):
        """Reads every caption's states, and removes the segments where one is damaged.

        Args:
          mesh: all of its processes call this together, and the first one reads.
        """
        on_first_process(partial(self._remove_damaged, progress), mesh)
        self._open()

    def _make_room(self):
        """Makes the folder, and removes from it what was found damaged."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for path, seen in self._damaged:
            segments.remove(path, seen)

    def _remove_damaged(self, progress: bool):
        bar = tqdm(
            self._segments, "Verifying the embedding cache", unit="segment", disable=not progress
        )
        for segment in bar:
            try:
                segment.verify()
            except (SafetensorError, ValueError) as error:
                log.warning("%s is damaged (%s); it is removed.", segment.path, error)
                self._remove(segment)

    def _missing(self, captions: Iterable[str], mesh: Mesh | None) -> list[str]:
        """The captions that aren't there, each once; every process of a mesh gives the same."""
        distinct = list(dict.fromkeys(map(checked_text, captions)))
        wanted = np.array([caption not in self for caption in distinct], bool)
        if mesh is not None and jax.process_count() > 1:
            wanted = multihost_utils.broadcast_one_to_all(wanted)
        return [distinct[i] for i in np.flatnonzero(wanted)]

    def _tell_siblings(self, missing: int):
        """Warns where the captions may have been embedded already, as something else."""
        start = self._encoder.fingerprint[:16]
        for path in sorted(self._parent.glob(f"{start}*")):
            if path.name == start:
                log.warning("%s is of an earlier version and isn't read; delete it.", path)
            elif path != self.folder:
                log.warning(
                    "%d captions aren't stored as %s; set config.text_cache.dtype to %r to use"
                    " what is in %s instead.",
                    missing,
                    self._origin["dtype"],
                    path.name[len(start) + 1 :],
                    path,
                )

    def _add(
        self, worker: TextEncoder, captions: list[str], mesh: Mesh | None, bar: tqdm
    ) -> tuple[int, np.ndarray]:
        """Embeds captions and stores them as one segment.

        Returns:
          How many were cut; and (‖stored − float32‖², ‖float32‖²) of their states.
        """
        tokens, dtype = worker.tokenize(captions), self._origin["dtype"]
        starts = np.append(0, worker.text_mask(tokens.mask).sum(axis=1).cumsum()).astype(np.int64)
        one = segments.rounded(np.zeros((1, worker.width), np.float32), dtype)
        stored = {k: np.empty((starts[-1], *v.shape[1:]), v.dtype) for k, v in one.items()}
        squares = np.zeros(2)
        for rows, batch in worker.embed_in_batches(tokens, mesh):
            for row, emb in zip(rows, batch, strict=True):
                start, stop = starts[row : row + 2]
                states = emb[: stop - start]
                kept = segments.rounded(states, dtype)
                squares += [
                    (part**2).sum() for part in (segments.restored(**kept) - states, states)
                ]
                for name, part in kept.items():
                    stored[name][start:stop] = part
            bar.update(len(rows))
        keys = np.stack([_key(caption) for caption in captions])
        path = self.folder / NAME.format(blake2b(keys.tobytes(), digest_size=16).hexdigest())
        write = partial(segments.write, path, self._origin, keys, starts, stored)
        on_first_process(write, mesh)
        return int(tokens.truncated.sum()), squares

    def _open(self):
        """Maps every segment and sorts their keys; damaged segments are remembered, not read."""
        told, self._segments, self._damaged = self._damaged, [], []
        keys, places = [np.zeros((0, 2), np.uint64)], [np.zeros((0, 2), np.int64)]
        for path in sorted(self.folder.glob(NAME.format("[0-9a-f]" * 32))):
            try:
                seen = segments.identity(path)
                segment = Segment(path)
            except FileNotFoundError:
                continue  # another process found it damaged, and will make it again
            except (SafetensorError, ValueError) as error:
                if (path, seen) not in told:
                    log.warning("%s is damaged (%s); embed its captions again.", path, error)
                self._damaged.append((path, seen))
                continue
            except OSError as error:
                raise UserError(
                    f"Cannot read the embedding cache {str(self.folder)!r} ({error}); mend its"
                    " permissions or choose another folder."
                ) from error
            _check_origin(self.folder, segment.origin, self._origin)
            number = np.full(len(segment), len(self._segments))
            places.append(np.stack([number, np.arange(len(segment))], axis=1))
            keys.append(segment.keys)
            self._segments.append(segment)
        high, low = np.concatenate(keys).T
        order = np.lexsort((low, high))
        high, low = high[order], low[order]
        # Two processes that embedded the same captions left them twice; keep the first.
        new = np.append(True, (high[1:] != high[:-1]) | (low[1:] != low[:-1]))[: len(order)]
        self._high, self._low = high[new], low[new]
        self._places = np.concatenate(places)[order][new]

    def _find(self, caption: str) -> tuple[int, int] | None:
        """(segment, its n-th caption) of the caption's states, or None."""
        high, low = _key(caption)
        i = np.searchsorted(self._high, high)
        while i < len(self._high) and self._high[i] == high:
            if self._low[i] == low:
                return tuple(self._places[i])
            i += 1
        return None

    def _read(self, caption: str) -> np.ndarray:
        """The caption's states [l, D] float32; raises as `lookup` does."""
        place = self._find(caption)
        if place is None:
            self._open()  # another process may have added segments since
            place = self._find(caption)
        if place is None:
            raise UserError(
                f"The caption {shortened(caption)} is not in the embedding cache"
                f" {str(self.folder)!r}; embed the data set's captions before reading them."
            )
        segment = self._segments[place[0]]
        try:
            return segment.read(place[1])
        except (SafetensorError, ValueError) as error:
            self._remove(segment)
            raise UserError(
                f"{str(segment.path)!r} was damaged ({error}) and is removed; start again, which"
                " embeds its captions again."
            ) from error

    def _remove(self, segment: Segment):
        """Deletes a damaged segment."""
        try:
            segments.remove(segment.path, segment.identity)
        except OSError as error:
            raise UserError(
                f"{str(segment.path)!r} is damaged and can't be removed ({error.strerror}); remove"
                " it and start again."
            ) from error


def _check_origin(folder: Path, found: dict[str, str], wanted: dict[str, str]):
    """Raises UserError where another encoder made what was found."""
    if found != wanted:
        theirs, ours = (
            f"{origin['made_by']} as {origin['dtype']} (fingerprint {origin['fingerprint'][:8]})"
            for origin in (found, wanted)
        )
        raise UserError(
            f"The embedding cache {str(folder)!r} was made by {theirs}, not by {ours}; delete"
            " it to embed the captions again."
        )


def _key(caption: str) -> np.ndarray:
    """blake2b of the caption's UTF-8, 128 bits as [2] uint64."""
    return np.frombuffer(blake2b(caption.encode(), digest_size=16).digest(), "<u8")
