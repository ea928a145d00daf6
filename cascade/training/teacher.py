"""Finding a distillation's teacher in a bundle or a run, and whether it is the config's stage."""

import pathlib
from collections.abc import Mapping

from cascade import config as configs
from cascade.bundle import PLACE, TrainedStage
from cascade.errors import UserError
from cascade.parallel.processes import first_difference
from cascade.text.interface import TextEncoder
from cascade.training.export import read_trained
from cascade.training.same_run import portable_text

# A student's own: what it trains on, how it is drawn with, and how its network computes.
OWN = ("crop_resolution", "weighting", "text_drop", "sampling")
OWN_NETWORK = ("dropout", "dtype", "remat", "attention_implementation")
OF_SUPER_RESOLUTION = ("lowres_upsampling", "aug_schedule")


def find_teacher(config, encoder: TextEncoder) -> TrainedStage:
    """The stage that `config.distill.teacher` holds and `config.stage` describes, EMA weights.

    All processes call this together; each reads all of it.

    Args:
      config: a distillation's.
      encoder: the text encoder that `config.text` makes.

    Raises:
      UserError: there is no such folder or stage, or it is another network, prediction, schedule or
        text encoder than the config's.
    """
    folder = pathlib.Path(config.distill.teacher)
    if not any((folder / mark).exists() for mark in (PLACE["mark"], "config.json")):
        raise UserError(
            f"The teacher {str(folder)!r} is neither a bundle nor a run's folder; give one that is "
            "there, like --config.distill.teacher=runs/base."
        )
    stages, text, fingerprint = read_trained(folder)
    ours = config.stage
    fitting = [each for each in stages if _sizes(each.stage.config) == _sizes(ours)]
    if not fitting:
        drawn = ", ".join(_said(each.stage.config) for each in stages)
        raise UserError(
            f"The teacher {str(folder)!r} draws {drawn}, but config.stage draws {_said(ours)}; "
            "give the teacher of that stage, or its config."
        )
    section = portable_text(configs.to_json(config.text))
    if portable_text(text) != section or fingerprint not in ("", encoder.fingerprint):
        raise UserError(
            f"The teacher {str(folder)!r} was trained with the text encoder {portable_text(text)} "
            f"of fingerprint {fingerprint[:8] or 'unknown'}, and config.text makes {section} of "
            f"fingerprint {encoder.fingerprint[:8]}; give config.text the teacher's."
        )
    teacher = fitting[0]
    wanted, has = (_shared(section) for section in (ours, teacher.stage.config))
    if wanted != has:
        where, now, then = first_difference("config.stage", wanted, has)
        raise UserError(
            f"{where} is {now!r} but the teacher's is {then!r}; a student begins as its teacher, "
            "so make them equal."
        )
    return teacher


def _sizes(stage: Mapping) -> tuple[int, int]:
    return stage["lowres_resolution"], stage["resolution"]


def _said(stage: Mapping) -> str:
    low, high = _sizes(stage)
    return f"{high}×{high} from " + (f"{low}×{low}" if low else "text")


def _shared(stage) -> dict:
    """What of a stage's section its teacher must have too, as JSON."""
    left_out = (*OWN, *(() if stage["lowres_resolution"] else OF_SUPER_RESOLUTION))
    shared = {k: v for k, v in configs.to_json(stage).items() if k not in left_out}
    network = shared["network"]
    shared["network"] = {k: v for k, v in network.items() if k not in OWN_NETWORK}
    return shared
