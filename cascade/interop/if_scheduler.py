"""A DeepFloyd IF scheduler_config.json as keys of our stage section, and back.

Names, defaults and meanings are those of diffusers 0.42's `DDPMScheduler`. Writing is the inverse
of reading, as in `cascade.interop.if_unet`.
"""

from collections.abc import Mapping
from typing import Any

from cascade.interop.description import Description
from cascade.networks.layers import TIMESTEPS

BETAS = ("squaredcos_cap_v2", "linear")
SPACINGS = ("leading", "linspace", "trailing")
OUTPUTS = {"epsilon": "eps", "sample": "x", "v_prediction": "v"}
# variance_type -> the ancestral sampler's gamma; a variance that was learned goes before it.
LEARNED = {"learned_range": 0.0}
FIXED = {"fixed_small": 0.0, "fixed_large": 1.0}

MAPPED = {  # key -> default
    "beta_schedule": "linear",
    "clip_sample": True,
    "dynamic_thresholding_ratio": 0.995,
    "prediction_type": "epsilon",
    "sample_max_value": 1.0,
    "thresholding": False,
    "timestep_spacing": "leading",
    "variance_type": "fixed_small",
}
BUILT = {  # key -> the only value that is built here
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "clip_sample_range": 1.0,
    "num_train_timesteps": TIMESTEPS,
    "rescale_betas_zero_snr": False,
    "steps_offset": 0,
    "trained_betas": None,
}


def read(where: str, description: Mapping[str, Any], learned_variance: bool) -> dict[str, Any]:
    """What a scheduler's config says: a stage section's `schedule`, `output` and `sampling`.

    Args:
      where: the file, for messages.
      learned_variance: whether the network learned it; the scheduler must agree.

    Raises:
      UserError: naming an option that isn't built here.
    """
    d = Description(where, description, stated=(), mapped=MAPPED, built=BUILT)
    gamma = d.one_of("variance_type", LEARNED if learned_variance else FIXED)
    return {
        "schedule": _schedule(d),
        "output": d.one_of("prediction_type", OUTPUTS),
        "sampling": {
            "sampler": {"name": "ancestral", "gamma": gamma},
            "spacing": {
                "name": d.one_of("timestep_spacing", SPACINGS),
                "train_steps": TIMESTEPS,
            },
            "threshold": _threshold(d),
        },
    }


def read_noising(where: str, description: Mapping[str, Any]) -> dict[str, Any]:
    """The schedule section of an image_noising_scheduler.

    It adds noise and never samples, so that options of sampling may have any value. Those that
    make the noise are mapped or must be as built, as a scheduler's.

    Raises:
      UserError: naming an option that isn't built here.
    """
    return _schedule(Description(where, description, stated=(), mapped=MAPPED, built=BUILT))


def _schedule(d: Description) -> dict[str, Any]:
    betas = d.one_of("beta_schedule", BETAS)
    return {"name": "discrete", "betas": betas, "train_steps": TIMESTEPS}


def _threshold(d: Description) -> dict[str, Any]:
    """Dynamic, else static, else none: where both are on, diffusers does the former alone."""
    ratio = d.number("dynamic_thresholding_ratio", float, 0.0)
    cap = d.number("sample_max_value", float, 1.0)
    static = d.one_of("clip_sample", (False, True))
    if d.one_of("thresholding", (False, True)):
        return {"name": "dynamic", "percentile": 100.0 * ratio, "cap": cap}
    return {"name": "static" if static else "none"}


def write(stage: Mapping[str, Any]) -> dict[str, Any]:
    """The scheduler_config.json of a stage, or of the nearest that diffusers can express."""
    sampling = stage["sampling"]
    sampler = sampling["sampler"]
    large = sampler["name"] == "ancestral" and sampler["gamma"] == FIXED["fixed_large"]
    fixed = "fixed_large" if large else "fixed_small"
    outputs = {ours: theirs for theirs, ours in OUTPUTS.items()}
    spacing, threshold = sampling["spacing"]["name"], sampling["threshold"]
    dynamic = threshold["name"] == "dynamic"
    return {
        **_written_schedule(stage["schedule"]),
        "variance_type": "learned_range" if stage["learned_variance"] else fixed,
        "prediction_type": outputs[stage["output"]],
        "timestep_spacing": spacing if spacing in SPACINGS else SPACINGS[0],
        "thresholding": dynamic,
        "clip_sample": threshold["name"] != "none",
        "dynamic_thresholding_ratio": threshold["percentile"] / 100.0 if dynamic else 0.995,
        "sample_max_value": threshold["cap"] if dynamic else 1.0,
    }


def write_noising(stage: Mapping[str, Any]) -> dict[str, Any]:
    """The scheduler_config.json that noises a stage's low-resolution input."""
    return {**MAPPED, **_written_schedule(stage["aug_schedule"])}


def _written_schedule(section: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "_class_name": "DDPMScheduler",
        **BUILT,
        "beta_schedule": section["betas"] if section["name"] == "discrete" else "linear",
    }
