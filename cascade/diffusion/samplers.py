"""Samplers: from noise to a picture, one `lax.scan` for any number of steps.

A sampler is a pair of pure functions with an explicit carry. To add one, write a factory that
returns a `Sampler` and name it in SAMPLERS. A spacing says which noise levels it visits.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from cascade.diffusion.guidance import Denoise
from cascade.diffusion.process import diffuse, picture_noise, posterior, predictions
from cascade.diffusion.schedules import Schedule, alpha_sigma
from cascade.errors import UserError

# spacing(schedule, steps) -> logsnr [steps + 1], increasing: the levels that `sample` visits.
Spacing = Callable[[Schedule, int], Array]


class Sampler(NamedTuple):
    """One way to go from z_t to z_s.

    init: `init(z_1) -> carry`, whatever the steps hand on to one another.
    step: `step(denoise, z_t, carry, logsnr_t, logsnr_s, keys) -> (z_s, carry)`, with scalar
      logsnr and `keys` [B], one random key per picture.
    """

    init: Callable[[Array], Any]
    step: Callable[..., tuple[Array, Any]]


def ddim() -> Sampler:
    """z_s = alpha_s x_hat + sigma_s eps_hat: deterministic, first order (Song et al. 2021)."""

    def step(denoise, z_t, carry, logsnr_t, logsnr_s, keys):
        x_hat = _denoise(denoise, z_t, logsnr_t).x
        return _ddim_step(z_t, x_hat, logsnr_t, logsnr_s), carry

    return Sampler(_nothing, step)


def ancestral(*, gamma: float = 0.3) -> Sampler:
    """z_s ~ N(mean, variance) of q(z_s|z_t, x_hat) (Ho et al. 2020, algorithm 2).

    Args:
      gamma: 0 … 1, from the posterior's lower to its upper variance, see `posterior`; a variance
        that the model learned goes before it.

    Raises:
      UserError: gamma is outside [0, 1].
    """
    if not 0 <= gamma <= 1:
        raise UserError(f"The ancestral sampler's gamma is {gamma}; give a number from 0 to 1.")

    def step(denoise, z_t, carry, logsnr_t, logsnr_s, keys):
        x_hat, fraction = _denoise(denoise, z_t, logsnr_t)
        fraction = gamma if fraction is None else fraction
        mean, logvar = posterior(z_t, x_hat, logsnr_t, logsnr_s, fraction)
        return mean + jnp.exp(0.5 * logvar) * picture_noise(keys, z_t.shape[1:], z_t.dtype), carry

    return Sampler(_nothing, step)


def heun() -> Sampler:
    """Heun's second-order step, two evaluations: DDIM, then the mean slope of both its ends.

        z_s = z_t - tan(d / 2) (v_hat(z_t, t) + v_hat(z', s)),   z' = DDIM's z_s,

    where d is the angle between t and s on the circle (alpha, sigma) = (cos, sin) and v_hat =
    dz/dangle (Salimans & Ho 2022, appendix D). The scheme is EDM's (Karras et al. 2022, algorithm
    1). Its variable, sigma/alpha, spans four decades in the first step of a schedule that reaches
    -20, where the trapezium rule fails; the angle is tame at both ends.
    """

    def step(denoise, z_t, carry, logsnr_t, logsnr_s, keys):
        def slope(z, logsnr):
            return predictions(_denoise(denoise, z, logsnr).x, z, logsnr, "x").v

        alpha_t, sigma_t = alpha_sigma(logsnr_t)
        alpha_s, sigma_s = alpha_sigma(logsnr_s)
        sine, cosine = sigma_t * alpha_s - alpha_t * sigma_s, alpha_t * alpha_s + sigma_t * sigma_s
        v_t = slope(z_t, logsnr_t)
        v_s = slope(cosine * z_t - sine * v_t, logsnr_s)
        return z_t - sine / (1.0 + cosine) * (v_t + v_s), carry

    return Sampler(_nothing, step)


def dpmpp_2m() -> Sampler:
    """DPM-Solver++(2M): second order from one evaluation a step (Lu et al. 2022, algorithm 2).

    With h = (logsnr_s - logsnr_t) / 2 it is DDIM's step with x_hat extrapolated to

        x_hat + (h / 2 h_last) (x_hat - x_last).

    The first step has no last one: h_last = ∞ makes it first order. The last is `sample`'s, which
    takes x_hat as it is; to extrapolate over so long an h would be worse than DDIM.
    """

    def init(z_1):
        return jnp.zeros_like(z_1), jnp.asarray(-jnp.inf, z_1.dtype)

    def step(denoise, z_t, carry, logsnr_t, logsnr_s, keys):
        x_last, logsnr_last = carry
        x_hat = _denoise(denoise, z_t, logsnr_t).x
        stride = 0.5 * (logsnr_s - logsnr_t) / (logsnr_t - logsnr_last)
        ahead = x_hat + stride * (x_hat - x_last)
        return _ddim_step(z_t, ahead, logsnr_t, logsnr_s), (x_hat, logsnr_t)

    return Sampler(init, step)


SAMPLERS = {"ddim": ddim, "ancestral": ancestral, "heun": heun, "dpmpp_2m": dpmpp_2m}


def uniform() -> Spacing:
    """Times spaced evenly from 1 down to 0."""

    def spacing(schedule, steps):
        _check_steps(steps)
        return schedule(jnp.linspace(1.0, 0.0, steps + 1))

    return spacing


def leading(*, train_steps: int) -> Spacing:
    """Timesteps 0, k, 2k, … of a discrete schedule, with k = train_steps // steps.

    This and the next two are the rules of Lin et al. 2023, table 2. Of a model trained on
    `train_steps` discrete times, timestep i is time (i + 1) / train_steps.
    """

    return _discrete_spacing(train_steps, lambda steps, i: i * (train_steps // steps))


def linspace(*, train_steps: int) -> Spacing:
    """Timesteps from 0 to the last, spaced evenly and rounded. See `leading`."""

    def timestep(steps, i):
        return round(i * ((train_steps - 1) / max(steps - 1, 1)))

    return _discrete_spacing(train_steps, timestep)


def trailing(*, train_steps: int) -> Spacing:
    """Timesteps from the last down, train_steps / steps apart and rounded. See `leading`."""

    def timestep(steps, i):
        return round(train_steps - (steps - 1 - i) * (train_steps / steps)) - 1

    return _discrete_spacing(train_steps, timestep)


SPACINGS = {"uniform": uniform, "leading": leading, "linspace": linspace, "trailing": trailing}


def _discrete_spacing(train_steps: int, timestep: Callable[[int, int], int]) -> Spacing:
    """logsnr at `timestep(steps, i)`, i from steps - 1 down to 0, and at time 0 after them."""

    def spacing(schedule, steps):
        _check_steps(steps, train_steps)
        times = [(timestep(steps, i) + 1) / train_steps for i in reversed(range(steps))]
        return schedule(jnp.array([*times, 0.0], jnp.float32))

    return spacing


def integrate(sampler: Sampler, denoise: Denoise, z: Array, logsnrs: Array, keys: Array) -> Array:
    """Takes z at logsnrs[0] through every level to z at logsnrs[-1], in one `lax.scan`.

    Args:
      z: [B, ...].
      logsnrs: [N + 1], increasing: N steps.
      keys: [B] typed random keys, one per picture; step i uses fold_in(key, i).
    """
    logsnrs = logsnrs.astype(z.dtype)

    def body(state, inputs):
        z_t, carry = state
        index, logsnr_t, logsnr_s = inputs
        step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, index)
        return sampler.step(denoise, z_t, carry, logsnr_t, logsnr_s, step_keys), None

    levels = (jnp.arange(len(logsnrs) - 1), logsnrs[:-1], logsnrs[1:])
    (z_s, _), _ = jax.lax.scan(body, (z, sampler.init(z)), levels)
    return z_s


def sample(sampler: Sampler, denoise: Denoise, z_1: Array, logsnrs: Array, keys: Array) -> Array:
    """Draws pictures [B, ...] from noise z_1 in N steps, the last of which lands on x_hat.

    Args:
      z_1: [B, ...] noise, see `picture_noise`.
      logsnrs: [N + 1], increasing from noise to clean, see SPACINGS. The clean end itself is
        never evaluated: from logsnrs[N - 1] the picture is x_hat.
      keys: [B] typed random keys, one per picture.
    """
    z_t = integrate(sampler, denoise, z_1, logsnrs[:-1], keys)
    return _denoise(denoise, z_t, logsnrs[-2]).x


def _check_steps(steps: int, most: float = math.inf):
    """Raises a UserError unless `steps` is from 1 to `most`."""
    if not 1 <= steps <= most:
        limits = "1 or more" if most == math.inf else f"1 to {most}, a schedule's timesteps"
        raise UserError(f"Sampling was asked to take {steps} steps; give {limits}.")


def _denoise(denoise, z, logsnr):
    return denoise(z, jnp.full(z.shape[:1], logsnr, z.dtype))


def _ddim_step(z_t, x_hat, logsnr_t, logsnr_s):
    return diffuse(x_hat, predictions(x_hat, z_t, logsnr_t, "x").eps, logsnr_s)


def _nothing(z_1):
    return ()
