"""What a config holds: the type of each key, and the values that it may have."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from cascade.data.refine import ENCODINGS
from cascade.data.sources import SOURCES
from cascade.diffusion.distillation import OBJECTIVES
from cascade.diffusion.guidance import GUIDANCE_SCHEDULES, THRESHOLDS
from cascade.diffusion.losses import WEIGHTINGS
from cascade.diffusion.samplers import SAMPLERS
from cascade.diffusion.schedules import SCHEDULES
from cascade.diffusion.spacings import SPACINGS
from cascade.networks import NETWORKS
from cascade.text.encoders import ENCODERS
from cascade.text.segment import DTYPES
from cascade.training.optim import LEARNING_RATES, OPTIMIZERS


class Part:
    """A section that a registry's factory defines; `supplied` are the program's own keywords."""

    def __init__(self, kind: str, parts: Mapping, supplied: tuple[str, ...] = ()):
        self.kind, self.parts, self.supplied = kind, parts, supplied


SAMPLING = {
    "sampler": Part("sampler", SAMPLERS),
    "spacing": Part("spacing", SPACINGS),
    "steps": int,
    "searched": tuple,  # of (sampler, levels), for as many steps: go before the spacing
    "guidance": float,
    "guidance_schedule": Part("guidance schedule", GUIDANCE_SCHEDULES),
    "rescale": float,
    "threshold": Part("threshold", THRESHOLDS),
    "aug_level": float,
    "tile": int,  # pixels a side; 0: the whole picture at once
    "tile_overlap": int,
}

STAGE = {
    "resolution": int,
    "channels": int,
    "lowres_resolution": int,  # 0: a base stage
    "crop_resolution": int,  # 0: trains on whole pictures
    "text_width": int,
    "text_length": int,
    "network": Part("network", NETWORKS, ("out_channels", "super_resolution", "layout")),
    "schedule": Part("schedule", SCHEDULES),
    "output": str,
    "learned_variance": bool,
    "weighting": Part("weighting", WEIGHTINGS),
    "text_drop": float,
    "distilled": {"steps": int, "guidance": tuple},  # see `cascade.students`
    "lowres_upsampling": str,
    "aug_schedule": Part("schedule", SCHEDULES),
    "sampling": SAMPLING,
}

SCHEMA = {
    "seed": int,
    "stage": STAGE,
    "text": Part("text encoder", ENCODERS),
    "text_cache": {"folder": str, "dtype": str},
    "data": {
        "source": Part("data source", SOURCES),
        "eval_source": Part("data source", SOURCES),
        "filter": {"min_side": int, "max_aspect": float},
        "ground": str,
        "crop": str,
        "buckets": tuple,  # of (height, width), for training on crops; (): squares alone
        "mirror": float,  # share of training pictures
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

# A further section, `distill`, of configs for `cascade distill`; see docs/distillation.md.
DISTILL = {
    "teacher": str,
    "start_steps": int,
    "end_steps": int,
    "updates_last": int,  # of the students of 2 steps and of 1; the others' are train.steps
    "guidance": tuple,  # (lowest, highest) weight; (): none is distilled
    "threshold": Part("threshold", THRESHOLDS),  # of the guided teacher
    "objective": Part("objective", OBJECTIVES),
}


# Of `cascade data prepare`, whose configs are not experiments'.
PREPARATION = {
    "source": Part("data source", SOURCES),
    "filter": {
        "min_side": int,
        "max_aspect": float,
        "min_caption": int,  # characters
        "max_caption": int,
        "duplicate_bits": int,  # of 64 that may differ between duplicates; -1 keeps them all
    },
    "picture": {
        "side": int,  # the shorter one; smaller pictures stay as they are
        "square": bool,  # cut to the central square
        "ground": str,
        "encoding": str,
        "quality": int,  # of "jpeg"
    },
    "text": Part("text encoder", ENCODERS),
    "shard_records": int,  # of the source, before the filter
    "max_broken_rate": float,
    "samples": int,  # pictures on the statistics page
}


class Range(NamedTuple):
    """The values that a key may hold; NaN and infinity are in no range."""

    contains: Callable[[Any], bool]
    words: str  # completes "it must be ..."


def at_least(low: float) -> Range:
    """low ≤ x < ∞; a bound that is a float says that x is one, which could be infinite."""
    finite = " and finite" if isinstance(low, float) else ""
    return Range(lambda x: low <= x < math.inf, f"at least {low:g}{finite}")


def between(low: float, high: float) -> Range:
    """low ≤ x ≤ high."""
    return Range(lambda x: low <= x <= high, f"from {low} to {high}")


PER_LEVEL = Range(lambda x: x and min(x) >= 1, "one number a level, each at least 1")
FINITE = Range(math.isfinite, "a finite number")
FRACTION = Range(lambda x: 0 <= x < 1, "at least 0 and below 1")

# Laid out as the schemas are. A key of a registered part is checked where the part has it.
SAMPLING_RANGES = {
    "steps": between(1, 100_000),
    "guidance": FINITE,
    "rescale": between(0, 1),
    "aug_level": between(0, 1),
    "tile": at_least(0),
    "tile_overlap": at_least(0),
}

STAGE_RANGES = {
    "resolution": at_least(1),
    "channels": Range(lambda x: x == 3, "3, since the data's pictures are RGB"),
    "lowres_resolution": at_least(0),
    "crop_resolution": at_least(0),
    "text_width": at_least(1),
    "text_length": at_least(1),
    "network": {
        "channels": at_least(1),
        "channel_mults": PER_LEVEL,
        "num_blocks": PER_LEVEL,
        "skip_scale": FINITE,
        "residual_scale": FINITE,
        "embedding_channels": at_least(0),
        "head_channels": at_least(1),
        "text_channels": at_least(0),
        "pool_heads": at_least(0),
        "norm_groups": at_least(1),
        "dropout": FRACTION,
    },
    "text_drop": between(0, 1),
    "distilled": {"steps": at_least(0)},
    "sampling": SAMPLING_RANGES,
}

RANGES = {
    "seed": between(0, 2**32 - 1),
    "stage": STAGE_RANGES,
    "text_cache": {
        "folder": Range(lambda x: x == "" or x.strip(), "the path of a folder, or ''"),
        "dtype": Range(DTYPES.__contains__, f"one of {', '.join(DTYPES)}"),
    },
    "data": {
        "filter": {"min_side": at_least(0), "max_aspect": at_least(1.0)},
        "mirror": between(0, 1),
        "workers": at_least(0),
        "max_broken_rate": between(0, 1),
    },
    "train": {
        "steps": at_least(1),
        "batch_size": at_least(1),
        "microbatches": at_least(1),
        "optimizer": {
            "b1": FRACTION,
            "b2": FRACTION,
            "eps": at_least(0.0),
            "weight_decay": at_least(0.0),
        },
        "learning_rate": {
            "peak": at_least(0.0),
            "warmup_steps": at_least(0),
            "decay_steps": at_least(1),
            "end": at_least(0.0),
        },
        "clip_norm": at_least(0.0),  # 0: none
        "ema_decay": FRACTION,
        "log_every": at_least(1),
        "eval_every": at_least(0),  # 0, here and in the next three: never
        "sample_every": at_least(0),
        "checkpoint_every": at_least(0),
        "keep_every": at_least(0),
        "eval_batches": at_least(0),
        "sample_count": at_least(1),
        "keep_last": at_least(1),
    },
    "distill": {
        "start_steps": at_least(1),
        "end_steps": at_least(1),
        "updates_last": at_least(1),
    },
}

PREPARATION_RANGES = {
    "filter": {
        "min_side": at_least(0),
        "max_aspect": at_least(1.0),
        "min_caption": at_least(0),
        "max_caption": at_least(1),
        "duplicate_bits": between(-1, 7),
    },
    "picture": {
        "side": at_least(1),
        "encoding": Range(ENCODINGS.__contains__, f"one of {', '.join(ENCODINGS)}"),
        "quality": between(1, 100),
    },
    "shard_records": at_least(1),
    "max_broken_rate": between(0, 1),
    "samples": at_least(0),
}
