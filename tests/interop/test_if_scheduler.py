"""Our samplers step as diffusers' schedulers do, on the same noise."""

import inspect
import json

import jax.numpy as jnp
import numpy as np
import pytest
from if_steps import COSINE, IF, ddpm_steps, our_steps, start
from if_torch import diffusers, their_steps, torch

from cascade.diffusion import samplers
from cascade.diffusion.schedules import SCHEDULES, timestep_logsnrs
from cascade.diffusion.spacings import SPACINGS
from cascade.interop import if_scheduler
from cascade.registry import build


def sections(scheduler, learned: bool) -> dict:
    return if_scheduler.read("config", json.loads(scheduler.to_json_string()), learned)


def assert_steps_agree(ours, theirs):
    assert len(ours) == len(theirs)
    error = max(np.abs(a - b).max() for a, b in zip(ours, theirs, strict=True))
    print(f"{len(ours)} steps, largest error {error:.1e}")
    assert error < 1e-4


@pytest.mark.parametrize(
    "config",
    [
        IF,
        {**IF, "sample_max_value": 1.0},
        {**COSINE, "variance_type": "fixed_small"},
        {**COSINE, "variance_type": "fixed_large", "prediction_type": "v_prediction"},
        {"beta_schedule": "linear", "prediction_type": "sample", "clip_sample": False},
        {**IF, "timestep_spacing": "linspace"},
    ],
    ids=["IF I", "IF II", "fixed small", "fixed large, v", "linear, x", "IF, linspace"],
)
@pytest.mark.parametrize("steps", [8, 50])
def test_ddpm(config, steps):
    scheduler = diffusers.DDPMScheduler(**config)
    scheduler.set_timesteps(steps)
    learned = config.get("variance_type") == "learned_range"
    read = sections(scheduler, learned)
    assert_steps_agree(ddpm_steps(read, learned, steps), their_steps(scheduler, learned))


def levels(scheduler):
    """Our noise levels for a scheduler's timesteps, and the clean end."""
    logsnrs = timestep_logsnrs("squaredcos_cap_v2", 1000)[scheduler.timesteps.numpy()]
    return jnp.asarray([*logsnrs, 20.0])


@pytest.mark.parametrize("steps", [8, 50])
def test_ddim(steps):
    """eps is taken from the thresholded x_hat here; an argument of diffusers' step has it so."""
    shared = {key: value for key, value in IF.items() if key != "variance_type"}
    scheduler = diffusers.DDIMScheduler(**shared, set_alpha_to_one=True)
    scheduler.set_timesteps(steps)
    read = sections(diffusers.DDPMScheduler(**shared), False)
    ours = our_steps(read, False, samplers.ddim(), levels(scheduler), *start())
    assert_steps_agree(ours, their_steps(scheduler, False, use_clipped_model_output=True))


@pytest.mark.parametrize("steps", [8, 25])
def test_dpm_solver_2m(steps):
    shared = {key: value for key, value in IF.items() if key != "variance_type"}
    scheduler = diffusers.DPMSolverMultistepScheduler(
        **shared, algorithm_type="dpmsolver++", solver_order=2, final_sigmas_type="zero"
    )
    scheduler.set_timesteps(steps)
    read = sections(diffusers.DDPMScheduler(**shared), False)
    ours = our_steps(read, False, samplers.dpmpp_2m(), levels(scheduler), *start())
    assert_steps_agree(ours, their_steps(scheduler, False))


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("steps", [1, 7, 27, 50, 100, 999, 1000])
def test_spacings_visit_the_same_timesteps(spacing, steps):
    scheduler = diffusers.DDPMScheduler(**COSINE, timestep_spacing=spacing)
    scheduler.set_timesteps(steps)
    read = sections(scheduler, False)
    schedule = build("schedule", SCHEDULES, read["schedule"])
    ours = build("spacing", SPACINGS, read["sampling"]["spacing"])(schedule, steps)
    np.testing.assert_allclose(ours[:-1], levels(scheduler)[:-1], rtol=1e-6)


@pytest.mark.parametrize("betas", if_scheduler.BETAS)
def test_noise_levels_are_those_of_diffusers(betas):
    cumulative = diffusers.DDPMScheduler(beta_schedule=betas).alphas_cumprod.double().numpy()
    alpha = 1 / (1 + np.exp(-timestep_logsnrs(betas, 1000).astype(np.float64)))
    np.testing.assert_allclose(alpha, cumulative, rtol=1e-5, atol=1e-6)


def test_every_option_is_known_with_its_default():
    signature = inspect.signature(diffusers.DDPMScheduler.__init__).parameters
    known = {**if_scheduler.MAPPED, **if_scheduler.BUILT}
    assert known.keys() == signature.keys() - {"self"}
    for key, default in known.items():
        assert signature[key].default == default, key


@pytest.mark.parametrize(
    "config",
    [
        IF,
        {"variance_type": "fixed_large", "clip_sample": False},
        {**COSINE, "prediction_type": "sample", "timestep_spacing": "trailing"},
    ],
)
def test_what_is_written_is_what_was_read(config):
    scheduler = diffusers.DDPMScheduler(**config)
    learned = config.get("variance_type") == "learned_range"
    stage = {**sections(scheduler, learned), "learned_variance": learned}
    again = diffusers.DDPMScheduler.from_config(if_scheduler.write(stage))
    assert sections(again, learned) == sections(scheduler, learned)
    assert torch.equal(again.alphas_cumprod, scheduler.alphas_cumprod)
