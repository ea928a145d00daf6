"""A config.json of diffusers', read so that no option in it is passed over."""

from collections.abc import Mapping, Sequence
from typing import Any

from cascade.errors import UserError

EXCERPT = 60  # characters


class Description:
    """Settings of a description: what it states, and defaults for what it leaves out.

    Each key is mapped by whoever reads it, or has the one value that is built here. Keys that begin
    with "_" are notes on the file.
    """

    def __init__(
        self,
        where: str,
        given: Mapping[str, Any],
        *,
        stated: Sequence[str],
        mapped: Mapping[str, Any],
        built: Mapping[str, Any],
    ):
        """Checks a description's keys.

        Args:
          where: the file, for messages.
          given: what it holds.
          stated: keys that it must have.
          mapped: key -> default, of other keys that have several values.
          built: key -> the only value that is built here.

        Raises:
          UserError: naming a key that is unknown or missing, or whose value isn't built.
        """
        self._where = where
        given = {key: value for key, value in given.items() if not key.startswith("_")}
        for key, value in given.items():
            if key not in stated and key not in mapped and key not in built:
                raise UserError(
                    f"{where} has the option {excerpt(key)} = {excerpt(value)}, which isn't known "
                    "here and can't be honoured; use a model without it."
                )
        for key in stated:
            if key not in given:
                raise UserError(f"{where} lacks {key!r}; give a DeepFloyd IF model's own file.")
        self._settings = {**mapped, **built, **given}
        for key, value in built.items():
            self.one_of(key, (value,))

    def __getitem__(self, key: str) -> Any:
        return self._settings[key]

    def refusal(self, key: str, expected: str) -> UserError:
        """The error that says that `key`'s value isn't built here, but `expected` is."""
        return UserError(
            f"{self._where} has {key} = {excerpt(self._settings[key])}, but only {expected} is "
            "built here; use a model that has this."
        )

    def one_of(self, key: str, choices: Mapping[Any, Any] | Sequence[Any]) -> Any:
        """The value of `key`, one of `choices`; of a mapping, what the value maps to."""
        value = self._settings[key]
        for choice in choices:
            # To Python 1 is True; to a config it isn't.
            if value == choice and isinstance(value, bool) == isinstance(choice, bool):
                return choices[choice] if isinstance(choices, Mapping) else choice
        raise self.refusal(key, " or ".join(repr(choice) for choice in choices))

    def number(self, key: str, kind: type, least: float) -> Any:
        """The value of `key`, an int or (an int or a float) of at least `least`."""
        value = self._settings[key]
        if not _is(value, kind) or not least <= value < float("inf"):
            raise self.refusal(key, f"a {'whole ' * (kind is int)}number of at least {least:g}")
        return value

    def per_level(self, key: str, kind: type, levels: int) -> tuple:
        """The value of `key`, one for all levels or a list of as many, as a tuple."""
        value = self._settings[key]
        if _is(value, kind):
            value = [value] * levels
        if not isinstance(value, list | tuple) or not all(_is(item, kind) for item in value):
            raise self.refusal(key, f"{kind.__name__}, or a list of {kind.__name__},")
        if len(value) != levels:
            raise self.refusal(key, f"a list of {levels} (as many as block_out_channels has)")
        return tuple(value)


def excerpt(value: Any) -> str:
    """What a message quotes of a value that others wrote, which may be long."""
    text = repr(value)
    return text if len(text) <= EXCERPT else f"{text[:EXCERPT]}…"


def _is(value: Any, kind: type) -> bool:
    """Whether JSON's `value` is of `kind`; an int may stand for a float, a bool for neither."""
    if kind in (int, float) and isinstance(value, bool):
        return False
    return isinstance(value, int | float if kind is float else kind)
