"""In which order training meets records: a pure function of seed and position."""

from collections.abc import Sequence
from fractions import Fraction

import numpy as np

# Positions within which a mixture's shares are exact, to a record; drawn anew in each block.
BLOCK = 4096
# Weights are taken as fractions with a denominator up to this.
FINEST = 1_000_000


class Order:
    """Position in the stream -> index of a record.

    With a seed the stream is endless and pass e is the permutation that (seed, e) draws, 8 bytes a
    record. (grain's own shuffle needs no memory but, in small data sets, 0.4 ms a record.) Without
    a seed it is the source's order, and None after the last record.
    """

    def __init__(self, records: int, seed: int | None):
        self._records, self._seed = records, seed
        self._current = (-1, None)

    def __call__(self, position: int) -> int | None:
        """The index, or None after the end."""
        if self._seed is None:
            return position if position < self._records else None
        number, place = divmod(position, self._records)
        drawn, permutation = self._current  # read at once: threads may share this object
        if drawn != number:
            permutation = np.random.default_rng([self._seed, number]).permutation(self._records)
            self._current = (number, permutation)
        return int(permutation[place])

    def __reduce__(self):
        return (Order, (self._records, self._seed))


class MixedOrder:
    """Position in an endless stream -> index of a record of several sources laid end to end.

    Before position p, a multiple of `BLOCK`, source k came n_k(p) = p·w_k times, to within one a
    source (see `shares`); inside a block, (seed, block) draws who comes when, so that neither a
    batch nor a process meets a pattern. Each source goes through passes of its own, each in a new
    order.
    """

    def __init__(self, records: Sequence[int], weights: Sequence[float], seed: int):
        self._arguments = (tuple(records), tuple(weights), seed)
        total = sum(map(Fraction, weights))
        self._weights = [(Fraction(w) / total).limit_denominator(FINEST) for w in weights]
        self._starts = np.cumsum([0, *records[:-1]])
        self._orders = [Order(n, _seed_of(seed, k)) for k, n in enumerate(records)]
        self._current = (-1, None, None)

    def __call__(self, position: int) -> int:
        """The index."""
        number, place = divmod(position, BLOCK)
        drawn, sources, turns = self._current  # read at once: threads may share this object
        if drawn != number:
            sources, turns = self._block(number)
            self._current = (number, sources, turns)
        source = int(sources[place])
        return int(self._starts[source]) + self._orders[source](int(turns[place]))

    def _block(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Of each position in a block: its source, and how often that came before."""
        before, after = (shares(n * BLOCK, self._weights) for n in (number, number + 1))
        counts = np.subtract(after, before)
        sources = np.repeat(np.arange(len(counts)), counts)
        np.random.default_rng([self._arguments[2], number]).shuffle(sources)
        turns = np.zeros(BLOCK, np.int64)
        for k, first in enumerate(before):
            turns[sources == k] = first + np.arange(counts[k])
        return sources, turns

    def __reduce__(self):
        return (MixedOrder, self._arguments)


def _seed_of(seed: int, source: int) -> int:
    """A seed of each source's own, lest two sources of one size be shuffled alike."""
    return int(np.random.SeedSequence([seed, source]).generate_state(1)[0])


def shares(positions: int, weights: Sequence[Fraction]) -> list[int]:
    """How many of the first `positions` each source gets, about p·w_k.

    n_0 = ⌊p·w_0⌋, and so on: each source takes its part of what those before it leave, so that
    every count grows with p and their sum is p.
    """
    counts, left, weight_left = [], positions, sum(weights)
    for weight in weights[:-1]:
        count = int(left * weight / weight_left)
        counts.append(count)
        left, weight_left = left - count, weight_left - weight
    return [*counts, left]
