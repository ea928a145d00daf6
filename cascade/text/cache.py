"""Embeddings of a data set's captions, computed once and kept on disk.

A cache is a folder, `<folder>/<start of the encoder's fingerprint>`, of segments,
`captions-<digest>.safetensors`, each complete in itself:

    states [T, D] float16   the states of all captions, one after another, without padding
    starts [N + 1] int64    caption i owns states[starts[i] : starts[i + 1]]
    keys   [N, 2] uint64    128 bits of blake2b of each caption's UTF-8

with the encoder's fingerprint in the header. A segment appears by a rename, whole or not at all,
under a name made from its keys. So a killed run loses at most the segment it was at, a cache grows
by adding segments, and processes that build one cache together need no lock: at worst they compute
the same segment twice and rename it to the same name.
"""

import logging
import os
import uuid
from collections.abc import Iterable
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from tqdm import tqdm

from cascade.errors import UserError
from cascade.text.interface import TextEncoder, checked_text, shortened

log = logging.getLogger(__name__)

NAME = "captions-{}.safetensors"
SEGMENT = 4096  # captions; what a killed run may have to compute again


class EmbeddingCache:
    """Text embeddings by caption, read from memory-mapped files.

    Opening it reads no states, and a pickled copy opens the files anew, so it can be handed to data
    loading processes.

    Args:
      folder: may hold the caches of many encoders: each has a folder of its own in it, named by the
        start of the encoder's fingerprint.
      encoder: makes what is missing.

    Raises:
      UserError: the encoder's folder holds what another made, or can't be read.
    """

    def __init__(self, folder: str | Path, encoder: TextEncoder):
        self._parent = Path(folder)
        self._folder = self._parent / encoder.fingerprint[:16]
        self._encoder = encoder
        self._open()

    def __len__(self) -> int:
        """How many captions can be looked up."""
        return len(self._places)

    def __contains__(self, caption: str) -> bool:
        """Whether the caption can be looked up."""
        return self._find(caption) is not None

    def __reduce__(self):
        """Pickles as a folder and an encoder, both cheap; files are mapped where it is loaded."""
        return EmbeddingCache, (self._parent, self._encoder)

    def lookup(self, caption: str) -> tuple[np.ndarray, np.ndarray]:
        """The caption's (emb [L, D] float32, zero at padding; mask [L] bool).

        Raises:
          UserError: nobody has embedded this caption yet.
        """
        place = self._find(caption)
        if place is None:
            self._open()  # another process may have added segments since
            place = self._find(caption)
        if place is None:
            raise UserError(
                f"The caption {shortened(caption)} is not in the embedding cache"
                f" {str(self._folder)!r}; embed the data set's captions before reading them."
            )
        segment, start, stop = place
        emb = np.zeros((self._encoder.max_length, self._encoder.width), np.float32)
        if start < stop:  # a caption without text has no states
            emb[: stop - start] = self._segments[segment].states[start:stop]
        return emb, np.arange(self._encoder.max_length) < stop - start

    def ensure(self, captions: Iterable[str]):
        """Embeds the captions that are missing, `SEGMENT` at a time, and stores each segment.

        Raises:
          UserError: a caption is no valid text, or the folder can't be written.
        """
        self._open()
        missing = [c for c in dict.fromkeys(captions) if checked_text(c) not in self]
        if not missing:
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            for path in self._damaged:
                path.unlink(missing_ok=True)
            truncated = 0
            with tqdm(total=len(missing), desc="Embedding captions", unit="caption") as progress:
                for start in range(0, len(missing), SEGMENT):
                    truncated += self._add(missing[start : start + SEGMENT], progress)
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"Cannot write the embedding cache {str(self._folder)!r} ({error}); make room or"
                " choose another folder."
            ) from error
        if truncated:
            log.warning(
                "%d of %d captions are longer than the %d tokens that %s reads; their ends are"
                " cut off.",
                truncated,
                len(missing),
                self._encoder.max_length,
                self._encoder.name,
            )
        self._open()

    def _add(self, captions: list[str], progress: tqdm) -> int:
        """Embeds captions, stores them as one segment, and counts those that were cut."""
        tokens = self._encoder.tokenize(captions)
        starts = np.concatenate([[0], np.cumsum(tokens.mask.sum(axis=1))])
        states = np.empty((starts[-1], self._encoder.width), np.float16)
        for rows, batch in self._encoder.embed_in_batches(tokens):
            for row, emb in zip(rows, batch, strict=True):
                states[starts[row] : starts[row + 1]] = emb[: starts[row + 1] - starts[row]]
            progress.update(len(rows))
        keys = np.stack([_key(caption) for caption in captions])
        tensors = {"states": states, "starts": starts.astype(np.int64), "keys": keys}
        name = blake2b(keys.tobytes(), digest_size=16).hexdigest()
        temporary = self._folder / f".{uuid.uuid4().hex}.tmp"
        try:
            save_file(tensors, temporary, _header(self._encoder))
            os.replace(temporary, self._folder / NAME.format(name))
        finally:
            temporary.unlink(missing_ok=True)
        return int(tokens.truncated.sum())

    def _open(self):
        """Maps every segment and sorts their keys; damaged segments are remembered, not read."""
        self._segments, self._damaged = [], []
        keys, places = [np.zeros((0, 2), np.uint64)], [np.zeros((0, 3), np.int64)]
        for path in sorted(self._folder.glob(NAME.format("[0-9a-f]" * 32))):
            try:
                segment = _map(path)
            except (SafetensorError, ValueError, FileNotFoundError) as error:
                log.warning("%s is damaged (%s); its captions must be embedded again.", path, error)
                self._damaged.append(path)
                continue
            except OSError as error:
                raise UserError(
                    f"Cannot read the embedding cache {str(self._folder)!r} ({error}); mend its"
                    " permissions or choose another folder."
                ) from error
            _check_origin(self._folder, segment.header, _header(self._encoder))
            number = np.full(len(segment.keys), len(self._segments))
            places.append(np.stack([number, segment.starts[:-1], segment.starts[1:]], axis=1))
            keys.append(segment.keys)
            self._segments.append(segment)
        high, low = np.concatenate(keys).T
        order = np.lexsort((low, high))
        high, low = high[order], low[order]
        # Two processes that embedded the same captions left them twice; keep the first.
        new = np.append(True, (high[1:] != high[:-1]) | (low[1:] != low[:-1]))[: len(order)]
        self._high, self._low = high[new], low[new]
        self._places = np.concatenate(places)[order][new]

    def _find(self, caption: str) -> tuple[int, int, int] | None:
        """(segment, start, stop) of the caption's states, or None."""
        high, low = _key(caption)
        i = np.searchsorted(self._high, high)
        while i < len(self._high) and self._high[i] == high:
            if self._low[i] == low:
                return tuple(self._places[i])
            i += 1
        return None


