"""Finds pictures that are the same but for size, compression or a touch of colour.

Two pictures are duplicates if at most d of the 64 bits of their difference hashes differ (each bit:
is a grey cell brighter than its left neighbour, on 8 rows of 9 cells; "dHash", N. Krawetz, 2013)
and their 4×4 colour thumbnails differ by less than `SAME_COLOUR` levels in the mean. The colours
tell a red apple from a green one, which the grey hash doesn't.
"""

import itertools
from typing import NamedTuple

import numpy as np
from PIL import Image

SAME_COLOUR = 6.0  # levels of 255
THUMB = 4
BITS = 64


class Look(NamedTuple):
    """What is compared: bits, an integer below 2^64, and thumb, bytes of 4 × 4 × 3 levels."""

    bits: int
    thumb: bytes


def look(picture: np.ndarray) -> Look:
    """The look of a uint8 picture [H, W, 3]."""
    image = Image.fromarray(picture)
    grey = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX), np.int16)
    brighter = (grey[:, 1:] > grey[:, :-1]).ravel()
    thumb = image.resize((THUMB, THUMB), Image.Resampling.BOX)
    return Look(int.from_bytes(np.packbits(brighter).tobytes(), "big"), thumb.tobytes())


def bands(bits: int, most: int) -> list[tuple[int, int]]:
    """(band, its bits) for most + 1 bands: hashes that differ in `most` bits share one of them."""
    edges = [BITS * i // (most + 1) for i in range(most + 2)]
    return [
        (band, bits >> low & (1 << (high - low)) - 1)
        for band, (low, high) in enumerate(itertools.pairwise(edges))
    ]


def later_duplicates(looks: list[tuple[int, Look]], most: int) -> list[int]:
    """Of (index, look) pairs, the indices that have a duplicate with a lower index.

    A picture goes even if the earlier one goes too, because of a third; so the answer depends on
    the pictures alone, and bands can be searched apart.
    """
    first: dict[Look, int] = {}
    for index, same in sorted(looks):
        first.setdefault(same, index)
    later = [index for index, same in looks if first[same] != index]
    ordered = [(index, look) for look, index in first.items()]
    hashes = np.array([look.bits for _, look in ordered], np.uint64)
    thumbs = np.array([list(look.thumb) for _, look in ordered], np.int16)
    for j in range(1, len(ordered)):
        near = np.flatnonzero(np.bitwise_count(hashes[:j] ^ hashes[j]) <= most)
        if (np.abs(thumbs[near] - thumbs[j]).mean(axis=1) < SAME_COLOUR).any():
            later.append(ordered[j][0])
    return sorted(later)
