"""Which students a distillation makes, from whom each of them learns, and with which config."""

from typing import NamedTuple

from ml_collections import ConfigDict

from cascade import config as configs
from cascade import registry
from cascade.diffusion.distillation import OBJECTIVES
from cascade.errors import UserError
from cascade.students import check_range

GUIDED = "guided"  # the name of the student that takes guidance as a condition, of any steps
FEW = 2  # students of so many steps, or fewer, learn for `distill.updates_last`
# Objectives by which a student learns from that of twice its steps. By the others each learns from
# the teacher of many steps.
IN_TURN = ("progressive",)


class Halving(NamedTuple):
    """One student.

    Attributes:
      name: of its folders.
      steps: that it learns to draw in; 0: any, it is GUIDED.
      teacher: the name of the student that teaches it; "": the teacher itself.
      config: an experiment's, its run's.
    """

    name: str
    steps: int
    teacher: str
    config: ConfigDict


def halvings(config: ConfigDict) -> list[Halving]:
    """The students of a distillation, in the order in which they learn.

    Args:
      config: as `check_distillation` checks it.
    """
    told, first = config.distill, ""
    students = []
    if told.guidance:
        first = GUIDED
        students.append((GUIDED, 0, ""))
    steps, teacher = told.start_steps, first
    while steps > told.end_steps:
        steps //= 2
        students.append((str(steps), steps, teacher))
        teacher = str(steps) if told.objective.name in IN_TURN else first
    return [
        Halving(name, steps, teacher, _student_config(config, steps, seed))
        for seed, (name, steps, teacher) in enumerate(students, config.seed)
    ]


def _student_config(config: ConfigDict, steps: int, seed: int) -> ConfigDict:
    """The config of one student's run: another seed, so other data, noise and times.

    Args:
      steps: 0 for the guided one.
    """
    student = ConfigDict(configs.from_json(configs.to_json(config)))
    student.seed = seed % 2**32
    guidance = config.distill.guidance or config.stage.distilled.guidance
    student.stage.distilled = {"steps": steps, "guidance": guidance}
    student.stage.network.embed_guidance = bool(guidance)
    student.stage.sampling.steps = steps or config.distill.start_steps
    if 0 < steps <= FEW:
        student.train.steps = config.distill.updates_last
    if "decay_steps" in student.train.learning_rate:
        student.train.learning_rate.decay_steps = student.train.steps
    return student


def check_distillation(config: ConfigDict):
    """Checks what a distillation's config says beyond an experiment's.

    Args:
      config: already checked by `cascade.config.load`.

    Raises:
      UserError: there is no `distill` section, its numbers don't fit one another or the stage's, or
        a student couldn't be drawn with by `stage.sampling`.
    """
    if "distill" not in config:
        raise UserError(
            "This config has no `distill` section, so it says nothing of a teacher; give one such "
            "as configs/emoji/distill.py:base, or train with `cascade train`."
        )
    told, stage, rate = config.distill, config.stage, config.train.learning_rate
    registry.build("objective", OBJECTIVES, told.objective)
    check_range("config.distill.guidance", told.guidance)
    _check_steps(told)
    if stage.distilled.steps not in (0, told.start_steps):
        raise UserError(
            f"config.distill.start_steps is {told.start_steps} but the teacher is itself a student "
            f"of {stage.distilled.steps} steps (config.stage.distilled); make them equal."
        )
    if told.objective.name not in IN_TURN and stage.distilled.steps:
        raise UserError(
            f"config.distill.objective {told.objective.name!r} asks the teacher at any time, but "
            f"the teacher is itself a student of {stage.distilled.steps} steps "
            "(config.stage.distilled); give the teacher of many steps, or 'progressive'."
        )
    if told.guidance and (stage.distilled.guidance or stage.distilled.steps):
        raise UserError(
            "config.distill.guidance is set but config.stage.distilled says that the teacher is a "
            "student already; guidance is distilled first, so set it to ()."
        )
    if "decay_steps" in rate and rate.decay_steps != config.train.steps:
        raise UserError(
            f"config.train.learning_rate.decay_steps is {rate.decay_steps} but a student learns "
            f"for config.train.steps={config.train.steps} updates, within which its rate is "
            "annealed; make them equal."
        )
    for halving in halvings(config):
        configs.check(halving.config)


def _check_steps(told: ConfigDict):
    """Raises a UserError unless halving start_steps leads to end_steps."""
    halved = told.start_steps
    while halved > told.end_steps and halved % 2 == 0:
        halved //= 2
    if halved != told.end_steps:
        raise UserError(
            f"config.distill goes from {told.start_steps} steps to {told.end_steps}, which halving "
            "doesn't lead to; give start_steps = end_steps times a power of two."
        )
    if told.start_steps == told.end_steps and not told.guidance:
        raise UserError(
            f"config.distill goes from {told.start_steps} steps to as many, without guidance, so "
            "there is nothing to distill; give fewer end_steps."
        )
