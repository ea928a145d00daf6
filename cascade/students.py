"""What a distilled stage may be asked to do: to draw as it was taught, and nothing else.

A stage's `distilled` section says what it was taught: `steps`, the only number that it draws in (0:
any, it isn't a student of few steps), and `guidance`, (lowest, highest) weight that it takes as a
condition in place of being evaluated twice, or () where guidance isn't part of it.
"""

from collections.abc import Iterable, Mapping

from cascade.errors import UserError
from cascade.text.interface import checked_text

SAMPLERS = ("ddim", "stochastic")  # those that take a student's steps as it learnt them
SPACING = "uniform"


def check_drawing(stage: Mapping, sampling: Mapping):
    """Checks that a stage can be drawn with so.

    Args:
      stage: its section, of which `resolution`, `distilled` and `network` are looked at.
      sampling: a `sampling` section, its own or one with a caller's changes.

    Raises:
      UserError: it was taught otherwise, or `distilled` is at odds with itself or the network.
    """
    steps, guidance = stage["distilled"]["steps"], stage["distilled"]["guidance"]
    check_range("stage.distilled.guidance", guidance)
    if stage["network"]["embed_guidance"] != bool(guidance):
        raise UserError(
            f"stage.network.embed_guidance is {stage['network']['embed_guidance']} but "
            f"stage.distilled.guidance is {guidance}; a network embeds the weights that guided "
            "distillation taught it, and no others."
        )
    name = f"The stage of {stage['resolution']}×{stage['resolution']} pixels"
    if steps:
        _check_steps(name, steps, sampling)
    if guidance:
        _check_guidance(name, guidance, sampling)


def check_range(what: str, guidance: tuple):
    """Raises a UserError unless `guidance` is () or two weights, the lower first."""
    numbers = all(isinstance(w, int | float) and not isinstance(w, bool) for w in guidance)
    if guidance and not (numbers and len(guidance) == 2 and guidance[0] < guidance[1]):
        raise UserError(
            f"{what} is {guidance}; give the lowest and the highest guidance weight, or ()."
        )


def check_negative_prompt(stages: Iterable, negative_prompt: str):
    """Raises a UserError where a stage that draws can't be led away from a negative prompt.

    Args:
      stages: the `cascade.stage.Stage`s that draw.
    """
    if not checked_text(negative_prompt, "negative prompt").strip():
        return
    for stage in stages:
        if stage.config.distilled.guidance:
            raise UserError(
                "A negative prompt was given, but guidance was distilled into the stage of "
                f"{stage.config.resolution}×{stage.config.resolution} pixels, away from no text "
                "alone; leave it out, or draw with the teacher."
            )


def _check_steps(name: str, steps: int, sampling: Mapping):
    if sampling["steps"] != steps:
        raise UserError(
            f"{name} was distilled to draw in {steps} steps and is asked for {sampling['steps']}; "
            "leave the steps as they are, or draw with another student or the teacher."
        )
    if sampling["sampler"]["name"] not in SAMPLERS:
        raise UserError(
            f"{name} was distilled to {steps} steps and can't be drawn with by the sampler "
            f"{sampling['sampler']['name']!r}; choose from {', '.join(SAMPLERS)}."
        )
    if sampling["spacing"]["name"] != SPACING or sampling["searched"]:
        raise UserError(
            f"{name} was distilled to {steps} steps and knows evenly spaced times alone; set "
            f"sampling.spacing to {SPACING!r} and sampling.searched to ()."
        )


def _check_guidance(name: str, guidance: tuple, sampling: Mapping):
    low, high = guidance
    if not low <= sampling["guidance"] <= high:
        raise UserError(
            f"{name} learnt guidance weights from {low:g} to {high:g} and is asked for "
            f"{sampling['guidance']:g}; give it one of those, with others a stage each, as in 3,1."
        )
    if sampling["guidance_schedule"]["name"] != "constant" or sampling["rescale"]:
        raise UserError(
            f"{name} had guidance distilled into it, the same at every step and as it comes; set "
            "sampling.guidance_schedule to 'constant' and sampling.rescale to 0."
        )
