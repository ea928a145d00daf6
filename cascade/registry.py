"""Builds a part that a config section names.

A registry is a plain dict from names to factories, kept beside the factories. A section is a
config dict whose `name` picks the factory and whose other keys are exactly its keyword
parameters, so the factory's signature is the section's schema and nothing is written twice.
"""

import inspect
import typing
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any

from cascade.errors import UserError


def build(kind: str, registry: Mapping[str, Callable], section: Mapping[str, Any], **extra: Any):
    """Calls the factory that `section["name"]` names with the section's other keys.

    Args:
      kind: what is being built, for the error message: "sampler", "schedule".
      registry: name -> factory.
      section: `{"name": ..., **keywords}`.
      **extra: keywords that the program, not the config, supplies.

    Raises:
      UserError: the name is unknown, a key is foreign or missing, or a value has the wrong type.
    """
    factory = check(kind, registry, section, supplied=tuple(extra))
    return factory(**{k: v for k, v in section.items() if k != "name"}, **extra)


def check(kind: str, registry: Mapping[str, Callable], section: Mapping[str, Any], supplied=()):
    """Checks a section against its factory's signature and returns the factory.

    Args:
      supplied: names of parameters that the program will supply, so the section must not.

    Raises:
      UserError: as `build`.
    """
    if "name" not in section:
        raise UserError(f"The {kind} section has no `name`; choose one of {_listed(registry)}.")
    name = section["name"]
    if not isinstance(name, str) or name not in registry:
        hint = meant(name, registry)
        raise UserError(
            f"Unknown {kind} name {_shown(name)}{hint}; choose from {_listed(registry)}."
        )
    factory = registry[name]
    parameters = {
        k: p for k, p in inspect.signature(factory).parameters.items() if k not in supplied
    }
    # Linen modules have two fields that belong to Flax, not to the config.
    for flax_field in ("parent", "name"):
        parameters.pop(flax_field, None)
    where = f"the {kind} section {name!r}"
    for key in section:
        if key != "name" and key not in parameters:
            hint = meant(key, parameters)
            raise UserError(
                f"Unknown key {key!r} in {where}{hint}; it takes {_listed(parameters)}."
            )
    for key, parameter in parameters.items():
        if key not in section:
            raise UserError(f"Missing key {key!r} in {where}; state it, a config hides no default.")
        check_type(f"Key {key!r} in {where}", section[key], parameter.annotation)
    return factory


def check_type(what: str, value: Any, expected: Any):
    """Compares a value with an annotation: a plain class, or `tuple[class, ...]`.

    An int may stand for a float. Any other annotation isn't checked.

    Raises:
      UserError: naming `what`, the value and the type it should have.
    """
    if typing.get_origin(expected) is tuple:
        check_type(what, value, tuple)
        for item in value:
            check_type(f"{what}: an item", item, typing.get_args(expected)[0])
        return
    if not isinstance(expected, type):
        return
    number = isinstance(value, int) and not isinstance(value, bool)
    if expected is float and number:
        return
    if not isinstance(value, expected) or (expected is int and not number):
        kind = type(value).__name__
        raise UserError(f"{what} is {_shown(value)} ({kind}); give {expected.__name__}.")


def _shown(value: Any) -> str:
    return " ".join(repr(value).split())  # a section's own text has several lines


def _listed(names) -> str:
    return ", ".join(sorted(names)) or "no keys"


def meant(name: Any, names) -> str:
    """ " (did you mean 'x'?)" where one of `names` is close to `name`, else an empty string."""
    close = get_close_matches(str(name), list(names), 1)
    return f" (did you mean {close[0]!r}?)" if close else ""
