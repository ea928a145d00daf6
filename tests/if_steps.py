"""Our samplers' steps around a stand-in for a network, to compare with diffusers' schedulers."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from cascade.diffusion import guidance, samplers
from cascade.diffusion.schedules import SCHEDULES
from cascade.registry import build

SHAPE = (2, 6, 6, 3)
COSINE = {"beta_schedule": "squaredcos_cap_v2"}
IF = {
    **COSINE,
    "variance_type": "learned_range",
    "thresholding": True,
    "dynamic_thresholding_ratio": 0.95,
    "sample_max_value": 1.5,
}


def network(z_t, logsnr, learned: bool) -> np.ndarray:
    """Stands for a trained network: an output that depends on all it is given.

    A learned variance goes beyond both of its bounds, -1 and 1, as a trained network's may.
    """
    z_t = np.asarray(z_t)
    output = np.sin(1.5 * z_t + 0.1 * np.asarray(logsnr)[:, None, None, None])
    output = 0.7 * output + 0.4 * np.roll(z_t, 1, 1)
    variance = 1.5 * np.sin(np.roll(z_t, 1, -1))
    return np.concatenate([output, variance] if learned else [output], -1).astype(np.float32)


def our_steps(read: dict, learned: bool, sampler, logsnrs, z_1, keys) -> list[np.ndarray]:
    """z after each step, the last of which lands on x_hat, as `samplers.sample` has it."""

    def predict(z_t, logsnr, cond):
        return jnp.asarray(network(z_t, logsnr, learned))

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


def ddpm_steps(read: dict, learned: bool, steps: int) -> list[np.ndarray]:
    """`our_steps` of a scheduler's config that was read."""
    schedule = build("schedule", SCHEDULES, read["schedule"])
    spacing = build("spacing", samplers.SPACINGS, read["sampling"]["spacing"])
    sampler = build("sampler", samplers.SAMPLERS, read["sampling"]["sampler"])
    return our_steps(read, learned, sampler, spacing(schedule, steps), *start())


def start():
    """Noise z_1 and a random key for each picture."""
    keys = jax.random.split(jax.random.key(1), 2)
    return jax.random.normal(jax.random.key(0), SHAPE), keys
