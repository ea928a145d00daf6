"""Whether what a folder holds is the run that a config describes, so that it may go on."""

from collections.abc import Mapping, Sequence

from cascade import config as configs
from cascade.data.sources import PLACES
from cascade.errors import UserError
from cascade.parallel import processes

# Of a config, what a resumed run may not change without becoming another run.
FIXED = (
    "seed",
    "stage",
    "text",
    "data",
    "train.batch_size",
    "train.microbatches",
    "train.optimizer",
    "train.clip_norm",
    "train.ema_decay",
)
# Likewise of a distillation, of which a student's updates are part too.
FIXED_DISTILLING = (
    *FIXED,
    "train.steps",
    "train.learning_rate",
    "distill.teacher",
    "distill.start_steps",
    "distill.updates_last",
    "distill.guidance",
    "distill.threshold",
    "distill.objective",
)
# What may, besides where the same data lies on this machine: what a step recomputes.
COMPUTED = ("remat",)


def check_same_run(config, text_fingerprint: str, saved: dict, step: int):
    """Raises a UserError where a checkpoint is another run's.

    Args:
      config, text_fingerprint: this run's.
      saved: the checkpoint's meta.
      step: its number.
    """
    check_same(config, saved["config"], f"step {step} of another run")
    if saved["text_fingerprint"] not in ("", text_fingerprint):
        raise UserError(
            f"This working folder holds step {step} of a run with another text encoder: its "
            f"fingerprint is {text_fingerprint[:8]} now and was {saved['text_fingerprint'][:8]}; "
            "give the weights that it began with, or another --workdir."
        )


def check_same(config, saved: dict, other: str, fixed: Sequence[str] = FIXED):
    """Raises a UserError where two configs differ in what mustn't change.

    Args:
      config: the one of now.
      saved: the one before, as JSON; an earlier version may have written it.
      other: what the folder holds if they do, for the message.
      fixed: what mustn't, as paths of keys.
    """
    configured = (config, configs.from_json(saved))
    now, then = (_without(COMPUTED, without_places(configs.to_json(each))) for each in configured)
    for path in fixed:
        ours, theirs = now, then
        for key in path.split("."):
            ours, theirs = ((each or {}).get(key) for each in (ours, theirs))
        if ours != theirs:
            where, ours, theirs = processes.first_difference(f"config.{path}", ours, theirs)
            raise UserError(
                f"This working folder holds {other}: {where} is {ours!r} now and was {theirs!r}; "
                "use another --workdir."
            )


def portable_text(section: dict) -> dict:
    """A text section without its weights' place, which differs between machines.

    Whether two places hold the same weights is for the encoder's fingerprint to tell.
    """
    return {key: value for key, value in section.items() if key != "weights"}


def check_one_text(sections: Mapping[str, dict]):
    """Checks that all stages of a cascade have one text encoder: a prompt is encoded once.

    Args:
      sections: name of each stage, or of its folder -> its text section.

    Raises:
      UserError: naming the first two that differ in more than where the weights lie.
    """
    (first, text), *others = ((name, portable_text(each)) for name, each in sections.items())
    for name, other in others:
        if other != text:
            raise UserError(
                f"The stages {first} and {name} have the text encoders {text} and {other}; a "
                "cascade encodes a prompt once, so give all stages the same."
            )


def without_places(config: dict) -> dict:
    """A config as JSON without where its data, captions' states and weights lie on this machine."""
    kept = _without(PLACES, config)
    kept["text"] = portable_text(kept["text"])
    kept["text_cache"] = {**kept["text_cache"], "folder": bool(kept["text_cache"]["folder"])}
    return kept


def _without(keys, tree):
    if not isinstance(tree, dict):
        return tree
    return {key: _without(keys, value) for key, value in tree.items() if key not in keys}
