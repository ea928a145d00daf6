"""Our samplers' steps around a stand-in for a network, to compare with diffusers' schedulers."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import io_callback

from cascade.diffusion import guidance, samplers
from cascade.diffusion.schedules import SCHEDULES
from cascade.diffusion.spacings import SPACINGS
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
    """z after each step of `samplers.sample`, the last of which lands on x_hat.

    The network notes what it is given: noise, then z after each step but the last.
    """
    given = []

    def noted(z_t, logsnr):
        given.append(np.asarray(z_t))
        return network(z_t, logsnr, learned)

    def predict(z_t, logsnr, cond):
        channels = z_t.shape[-1] * (2 if learned else 1)
        output = jax.ShapeDtypeStruct((*z_t.shape[:-1], channels), jnp.float32)
        return io_callback(noted, output, z_t, logsnr, ordered=True)

    conditional = guidance.denoiser(predict, read["output"])
    threshold = build("threshold", guidance.THRESHOLDS, read["sampling"]["threshold"])
    denoise = guidance.thresholded(lambda z, at: conditional(z, at, {}), threshold)
    x = np.asarray(samplers.sample(sampler, denoise, z_1, jnp.asarray(logsnrs), keys))
    return [*given[1:], x]


def ddpm_steps(read: dict, learned: bool, steps: int) -> list[np.ndarray]:
    """`our_steps` of a scheduler's config that was read."""
    schedule = build("schedule", SCHEDULES, read["schedule"])
    spacing = build("spacing", SPACINGS, read["sampling"]["spacing"])
    sampler = build("sampler", samplers.SAMPLERS, read["sampling"]["sampler"])
    return our_steps(read, learned, sampler, spacing(schedule, steps), *start())


def start():
    """Noise z_1 and a random key for each picture."""
    keys = jax.random.split(jax.random.key(1), 2)
    return jax.random.normal(jax.random.key(0), SHAPE), keys
