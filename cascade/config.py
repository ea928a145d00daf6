"""Configs: Python files with `get_config(arg="")`, read, overridden and checked.

A config states every default. What it leaves out, adds or contradicts is an error that names the
key, before anything is built. Sections that name a registered part ({"name": "ddim", ...}) are
checked against that part's signature.
"""

import json
import math
import pathlib
import re
from collections.abc import Mapping, Sequence

from absl import flags
from ml_collections import ConfigDict, config_flags

from cascade import registry
from cascade.data.sources import SOURCES
from cascade.diffusion.guidance import THRESHOLDS
from cascade.diffusion.losses import WEIGHTINGS
from cascade.diffusion.samplers import SAMPLERS
from cascade.diffusion.schedules import SCHEDULES
from cascade.errors import UserError
from cascade.networks import NETWORKS
from cascade.text.encoders import ENCODERS
from cascade.training.optim import LEARNING_RATES, OPTIMIZERS


class Part:
    """A section that a registry's factory defines; `supplied` are the program's own keywords."""

    def __init__(self, kind: str, parts: Mapping, supplied: tuple[str, ...] = ()):
        self.kind, self.parts, self.supplied = kind, parts, supplied


SAMPLING = {
    "sampler": Part("sampler", SAMPLERS),
    "steps": int,
    "guidance": float,
    "guidance_interval": tuple,  # (low, high) in logsnr; () = everywhere
    "rescale": float,
    "threshold": Part("threshold", THRESHOLDS),
    "aug_level": float,
}

STAGE = {
    "resolution": int,
    "channels": int,
    "lowres_resolution": int,  # 0: a base stage
    "crop_resolution": int,  # 0: trains on whole pictures
    "text_width": int,
    "text_length": int,
    "network": Part("network", NETWORKS, ("out_channels", "super_resolution")),
    "schedule": Part("schedule", SCHEDULES),
    "output": str,
    "learned_variance": bool,
    "weighting": Part("weighting", WEIGHTINGS),
    "text_drop": float,
    "aug_schedule": Part("schedule", SCHEDULES),
    "sampling": SAMPLING,
}

SCHEMA = {
    "seed": int,
    "stage": STAGE,
    "text": Part("text encoder", ENCODERS),
    "text_cache": str,
    "data": {
        "source": Part("data source", SOURCES),
        "eval_source": Part("data source", SOURCES),
        "filter": {"min_side": int, "max_aspect": float},
        "ground": str,
        "crop": str,
        "workers": int,
        "max_broken_rate": float,
        "cache_decoded": bool,
    },
    "train": {
        "steps": int,
        "batch_size": int,
        "microbatches": int,
        "optimizer": Part("optimizer", OPTIMIZERS, ("learning_rate",)),
        "learning_rate": Part("learning_rate", LEARNING_RATES),
        "clip_norm": float,
        "ema_decay": float,
        "log_every": int,
        "eval_every": int,
        "eval_batches": int,
        "sample_every": int,
        "sample_count": int,
        "checkpoint_every": int,
        "keep_last": int,
        "keep_every": int,
    },
    "mesh": {"data": int, "fsdp": int, "tensor": int},
    "sharding_rules": tuple,  # ((path pattern, spec), ...) ahead of the default FSDP rule
}


def load(spec: str, overrides: Sequence[str] = ()) -> ConfigDict:
    """Reads `path/to/config.py[:arg]`, applies `--config.a.b=value` overrides, and checks it.

    A path that isn't below the current folder is looked for among the configs that ship with the
    package, so `configs/emoji/base64.py` works anywhere.

    Raises:
      UserError: no such file, an error inside it, or whatever `check` finds.
    """
    path, _, arg = spec.partition(":")
    found = find(path)
    flag_values = flags.FlagValues()
    for override in overrides:
        if not re.match(r"--config\.[\w.\[\]]+=", override):
            raise UserError(
                f"Can't read the argument {override!r}; overrides look like --config.train.steps=9."
            )
    argv = ["cascade", f"--config={found}:{arg}", *overrides]
    config_flags.DEFINE_config_file("config", flag_values=flag_values, sys_argv=argv)
    try:
        flag_values(argv)
        config = flag_values.config
    except Exception as error:  # the file is the user's program: it may raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"Config {spec}: {reason}.") from error
    if not isinstance(config, ConfigDict):
        raise UserError(f"Config {spec}: get_config must return an ml_collections.ConfigDict.")
    check(config)
    return config


def find(path: str) -> pathlib.Path:
    """The config file at `path`, or the one that the package ships under that name."""
    shipped = pathlib.Path(__file__).parent.parent / path
    packaged = pathlib.Path(__file__).parent / path
    for candidate in (pathlib.Path(path), packaged, shipped):
        if candidate.is_file():
            return candidate
    raise UserError(
        f"No config file {path}; give a Python file with get_config, such as "
        "configs/emoji/base64.py."
    )


