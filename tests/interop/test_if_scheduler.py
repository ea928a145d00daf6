"""Our samplers step as diffusers' schedulers do, on the same noise."""

import inspect
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cascade.diffusion import guidance, samplers
from cascade.diffusion.process import picture_noise
from cascade.diffusion.schedules import SCHEDULES, timestep_logsnrs
from cascade.interop import if_scheduler
from cascade.registry import build

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

SHAPE = (2, 6, 6, 3)
COSINE = {"beta_schedule": "squaredcos_cap_v2"}
IF = {
    **COSINE,
    "variance_type": "learned_range",
    "thresholding": True,
    "dynamic_thresholding_ratio": 0.95,
    "sample_max_value": 1.5,
}


def to_torch(picture):
    return torch.from_numpy(np.array(picture).transpose(0, 3, 1, 2))


def from_torch(picture):
    return picture.numpy().transpose(0, 2, 3, 1)


def network(z_t, logsnr, learned: bool):
    """Stands for a trained network: an output that depends on all it is given."""
    z_t = np.asarray(z_t)
    output = np.sin(1.5 * z_t + 0.1 * np.asarray(logsnr)[:, None, None, None])
    output = 0.7 * output + 0.4 * np.roll(z_t, 1, 1)
    variance = np.tanh(np.roll(z_t, 1, -1))
    return np.concatenate([output, variance] if learned else [output], -1).astype(np.float32)


def sections(scheduler, learned: bool) -> dict:
    return if_scheduler.read("config", json.loads(scheduler.to_json_string()), learned)


def our_steps(read: dict, learned: bool, sampler, logsnrs, z_1, keys):
    """z after each step, the last of which lands on x_hat, as `samplers.sample` has it."""

    def predict(z_t, logsnr, cond):
        shape = jax.ShapeDtypeStruct((*z_t.shape[:-1], 6 if learned else 3), jnp.float32)
        return jax.pure_callback(lambda z, at: network(z, at, learned), shape, z_t, logsnr)

    conditional = guidance.denoiser(predict, read["output"])
    threshold = build("threshold", guidance.THRESHOLDS, read["sampling"]["threshold"])
    denoise = guidance.thresholded(lambda z, at: conditional(z, at, {}), threshold)
    z_t, carry, steps = z_1, sampler.init(z_1), []
    for i, (logsnr_t, logsnr_s) in enumerate(itertools.pairwise(logsnrs[:-1])):
        step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, i)
        z_t, carry = sampler.step(denoise, z_t, carry, logsnr_t, logsnr_s, step_keys)
        steps.append(z_t)
    steps.append(denoise(z_t, jnp.full(2, logsnrs[-2])).x)
    return [np.asarray(step) for step in steps]


def their_steps(scheduler, learned: bool, z_1, keys, monkeypatch, **arguments):
    """The same of diffusers' scheduler, whose noise is taken from our keys."""
    drawn = iter(range(10_000))

    def noise(shape, **_):
        step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, next(drawn))
        return to_torch(picture_noise(step_keys, SHAPE[1:]))

    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", noise)
    cumulative = scheduler.alphas_cumprod.double()
    z_t, steps = to_torch(z_1), []
    for t in scheduler.timesteps:
        alpha = cumulative[t]
        logsnr = np.full(2, torch.log(alpha / (1 - alpha)))
        output = to_torch(network(from_torch(z_t), logsnr, learned))
        z_t = scheduler.step(output, t, z_t, return_dict=False, **arguments)[0]
        steps.append(from_torch(z_t))
    return steps


def start():
    keys = jax.random.split(jax.random.key(1), 2)
    return jax.random.normal(jax.random.key(0), SHAPE), keys


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
def test_ddpm(config, steps, monkeypatch):
    scheduler = diffusers.DDPMScheduler(**config)
    scheduler.set_timesteps(steps)
    learned = config.get("variance_type") == "learned_range"
    read = sections(scheduler, learned)
    schedule = build("schedule", SCHEDULES, read["schedule"])
    spacing = build("spacing", samplers.SPACINGS, read["sampling"]["spacing"])
    sampler = build("sampler", samplers.SAMPLERS, read["sampling"]["sampler"])
    z_1, keys = start()
    ours = our_steps(read, learned, sampler, spacing(schedule, steps), z_1, keys)
    assert_steps_agree(ours, their_steps(scheduler, learned, z_1, keys, monkeypatch))


def levels(scheduler):
    """Our noise levels for a scheduler's timesteps, and the clean end."""
    logsnrs = timestep_logsnrs("squaredcos_cap_v2", 1000)[scheduler.timesteps.numpy()]
    return jnp.asarray([*logsnrs, 20.0])


@pytest.mark.parametrize("steps", [8, 50])
def test_ddim(steps, monkeypatch):
    """eps is taken from the thresholded x_hat here; an argument of diffusers' step has it so."""
    shared = {key: value for key, value in IF.items() if key != "variance_type"}
    scheduler = diffusers.DDIMScheduler(**shared, set_alpha_to_one=True)
    scheduler.set_timesteps(steps)
    read = sections(diffusers.DDPMScheduler(**shared), False)
    z_1, keys = start()
    ours = our_steps(read, False, samplers.ddim(), levels(scheduler), z_1, keys)
    theirs = their_steps(scheduler, False, z_1, keys, monkeypatch, use_clipped_model_output=True)
    assert_steps_agree(ours, theirs)


@pytest.mark.parametrize("steps", [8, 25])
def test_dpm_solver_2m(steps, monkeypatch):
    shared = {key: value for key, value in IF.items() if key != "variance_type"}
    scheduler = diffusers.DPMSolverMultistepScheduler(
        **shared, algorithm_type="dpmsolver++", solver_order=2, final_sigmas_type="zero"
    )
    scheduler.set_timesteps(steps)
    read = sections(diffusers.DDPMScheduler(**shared), False)
    z_1, keys = start()
    ours = our_steps(read, False, samplers.dpmpp_2m(), levels(scheduler), z_1, keys)
    assert_steps_agree(ours, their_steps(scheduler, False, z_1, keys, monkeypatch))


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("steps", [1, 7, 27, 50, 100, 999, 1000])
def test_spacings_visit_the_same_timesteps(spacing, steps):
    scheduler = diffusers.DDPMScheduler(**COSINE, timestep_spacing=spacing)
    scheduler.set_timesteps(steps)
    read = sections(scheduler, False)
    schedule = build("schedule", SCHEDULES, read["schedule"])
    ours = build("spacing", samplers.SPACINGS, read["sampling"]["spacing"])(schedule, steps)
    np.testing.assert_allclose(ours[:-1], levels(scheduler)[:-1], atol=2e-5)


@pytest.mark.parametrize("betas", if_scheduler.BETAS)
def test_noise_levels_are_those_of_diffusers(betas):
    cumulative = diffusers.DDPMScheduler(beta_schedule=betas).alphas_cumprod.double().numpy()
    alpha = 1 / (1 + np.exp(-timestep_logsnrs(betas, 1000).astype(np.float64)))
    np.testing.assert_allclose(alpha, cumulative, rtol=2e-4, atol=1e-7)


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
