"""Configs: Python files with `get_config(arg="")`, read, overridden and checked.

A config states every default. What it leaves out, adds or contradicts is an error that names the
key, before anything is built. Sections that name a registered part ({"name": "ddim", ...}) are
checked against that part's signature.
"""

import json
import pathlib
import re
import runpy
import traceback
from collections.abc import Mapping, Sequence

from absl import flags
from ml_collections import ConfigDict, config_flags

from cascade.checks import check_known, check_ranges, check_rule, check_stage, check_tree
from cascade.errors import UserError
from cascade.schema import DISTILL, RANGES, SCHEMA


def load(spec: str, overrides: Sequence[str] = ()) -> ConfigDict:
    """Reads `path/to/config.py[:arg]`, applies `--config.a.b=value` overrides, and checks it.

    A path that isn't below the current folder is looked for among the configs that ship with the
    package, so `configs/emoji/base64.py` works anywhere.

    Raises:
      UserError: no such file, an error inside it, whatever `check` finds, or a cascade's config,
        which holds several experiments.
    """
    configs = load_stages(spec, overrides)
    if None not in configs:
        path, colon, arg = spec.partition(":")
        raise UserError(
            f"Config {spec} is a cascade of {', '.join(configs)}; name the one that you mean, like "
            f"{path}:{next(iter(configs))}{colon}{arg}."
        )
    return configs[None]


def load_stages(spec: str, overrides: Sequence[str] = ()) -> dict[str | None, ConfigDict]:
    """The experiments in a config file, by name, base first; one alone has the name None.

    A cascade's config is a ConfigDict of experiments' configs, so an override of it begins with a
    name: `--config.base.train.steps=9`.

    Raises:
      UserError: as `load`, or a cascade's stages don't fit one another.
    """
    config = _overridden(spec, overrides)
    nested = [isinstance(value, ConfigDict) and "stage" in value for value in config.values()]
    if not (nested and all(nested)):
        check(config)
        return {None: config}
    for name, experiment in config.items():
        try:
            check(experiment)
        except UserError as error:
            raise UserError(f"Stage {name!r}: {error}") from error
    configs = dict(sorted(config.items(), key=lambda item: item[1].stage.resolution))
    _check_chain(configs)
    return configs


def load_cascade(specs: Sequence[str], overrides: Sequence[str] = ()) -> dict[str, ConfigDict]:
    """A cascade's experiments by name, base first, of one config file or of one for each stage.

    Args:
      specs: one of a cascade, or several of an experiment each, named stage0, stage1, ….
      overrides: each applies to every one of several configs.

    Raises:
      UserError: as `load` and `load_stages`, or the one config is no cascade's.
    """
    if len(specs) == 1:
        configs = load_stages(specs[0], overrides)
        if None in configs:
            raise UserError(f"Config {specs[0]} is of one stage; give one for each of a cascade's.")
        return configs
    loaded = sorted((load(spec, overrides) for spec in specs), key=lambda c: c.stage.resolution)
    configs = {f"stage{i}": config for i, config in enumerate(loaded)}
    _check_chain(configs)
    return configs


def load_as(spec: str, overrides: Sequence[str], schema: Mapping, ranges: Mapping) -> ConfigDict:
    """As `load`, for a config that isn't an experiment's and has a schema of its own."""
    config = _overridden(spec, overrides)
    check_tree("config", config, schema)
    check_ranges("config", config, ranges)
    return config


def _overridden(spec: str, overrides: Sequence[str]) -> ConfigDict:
    config = _read(spec)
    for override in overrides:
        _check_override(config, override)
    _apply(config, overrides)
    return config


def _check_chain(configs: Mapping[str, ConfigDict]):
    """Raises a UserError unless each stage enlarges what the one before draws, from one text."""
    drawn, (first, *_) = 0, configs
    for name, config in configs.items():
        if config.stage.lowres_resolution != drawn:
            raise UserError(
                f"config.{name}.stage.lowres_resolution is {config.stage.lowres_resolution}, but "
                f"the stage before draws {drawn} (0: nothing); make them equal."
            )
        drawn = config.stage.resolution
        if config.text != configs[first].text:
            raise UserError(
                f"config.{name}.text differs from config.{first}.text; text is encoded once for "
                "all stages, so make them equal."
            )


def _read(spec: str) -> ConfigDict:
    """Runs a config file."""
    path, _, arg = spec.partition(":")
    file = str(find(path))
    try:
        names = runpy.run_path(file)
        config = names["get_config"](arg) if "get_config" in names else None
    except (Exception, SystemExit) as error:  # the file is the user's program
        raise UserError(f"Config {spec}: {_reason(error, file)}.") from error
    if "get_config" not in names:
        raise UserError(f'Config {spec} has no get_config; define get_config(arg="") in it.')
    if not isinstance(config, ConfigDict):
        raise UserError(f"Config {spec}: get_config must return an ml_collections.ConfigDict.")
    return config


def _reason(error: BaseException, file: str) -> str:
    """What an error in a config file says, and where in that file; a ValueError's text is enough.

    Other errors' texts may be as short as a missing key, or empty, so they come with their type.
    """
    said = " ".join(str(error).split()).rstrip(".")
    if isinstance(error, ValueError) and said:
        return said
    lines = [at for at in traceback.extract_tb(error.__traceback__) if at.filename == file]
    place = f" (line {lines[-1].lineno}: {lines[-1].line})" if lines else ""
    return type(error).__name__ + (f": {said}" if said else "") + place


