"""A distillation of seconds: 8×8 pictures, and a teacher of random weights."""

import json
from pathlib import Path

from ml_collections import ConfigDict
from tiny_cascade import stage_config, tiny_experiment, trained

from cascade.bundle import save_bundle
from cascade.config import to_json
from cascade.configs import distillation
from cascade.text.bert import minilm

TEXT = {"text_width": 384, "text_length": 4}


def tiny_distillation(
    folder, *, lowres: int = 0, steps=(4, 1), guidance=(), updates: int = 6, **changes
) -> ConfigDict:
    """A config whose teacher is `folder/teacher`; `changes` replace keys of its stage."""
    config = tiny_experiment()
    config.stage = stage_config(16 if lowres else 8, lowres, **(TEXT | changes))
    if not guidance:
        config.stage.sampling.guidance = 1.0
    distillation.of(config, teacher=str(folder / "teacher"), steps=steps, guidance=guidance)
    train = config.train
    train.steps = train.learning_rate.decay_steps = config.distill.updates_last = updates
    train.learning_rate.peak, train.batch_size = 3e-3, 8
    train.log_every, train.checkpoint_every = 1, 4
    train.eval_every = train.sample_every = 0
    config.text_cache.folder = str(folder / "text_cache")
    return config


def write_teacher(config: ConfigDict, *more):
    """Writes the teacher that a distillation's config names, after `more` trained stages."""
    text = {**config.text.to_dict(), "weights": ""}
    stages = [*more, trained(teachers_section(config))]
    save_bundle(config.distill.teacher, stages, text, minilm(**{k: text[k] for k in KEYS}))


KEYS = ("max_length", "weights")


def teachers_section(config: ConfigDict) -> ConfigDict:
    """The stage as its own training has it, which may be drawn with in any way."""
    section = config.stage.copy_and_resolve_references()
    section.sampling.sampler = {"name": "ancestral", "gamma": 0.3}
    section.weighting = {"name": "v"}
    return section


def write_config(config: ConfigDict, path: Path) -> Path:
    """A config file for the commands, of what `tiny_distillation` made."""
    lines = [
        "import json",
        "from cascade.config import from_json",
        "def get_config(arg=''):",
        f"    return from_json(json.loads({json.dumps(to_json(config))!r}))",
    ]
    path.write_text("\n".join(lines) + "\n")
    return path
