"""Records that can't be used: counted, told, and how many of them are too many."""

import logging
from typing import Any, NamedTuple

from cascade.errors import UserError

log = logging.getLogger(__name__)

# A rate of broken records means nothing before this many, or all, were seen.
RATE_WINDOW = 100
# Fills evaluation's last batch; nothing was skipped.
PADDING = {"padding": True}


class Skipped(NamedTuple):
    """Takes the place of a record that can't be used, so that someone can count it."""

    record: int
    key: str
    reason: str
    broken: bool


class Judge:
    """Lets prepared pictures pass; counts, logs and drops skipped ones.

    A record counts once, however often it comes by; a broken one is then named. The counts are told
    at the end of the first pass, and whenever the number of skipped records reaches a power of two.
    """

    def __init__(self, records: int, max_broken_rate: float):
        self._records, self._max_rate = records, max_broken_rate
        self._came = self._passed = 0
        self._broken, self._filtered = set(), set()  # record numbers

    def __call__(self, element) -> bool:
        """True for a picture.

        Raises:
          UserError: too many are broken, or a whole pass left no picture.
        """
        self._came += 1
        usable = not isinstance(element, Skipped)
        self._passed += usable
        grown = not usable and self._count(element)
        skipped = len(self._broken) + len(self._filtered)
        if skipped and (grown or self._came == self._records):
            log.warning(
                "Skipped %d of %d records so far: %d broken, %d left out by the filter.",
                skipped,
                self._seen,
                len(self._broken),
                len(self._filtered),
            )
        return usable

    @property
    def _seen(self) -> int:
        """How many records came by, repeats left out."""
        return min(self._came, self._records)

    def _count(self, element: Skipped) -> bool:
        """Counts and names a record that can't be used, and raises what `__call__` raises.

        Returns:
          Whether it is new and makes their number a power of two.
        """
        kind = self._broken if element.broken else self._filtered
        new = element.record not in kind
        kind.add(element.record)
        last = f"(the last: {element.key!r}, {element.reason})"
        if new and element.broken:
            log.warning("Skipped broken record %r: %s", element.key, element.reason)
            least = min(RATE_WINDOW, self._records)
            if len(self._broken) > self._max_rate * max(self._seen, least):
                raise UserError(
                    f"{len(self._broken)} of the first {self._seen} records are broken, more than "
                    f"max_broken_rate {self._max_rate} of {max(self._seen, least)} {last}; repair "
                    "or remove them, or raise the rate."
                )
        if not self._passed and self._came >= self._records:
            raise UserError(
                f"None of {self._records} records is usable {last}; repair the broken ones or "
                "loosen the filter."
            )
        return new and (len(self._broken) + len(self._filtered)).bit_count() == 1


class Fill:
    """Evaluation's way with what can't be used: a blank in its place, marked invalid.

    Batches then keep their number and their size, whatever is broken and whoever else evaluates.
    """

    def __init__(self, blank: dict[str, Any], judge: Judge):
        self._blank, self._judge = blank, judge

    def __call__(self, element):
        """Element -> element with "valid"."""
        if element == PADDING:
            return {**self._blank, "valid": False}
        usable = self._judge(element)
        return {**(element if usable else self._blank), "valid": usable}