def _apply(config: ConfigDict, overrides: Sequence[str]):
    """Lets ml_collections' flags apply the overrides, each as its key's type; locks the config."""
    flag_values, argv = flags.FlagValues(), ["cascade", *overrides]
    config_flags.DEFINE_config_dict("config", config, flag_values=flag_values, sys_argv=argv)
    try:
        flag_values(argv)
    except Exception as error:  # absl's, and whatever parses a value
        said = " ".join(str(error).split()).rstrip(".")
        raise UserError(f"Can't apply an override: {said}.") from error


def _check_override(config: ConfigDict, override: str):
    """Checks that `--config.a.b=value` or `--config.a.b[0]=value` has something to change."""
    match = re.match(r"--config\.([\w.\[\]]+)=", override)
    if not match:
        raise UserError(
            f"Can't read the argument {override!r}; overrides look like --config.train.steps=9."
        )
    where, section = "config", config
    for part in match[1].split("."):
        key, *indices = part.replace("]", "").split("[")
        check_known(where, key, section if isinstance(section, ConfigDict) else {})
        where, section = f"{where}.{key}", section[key]
        for index in indices:
            if not (isinstance(section, tuple) and index.isdigit() and int(index) < len(section)):
                raise UserError(f"{where} has no item [{index}]; correct the index.")
            section = section[int(index)]


def find(path: str) -> pathlib.Path:
    """The config file at `path`, or the one that the package ships under that name."""
    package = pathlib.Path(__file__).parent
    installed = package / path  # configs/ was copied into the package
    editable = package.parent / path  # configs/ lies beside it, in the checkout
    for candidate in (pathlib.Path(path), installed, editable):
        if candidate.is_file():
            return candidate
    raise UserError(
        f"No config file {path!r}; give a Python file with get_config, such as "
        "configs/emoji/base64.py."
    )


def check(config: ConfigDict):
    """Checks every key, type and relation of an experiment's config.

    Raises:
      UserError: naming the first key that is missing, foreign, of the wrong type, or at odds
        with another.
    """
    distills = {"distill": DISTILL} if "distill" in config else {}
    check_tree("config", config, {**SCHEMA, **distills})
    check_ranges("config", config, RANGES)
    check_stage(config.stage)
    train, data, rate = config.train, config.data, config.train.learning_rate
    if config.text.max_length != config.stage.text_length:
        raise UserError(
            f"config.text.max_length is {config.text.max_length} but config.stage.text_length is "
            f"{config.stage.text_length}; make them equal."
        )
    if train.batch_size % train.microbatches:
        raise UserError(
            f"config.train.microbatches={train.microbatches} doesn't divide "
            f"config.train.batch_size={train.batch_size}; choose one that does."
        )
    if "decay_steps" in rate and rate.decay_steps <= rate.warmup_steps:
        raise UserError(
            f"config.train.learning_rate.decay_steps is {rate.decay_steps}; it counts the warm-up "
            f"too, so it must be more than warmup_steps={rate.warmup_steps}."
        )
    if data.crop not in ("centre", "random"):
        raise UserError(f"config.data.crop is {data.crop!r}; give 'centre' or 'random'.")
    if data.crop == "random" and data.cache_decoded:
        raise UserError(
            "config.data.crop is 'random' but config.data.cache_decoded keeps one crop of each "
            "picture; set crop to 'centre' or cache_decoded to False."
        )
    for rule in config.sharding_rules:
        check_rule(rule)


def to_json(section) -> dict:
    """A config as plain JSON types (tuples become lists)."""
    plain = section.to_dict() if isinstance(section, ConfigDict) else dict(section)
    return json.loads(json.dumps(plain))


def from_json(tree) -> ConfigDict:
    """The inverse of `to_json`: lists become tuples again.

    What runs and bundles wrote before `remat` had policies, True or False, is read as the policy
    that it meant, and an interval of guidance from before there were other schedules as its. What
    was trained before there were students is none, and folded no pixels before networks could, nor
    was a picture mirrored.
    """

    def restore(value):
        if isinstance(value, Mapping):
            restored = {key: restore(item) for key, item in value.items()}
            if isinstance(restored.get("remat"), bool):
                restored["remat"] = "blocks" if restored["remat"] else "none"
            if "guidance_interval" in restored:
                interval = restored.pop("guidance_interval")
                limits = dict(zip(("low", "high"), interval, strict=False))
                schedule = {"name": "interval" if limits else "constant", **limits}
                restored |= {"guidance_schedule": schedule, "searched": ()}
            if "embed_aug" in restored:
                restored = {"embed_guidance": False, "patch": 1, **restored}
            if "max_broken_rate" in restored and "eval_source" in restored:
                restored.setdefault("mirror", 0.0)
            if "text_drop" in restored:
                restored.setdefault("distilled", {"steps": 0, "guidance": ()})
            return restored
        return tuple(restore(item) for item in value) if isinstance(value, list) else value

    return ConfigDict(restore(tree))