class _Segment(NamedTuple):
    """A mapped file: `states` is sliced from disk, the rest is in memory."""

    states: Any
    starts: np.ndarray
    keys: np.ndarray
    header: dict[str, str]


def _map(path: Path) -> _Segment:
    """Opens a segment.

    Raises:
      SafetensorError: the file is cut short, or isn't a segment.
      ValueError: its parts don't fit together.
    """
    file = safe_open(path, "np")
    starts, keys = file.get_tensor("starts"), file.get_tensor("keys")
    states, header = file.get_slice("states"), file.metadata() or {}
    if keys.shape != (len(starts) - 1, 2) or [starts[-1]] != states.get_shape()[:1]:
        raise ValueError("its parts don't fit together")
    if header.keys() != {"made_by", "fingerprint"}:
        raise ValueError("it does not say which encoder made it")
    return _Segment(states, starts, keys, header)


def _header(encoder: TextEncoder) -> dict[str, str]:
    """What a segment says of its origin; the fingerprint decides, the rest is for messages."""
    made_by = f"{encoder.name} with max_length {encoder.max_length}"
    return {"made_by": made_by, "fingerprint": encoder.fingerprint}


def _check_origin(folder: Path, found: dict[str, str], wanted: dict[str, str]):
    """Raises UserError where another encoder made what was found."""
    if found != wanted:
        theirs, ours = (
            f"{header['made_by']} (fingerprint {header['fingerprint'][:8]})"
            for header in (found, wanted)
        )
        raise UserError(
            f"The embedding cache {str(folder)!r} was made by {theirs}, not by {ours}; delete"
            " it to embed the captions again."
        )


def _key(caption: str) -> np.ndarray:
    """blake2b of the caption's UTF-8, 128 bits as [2] uint64."""
    return np.frombuffer(blake2b(caption.encode(), digest_size=16).digest(), "<u8")
