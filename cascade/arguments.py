"""What callers ask of a cascade, checked: prompts, whole numbers, one value for each stage."""

import inspect
import re
from collections.abc import Mapping, Sequence

import numpy as np
from ml_collections import FrozenConfigDict

from cascade.diffusion.samplers import SAMPLERS
from cascade.diffusion.spacings import SPACINGS
from cascade.errors import UserError
from cascade.stage import Stage
from cascade.text.between import Between
from cascade.text.interface import checked_text

MOST = {"steps": 100_000, "guidance": 10_000}  # magnitudes; far beyond what is of use
MAX_SIDE = 16_384  # of the last stage's picture, pixels
MAX_BATCH = 65_536  # pictures


def checked_prompts(prompt: str | Between | Sequence[str | Between]) -> list[str | Between]:
    """One text or several as a list; any may lie between two.

    Raises:
      UserError: no text, one with half a character, or something else.
    """
    prompts = [prompt] if isinstance(prompt, str | Between) else prompt
    if (
        not isinstance(prompts, Sequence)
        or len(prompts) == 0
        or not all(isinstance(text, str | Between) for text in prompts)
    ):
        raise UserError(f"The prompt is {str(prompt)[:60]!r}; give a text, or a list of texts.")
    return [checked_text(text) if isinstance(text, str) else text for text in prompts]


def enlarging(stages: Sequence[Stage], stage: int) -> int:
    """`stage`, which enlarges pictures.

    Raises:
      UserError: there is none of that number, or it draws from text alone.
    """
    first = int(stages[0].is_base)
    if not first <= whole("stage", stage, 0) < len(stages):
        raise UserError(
            f"Stage {stage} can't enlarge: this cascade has {len(stages) - first} "
            f"super-resolution stages, numbered from {first}; choose one of those."
        )
    return stage


def whole(name: str, value, least: int, most: int | None = None) -> int:
    """`value`, if it's a whole number from `least` to `most`.

    Raises:
      UserError: it isn't.
    """
    right = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not right or value < least or (most is not None and value > most):
        limits = f"at least {least}" if most is None else f"{least} to {most}"
        raise UserError(f"{name} is {value!r}; give a whole number, {limits}.")
    return int(value)


def per_stage(name: str, value, stages: int) -> tuple:
    """One value a stage, from one for all or from a sequence or array of as many as stages.

    Raises:
      UserError: a sequence of another length, or a value beyond `MOST`.
    """
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if not isinstance(value, Sequence) or isinstance(value, str):
        value = (value,) * stages
    if len(value) != stages:
        raise UserError(
            f"{name} has {len(value)} values and one stage draws; give one value."
            if stages == 1
            else f"{name} has {len(value)} values and the cascade {stages} stages; "
            "give one value, or one for each stage."
        )
    values = tuple(item.item() if isinstance(item, np.generic) else item for item in value)
    for item in values:
        if name in MOST and isinstance(item, int | float) and abs(item) > MOST[name]:
            raise UserError(f"{name} is beyond the limit; give at most {MOST[name]}.")
    return values


def part_section(part: str | Mapping, parts: Mapping) -> dict:
    """A registered part's config section; a name alone takes its factory's own defaults."""
    if isinstance(part, Mapping):
        return dict(part)
    section = {"name": part}
    if isinstance(part, str) and part in parts:
        for key, parameter in inspect.signature(parts[part]).parameters.items():
            if parameter.default is not parameter.empty:
                section[key] = parameter.default
    return section


def stage_settings(
    stages: Sequence[Stage],
    sampler: str | Mapping | None = None,
    spacing: str | Mapping | None = None,
    **changes,
) -> tuple[FrozenConfigDict, ...]:
    """Each stage's sampling settings, its config's own for what is None.

    Args:
      sampler, spacing: as `part_section` takes it.
      **changes: other keys of a `sampling` section, each one value for all stages or one for each.

    Raises:
      UserError: a wrong number of values, or one that a stage can't take.
    """
    changes = {key: per_stage(key, value, len(stages)) for key, value in changes.items()}
    for key, part, parts in (("sampler", sampler, SAMPLERS), ("spacing", spacing, SPACINGS)):
        if part is not None:
            changes[key] = (part_section(part, parts),) * len(stages)
    return tuple(
        stage.settings(
            **{key: values[i] for key, values in changes.items() if values[i] is not None}
        )
        for i, stage in enumerate(stages)
    )


def parsed_size(size: str | None) -> tuple[int, int] | None:
    """(height, width) from "HEIGHTxWIDTH"; None from None.

    Raises:
      UserError: the text is something else.
    """
    if size is None:
        return None
    match = re.fullmatch(r"([0-9]{1,6})[x×]([0-9]{1,6})", size)
    if not match:
        raise UserError(f"The size is {size!r}; give HEIGHTxWIDTH of the base picture, like 64x96.")
    return int(match[1]), int(match[2])


def stage_sizes(stages: Sequence[Stage], size: tuple[int, int] | None) -> list[tuple[int, int]]:
    """(height, width) at every stage for a base picture of `size`, its training size if None.

    Raises:
      UserError: no size, or one that a stage can't draw.
    """
    base = stages[0].config.resolution
    if size is None:
        size = (base, base)
    if not isinstance(size, Sequence) or isinstance(size, str) or len(size) != 2:
        raise UserError(f"size is {size!r}; give (height, width) of the base picture.")
    size = [whole("a side of size", side, 1, MAX_SIDE) for side in size]
    last = stages[-1].config.resolution
    if max(size) * last > MAX_SIDE * base:
        raise UserError(
            f"A base picture of {size[1]}×{size[0]} becomes more than {MAX_SIDE} pixels wide or "
            f"high; give a size with sides of at most {MAX_SIDE * base // last}."
        )
    sizes = []
    for i, stage in enumerate(stages):
        scaled = [side * stage.config.resolution for side in size]
        if any(side % base for side in scaled):
            raise UserError(
                f"Stage {i} can't enlarge {size[1]}×{size[0]} by "
                f"{stage.config.resolution}/{base} to whole pixels; choose another size."
            )
        sizes.append((scaled[0] // base, scaled[1] // base))
        try:
            stage.check_size(sizes[-1])
        except UserError as error:
            raise UserError(f"Stage {i}: {error}") from error
    return sizes