def check(config: ConfigDict):
    """Checks every key, type and relation of an experiment's config.

    Raises:
      UserError: naming the first key that is missing, foreign, of the wrong type, or at odds
        with another.
    """
    _check_tree("config", config, SCHEMA)
    check_stage(config.stage)
    train = config.train
    if config.text.max_length != config.stage.text_length:
        raise UserError(
            f"config.text.max_length is {config.text.max_length} but config.stage.text_length is "
            f"{config.stage.text_length}; make them equal."
        )
    for key in ("steps", "batch_size", "microbatches", "log_every", "keep_last"):
        if train[key] < 1:
            raise UserError(f"config.train.{key} is {train[key]}; it must be at least 1.")
    if train.batch_size % train.microbatches:
        raise UserError(
            f"config.train.microbatches={train.microbatches} doesn't divide "
            f"config.train.batch_size={train.batch_size}; choose one that does."
        )
    if config.data.crop not in ("centre", "random"):
        raise UserError(f"config.data.crop is {config.data.crop!r}; give 'centre' or 'random'.")


def check_stage(stage: Mapping):
    """Checks a stage's section alone, as a bundle stores it.

    Raises:
      UserError: as `check`.
    """
    _check_tree("config.stage", stage, STAGE)
    check_sampling(stage["sampling"])
    if stage["output"] not in ("x", "eps", "v"):
        raise UserError(f"config.stage.output is {stage['output']!r}; give 'x', 'eps' or 'v'.")
    for key in ("resolution", "channels", "text_width", "text_length"):
        if stage[key] < 1:
            raise UserError(f"config.stage.{key} is {stage[key]}; it must be at least 1.")
    if not 0.0 <= stage["text_drop"] <= 1.0:
        raise UserError(f"config.stage.text_drop is {stage['text_drop']}; give 0 to 1.")
    resolution, lowres, crop = (
        stage[key] for key in ("resolution", "lowres_resolution", "crop_resolution")
    )
    if lowres < 0 or lowres >= resolution:
        raise UserError(
            f"config.stage.lowres_resolution is {lowres}; give less than resolution={resolution}, "
            "or 0 for a base stage."
        )
    if crop and not lowres:
        raise UserError("config.stage.crop_resolution is set on a base stage; set it to 0.")
    if crop and (resolution % lowres or crop % (resolution // lowres) or crop > resolution):
        raise UserError(
            f"config.stage.crop_resolution={crop} must be a multiple of resolution / "
            f"lowres_resolution = {resolution}/{lowres}, itself whole, and at most {resolution}."
        )


def check_sampling(sampling: Mapping):
    """Checks a `sampling` section: a stage's own, or one with the caller's changes.

    Raises:
      UserError: as `check`.
    """
    _check_tree("sampling", sampling, SAMPLING)
    if sampling["steps"] < 1:
        raise UserError(f"Sampling steps are {sampling['steps']}; give at least 1.")
    if not math.isfinite(sampling["guidance"]):
        raise UserError(f"The guidance weight is {sampling['guidance']}; give a finite number.")
    interval = sampling["guidance_interval"]
    if interval and not (len(interval) == 2 and interval[0] < interval[1]):
        raise UserError(f"guidance_interval is {interval}; give (low, high) in logsnr, or ().")
    for key in ("aug_level", "rescale"):
        if not 0.0 <= sampling[key] <= 1.0:
            raise UserError(f"{key} is {sampling[key]}; give 0 to 1.")


def to_json(section) -> dict:
    """A config as plain JSON types (tuples become lists)."""
    plain = section.to_dict() if isinstance(section, ConfigDict) else dict(section)
    return json.loads(json.dumps(plain))


def from_json(tree) -> ConfigDict:
    """The inverse of `to_json`: lists become tuples again."""

    def restore(value):
        if isinstance(value, Mapping):
            return {key: restore(item) for key, item in value.items()}
        return tuple(restore(item) for item in value) if isinstance(value, list) else value

    return ConfigDict(restore(tree))


def _check_tree(where: str, section, schema):
    """Walks a section and its schema together."""
    if isinstance(schema, Part):
        _check_mapping(where, section)
        try:
            registry.check(schema.kind, schema.parts, section, schema.supplied)
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
        return
    if not isinstance(schema, Mapping):
        registry.check_type(where, section, schema)
        return
    _check_mapping(where, section)
    for key in section:
        if key not in schema:
            meant = registry.meant(key, schema)
            raise UserError(f"Unknown key {where}.{key}{meant}; remove it or correct its name.")
    for key, inner in schema.items():
        if key not in section:
            raise UserError(f"Missing key {where}.{key}; state it, a config hides no default.")
        _check_tree(f"{where}.{key}", section[key], inner)


def _check_mapping(where: str, section):
    if not isinstance(section, Mapping | ConfigDict):
        raise UserError(f"{where} is {section!r}; it must be a section with keys of its own.")
