"""Several sources as one, each with its share of what training sees."""

import hashlib
import math
from collections.abc import Iterable, Mapping

import numpy as np

from cascade.data.order import MixedOrder
from cascade.errors import UserError


class Mixture:
    """See `cascade.data.sources.mixture`; record i is that of the sources laid end to end."""

    folder = None

    def __init__(self, sources: Mapping, weights: Mapping[str, float]):
        if set(sources) != set(weights) or not sources:
            raise UserError(
                f"The mixture has sources {', '.join(sources) or 'none'} and weights for "
                f"{', '.join(weights) or 'none'}; give each source one weight."
            )
        for name, weight in weights.items():
            if not (isinstance(weight, int | float) and 0 < weight < math.inf):
                raise UserError(f"The weight of {name!r} is {weight!r}; give a number above 0.")
        empty = [name for name, source in sources.items() if len(source) == 0]
        if empty:
            raise UserError(f"Source {empty[0]!r} of the mixture holds no record; take it out.")
        # By name, since a config that is stored and read may come back in another order.
        self._sources = {name: sources[name] for name in sorted(sources)}
        self._weights = {name: weights[name] for name in self._sources}
        self._ends = np.cumsum([len(source) for source in self._sources.values()])
        parts = self._sources.items()
        self.fingerprint = _digest(f"{k} {self._weights[k]} {s.fingerprint}" for k, s in parts)
        held = {name: source.contents for name, source in parts}
        self.contents = {
            "files": sum(part["files"] for part in held.values()),
            "bytes": sum(part["bytes"] for part in held.values()),
            "digest": _digest(part["digest"] for part in held.values())[:16],
            "listing": {
                f"{name}: {file}": row
                for name, part in held.items()
                for file, row in part["listing"].items()
            },
        }

    def __reduce__(self):
        return (Mixture, (self._sources, self._weights))

    @property
    def sources(self) -> tuple:
        """What it is made of, in the order of the records."""
        return tuple(self._sources.values())

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, i: int) -> dict:
        name, source, inner = self._place(i)
        record = source[inner]
        return {**record, "key": f"{name}: {record['key']}"}

    def key(self, i: int) -> str:
        """The name of record i's source and what that calls it."""
        name, source, inner = self._place(i)
        return f"{name}: {source.key(inner)}"

    def captions(self, i: int) -> list[str]:
        """The captions of record i."""
        _, source, inner = self._place(i)
        return source.captions(inner)

    def order(self, seed: int) -> MixedOrder:
        """In which order training meets the records, each source by its weight."""
        lengths = [len(source) for source in self._sources.values()]
        return MixedOrder(lengths, tuple(self._weights.values()), seed)

    def _place(self, i: int) -> tuple:
        k = int(np.searchsorted(self._ends, i, side="right"))
        name, source = list(self._sources.items())[k]
        return name, source, i - int(self._ends[k]) + len(source)


def _digest(marks: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(marks).encode()).hexdigest()
