"""Checks a config's sections against their schemas, and what a stage's says against itself."""

import re
from collections.abc import Mapping

from ml_collections import ConfigDict

from cascade import registry
from cascade.diffusion.samplers import SAMPLERS
from cascade.diffusion.spacings import check_levels
from cascade.errors import UserError
from cascade.networks import NETWORKS
from cascade.parallel.mesh import AXES
from cascade.schema import SAMPLING, SAMPLING_RANGES, STAGE, STAGE_RANGES, Part
from cascade.students import check_drawing


def check_stage(stage: Mapping):
    """Checks a stage's section alone, as a bundle stores it.

    Raises:
      UserError: naming the first key that is missing, foreign, of the wrong type, or at odds
        with another.
    """
    check_tree("config.stage", stage, STAGE)
    check_ranges("config.stage", stage, STAGE_RANGES)
    supplied = {"out_channels": stage["channels"], "super_resolution": False, "layout": None}
    registry.build("network", NETWORKS, stage["network"], **supplied).check()
    check_sampling(stage["sampling"], "config.stage.sampling")
    check_drawing(stage, stage["sampling"])
    if stage["output"] not in ("x", "eps", "v"):
        raise UserError(f"config.stage.output is {stage['output']!r}; give 'x', 'eps' or 'v'.")
    if stage["lowres_upsampling"] not in ("after_noise", "before_noise"):
        raise UserError(
            f"config.stage.lowres_upsampling is {stage['lowres_upsampling']!r}; give 'after_noise' "
            "or 'before_noise'."
        )
    resolution, lowres, crop = (
        stage[key] for key in ("resolution", "lowres_resolution", "crop_resolution")
    )
    if lowres >= resolution:
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


def check_sampling(sampling: Mapping, where: str = "sampling"):
    """Checks a `sampling` section: a stage's own, or one with the caller's changes.

    Args:
      where: what errors call the section.

    Raises:
      UserError: naming the first key that is missing, foreign, of the wrong type, or at odds
        with another.
    """
    check_tree(where, sampling, SAMPLING)
    check_ranges(where, sampling, SAMPLING_RANGES)
    for key, part in SAMPLING.items():
        if isinstance(part, Part):
            try:
                registry.build(part.kind, part.parts, sampling[key])
            except UserError as error:
                raise UserError(f"{where}.{key}: {error}") from error
    for entry in sampling["searched"]:
        pair = isinstance(entry, tuple) and len(entry) == 2 and isinstance(entry[1], tuple)
        if not pair or entry[0] not in SAMPLERS:
            raise UserError(
                f"{where}.searched holds {entry!r}; give pairs (sampler, levels) with one of "
                f"{', '.join(SAMPLERS)}."
            )
        check_levels(f"{where}.searched for {entry[0]}", entry[1])
    if 0 < sampling["tile"] <= sampling["tile_overlap"]:
        raise UserError(
            f"{where}.tile_overlap is {sampling['tile_overlap']}; give less than "
            f"tile={sampling['tile']}."
        )


def check_tree(where: str, section, schema):
    """Raises a UserError unless a section has its schema's keys, each of its type.

    Args:
      where: what errors call the section.
    """
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
        check_known(where, key, schema)
    for key, inner in schema.items():
        if key not in section:
            raise UserError(f"Missing key {where}.{key}; state it, a config hides no default.")
        check_tree(f"{where}.{key}", section[key], inner)


def _check_mapping(where: str, section):
    if not isinstance(section, Mapping | ConfigDict):
        raise UserError(f"{where} is {section!r}; it must be a section with keys of its own.")


def check_known(where: str, key: str, known: Mapping):
    """Raises a UserError unless a section may have such a key."""
    if key not in known:
        meant = registry.meant(key, known)
        raise UserError(f"Unknown key {where}.{key}{meant}; remove it or correct its name.")


def check_ranges(where: str, section: Mapping, ranges: Mapping):
    """Raises a UserError unless every value that `ranges` speak of lies in its range."""
    for key, allowed in ranges.items():
        if key not in section:  # another part of the same registry has it
            continue
        if isinstance(allowed, Mapping):
            check_ranges(f"{where}.{key}", section[key], allowed)
        elif not allowed.contains(section[key]):
            raise UserError(f"{where}.{key} is {section[key]!r}; it must be {allowed.words}.")


def check_rule(rule):
    """Raises a UserError unless this can be one of `config.sharding_rules`: (pattern, spec)."""
    try:
        pattern, spec = rule
        re.compile(pattern)
        axes = [axis for entry in spec for axis in (entry if type(entry) is tuple else (entry,))]
        named = [axis for axis in axes if axis is not None]
        sound = isinstance(spec, tuple) and set(named) <= {*AXES} and len(set(named)) == len(named)
    except (TypeError, ValueError, re.error):
        sound = False
    if not sound:
        raise UserError(
            f"config.sharding_rules holds {rule!r}; give (pattern, spec) pairs such as "
            f"('conv.*kernel', (None, 'fsdp')), with the axes {', '.join(AXES)}, each at most once."
        )
