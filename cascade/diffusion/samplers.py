"""Samplers: from noise to a picture, one `lax.scan` for any number of steps.

A sampler is a pair of pure functions with an explicit carry. To add one, write a factory that
returns a `Sampler` and name it in SAMPLERS. `cascade.diffusion.spacings` says which noise levels
it visits, docs/samplers.md which sampler is for what.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from cascade.diffusion.guidance import Denoise
from cascade.diffusion.process import (
    along_batch,
    diffuse,
    diffuse_further,
    picture_noise,
    posterior,
    predictions,
)
from cascade.diffusion.schedules import alpha_sigma
from cascade.errors import UserError


class Levels(NamedTuple):
    """Where a step is, scalars in logsnr, t <= s <= r.

    t, s: it goes from z_t to z_s.
    r: where the step after it goes; s itself where there is none.
    """

    t: Array
    s: Array
    r: Array


class Sampler(NamedTuple):
    """One way to go from z_t to z_s.

    init: `init(z_1) -> carry`, whatever the steps hand on to one another.
    step: `step(denoise, z_t, carry, levels, keys) -> (z_s, carry)`, with `Levels` and `keys` [B],
      one random key per picture.
    """

    init: Callable[[Array], Any]
    step: Callable[..., tuple[Array, Any]]


def ddim() -> Sampler:
    """z_s = alpha_s x_hat + sigma_s eps_hat: deterministic, first order (Song et al. 2021)."""

    def step(denoise, z_t, carry, levels, keys):
        x_hat = _denoise(denoise, z_t, levels.t).x
        return ddim_step(z_t, x_hat, levels.t, levels.s), carry

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

    def step(denoise, z_t, carry, levels, keys):
        x_hat, fraction = _denoise(denoise, z_t, levels.t)
        fraction = gamma if fraction is None else fraction
        return _posterior_draw(keys, z_t, x_hat, levels, fraction), carry

    return Sampler(_nothing, step)


def heun() -> Sampler:
    """Heun's second-order step, two evaluations: DDIM, then the mean slope of both its ends.

        z_s = z_t - tan(d / 2) (v_hat(z_t, t) + v_hat(z', s)),   z' = DDIM's z_s,

    where d is the angle between t and s on the circle (alpha, sigma) = (cos, sin) and v_hat =
    dz/dangle (Salimans & Ho 2022, appendix D). The scheme is EDM's (Karras et al. 2022, algorithm
    1). Its variable, sigma/alpha, spans four decades in the first step of a schedule that reaches
    -20, where the trapezium rule fails; the angle is tame at both ends.
    """

    def step(denoise, z_t, carry, levels, keys):
        def slope(z, logsnr):
            return predictions(_denoise(denoise, z, logsnr).x, z, logsnr, "x").v

        alpha_t, sigma_t = alpha_sigma(levels.t)
        alpha_s, sigma_s = alpha_sigma(levels.s)
        sine, cosine = sigma_t * alpha_s - alpha_t * sigma_s, alpha_t * alpha_s + sigma_t * sigma_s
        v_t = slope(z_t, levels.t)
        v_s = slope(cosine * z_t - sine * v_t, levels.s)
        return z_t - sine / (1.0 + cosine) * (v_t + v_s), carry

    return Sampler(_nothing, step)


def dpmpp_2m() -> Sampler:
    """DPM-Solver++(2M): second order from one evaluation a step (Lu et al. 2022, algorithm 2).

    With h = (logsnr_s - logsnr_t) / 2 it is DDIM's step with x_hat extrapolated to

        x_hat + (h / 2 h_last) (x_hat - x_last).

    The first step has no last one: h_last = ∞ makes it first order. The last is `sample`'s, which
    takes x_hat as it is; to extrapolate over so long an h would be worse than DDIM.
    """

    def step(denoise, z_t, carry, levels, keys):
        ahead, carry = _extrapolated(denoise, z_t, carry, levels)
        return ddim_step(z_t, ahead, levels.t, levels.s), carry

    return Sampler(_no_last, step)


def dpmpp_2m_sde() -> Sampler:
    """SDE-DPM-Solver++(2M): `dpmpp_2m`'s x_hat in a step that is random (Lu et al. 2022, §5).

        z_s ~ q(z_s|z_t, x_hat + (h / 2 h_last) (x_hat - x_last)),

    with the exact posterior, so that with x_hat as it is it would be `ancestral` with gamma 0. Of
    Gaussian data both have the exact mean; this one's variance is second order, the other's first.
    """

    def step(denoise, z_t, carry, levels, keys):
        ahead, carry = _extrapolated(denoise, z_t, carry, levels)
        return _posterior_draw(keys, z_t, ahead, levels, 0.0), carry

    return Sampler(_no_last, step)


def addim(*, eta: float = 0.1, variance: float = 0.5) -> Sampler:
    """aDDIM: DDIM with the norm that its noise should have had (Heek et al. 2024, algorithm 3).

        z_s = alpha_s x_hat + sqrt(sigma_s² + w² x_var / mean(eps_hat²)) eps_hat,
        w = alpha_s - alpha_t sigma_s / sigma_t,
        x_var = eta · variance sigma_t² / (alpha_t² variance + sigma_t²)

    DDIM steps by the mean of x given z_t, and so z_s lacks w² Var[x|z_t] a value in its square;
    where x_hat and eps_hat are orthogonal, the longer eps_hat makes up for it exactly. As s → t
    the correction goes as the step's square, and DDIM is left. The paper's 0.1 / (2 + SNR) is
    eta 0.1 of what data of variance 0.5 a value leave open; it takes the mean over a picture.

    Args:
      eta: 0 … 1, the part of that variance which is put back; 0 is DDIM.
      variance: of a picture's values, above 0.

    Raises:
      UserError: eta is outside [0, 1], or variance isn't positive and finite.
    """
    if not 0 <= eta <= 1:
        raise UserError(f"The aDDIM sampler's eta is {eta}; give a number from 0 to 1.")
    if not 0 < variance < float("inf"):
        raise UserError(f"The aDDIM sampler's variance is {variance}; give a positive number.")

    def step(denoise, z_t, carry, levels, keys):
        x_hat = _denoise(denoise, z_t, levels.t).x
        spread = guessed_spread(levels.t, eta, variance)
        longer = adjusted(x_hat, z_t, spread, levels.t, levels.s)
        return ddim_step(z_t, longer, levels.t, levels.s), carry

    return Sampler(_nothing, step)


def stochastic() -> Sampler:
    """A DDIM step of double length, then noised back one (Meng et al. 2022, §3.4).

        z_r = alpha_r x_hat + sigma_r eps_hat,   z_s ~ q(z_s|z_r),

    where r is the level after s. For students of guided distillation, which know few levels. It
    is first order in the mean and the variance; without a level after s it is DDIM.
    """

    def step(denoise, z_t, carry, levels, keys):
        x_hat = _denoise(denoise, z_t, levels.t).x
        z_r = ddim_step(z_t, x_hat, levels.t, levels.r)
        noise = picture_noise(keys, z_t.shape[1:], z_t.dtype)
        return diffuse_further(z_r, noise, levels.r, levels.s), carry

    return Sampler(_nothing, step)


SAMPLERS = {
    "ddim": ddim,
    "ancestral": ancestral,
    "heun": heun,
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_2m_sde": dpmpp_2m_sde,
    "addim": addim,
    "stochastic": stochastic,
}
# What draws by chance: from the same noise z_1 it doesn't come to the same picture.
RANDOM_SAMPLERS = ("ancestral", "dpmpp_2m_sde", "stochastic")


def ddim_step(z_t: Array, x_hat: Array, logsnr_t: Array, logsnr_s: Array) -> Array:
    """alpha_s x_hat + sigma_s eps_hat, with eps_hat = (z_t - alpha_t x_hat) / sigma_t."""
    return diffuse(x_hat, predictions(x_hat, z_t, logsnr_t, "x").eps, logsnr_s)


def adjusted(
    x_hat: Array, z_t: Array, spread: Array | float, logsnr_t: Array, logsnr_s: Array
) -> Array:
    """The x_hat with which DDIM's step is aDDIM's (Heek et al. 2024, algorithm 3).

    One x_hat stands for all x that z_t may come from; DDIM so loses variance. aDDIM lengthens
    eps_hat to keep the norm that z_s should have: of n values in a picture,

        z_s = alpha_s x_hat + sqrt(sigma_s² + gain² spread n / |eps_hat|²) eps_hat,

    with gain = alpha_s - alpha_t sigma_s / sigma_t. A step to logsnr_s = ∞ stays DDIM's: a clean
    picture has no noise to lengthen.

    Args:
      spread: scalar or [B], mean variance of the values of x given z_t.
    """
    logsnr_t, logsnr_s, spread = (along_batch(v, z_t) for v in (logsnr_t, logsnr_s, spread))
    eps = predictions(x_hat, z_t, logsnr_t, "x").eps
    norm = jnp.mean(jnp.square(eps), axis=tuple(range(1, eps.ndim)), keepdims=True)
    alpha_s, sigma_s = alpha_sigma(logsnr_s)
    gain = alpha_s * shrunk(logsnr_t, logsnr_s)
    wanted = spread / jnp.maximum(norm, 1e-12)
    # (sqrt(sigma² + gain² wanted) - sigma) / gain, without a difference or a quotient by gain.
    root = jnp.sqrt(jnp.square(sigma_s) + jnp.square(gain) * wanted)
    ahead = gain * wanted / jnp.where(sigma_s > 0, root + sigma_s, 1.0)
    return x_hat + jnp.where(sigma_s > 0, ahead * eps, 0.0)


def guessed_spread(logsnr: Array, eta: float = 0.1, variance: float = 0.5) -> Array:
    """x_var of `addim`, where no x is known: by default the paper's 0.1 / (2 + SNR)."""
    alpha, sigma = alpha_sigma(logsnr)
    return eta * variance * sigma**2 / (variance * alpha**2 + sigma**2)


def shrunk(logsnr_t: Array, logsnr_s: Array) -> Array:
    """1 - e^½(logsnr_t - logsnr_s), x_hat's part in alpha_s of a DDIM step; 0 where both are ∞."""
    same = logsnr_t == logsnr_s
    start = jnp.where(same, 0.0, logsnr_t)  # ∞ - ∞ is no number
    return jnp.where(same, 0.0, -jnp.expm1(0.5 * (start - logsnr_s)))


def integrate(sampler: Sampler, denoise: Denoise, z: Array, logsnrs: Array, keys: Array) -> Array:
    """Takes z at logsnrs[0] through every level to z at logsnrs[-1], in one `lax.scan`.

    Args:
      z: [B, ...].
      logsnrs: [N + 1], increasing: N steps.
      keys: [B] typed random keys, one per picture; step i uses fold_in(key, i).
    """
    return _scan(sampler, denoise, z, jnp.concatenate([logsnrs, logsnrs[-1:]]), keys)


def sample(sampler: Sampler, denoise: Denoise, z_1: Array, logsnrs: Array, keys: Array) -> Array:
    """Draws pictures [B, ...] from noise z_1 in N steps, the last of which lands on x_hat.

    Args:
      z_1: [B, ...] noise, see `picture_noise`.
      logsnrs: [N + 1], increasing from noise to clean, see SPACINGS. The clean end itself is
        never evaluated: from logsnrs[N - 1] the picture is x_hat.
      keys: [B] typed random keys, one per picture.
    """
    z_t = _scan(sampler, denoise, z_1, logsnrs, keys)
    return _denoise(denoise, z_t, logsnrs[-2]).x


def _scan(sampler, denoise, z, logsnrs, keys):
    """z at logsnrs[-2], from z at logsnrs[0]; the last level is only looked ahead to."""
    logsnrs = logsnrs.astype(z.dtype)

    def body(state, inputs):
        index, levels = inputs
        step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, index)
        z_s, carry = sampler.step(denoise, *state, levels, step_keys)
        return (z_s, carry), None

    levels = Levels(logsnrs[:-2], logsnrs[1:-1], logsnrs[2:])
    steps = (jnp.arange(len(logsnrs) - 2), levels)
    (z_s, _), _ = jax.lax.scan(body, (z, sampler.init(z)), steps)
    return z_s


def _denoise(denoise, z, logsnr):
    return denoise(z, jnp.full(z.shape[:1], logsnr, z.dtype))


def _posterior_draw(keys, z_t, x_hat, levels, fraction):
    """z_s ~ q(z_s|z_t, x_hat), its variance as `posterior` has it."""
    mean, logvar = posterior(z_t, x_hat, levels.t, levels.s, fraction)
    return mean + jnp.exp(0.5 * logvar) * picture_noise(keys, z_t.shape[1:], z_t.dtype)


def _no_last(z_1):
    """The carry of `_extrapolated` before the first step."""
    return jnp.zeros_like(z_1), jnp.asarray(-jnp.inf, z_1.dtype)


def _extrapolated(denoise, z_t, carry, levels):
    """x_hat continued to the middle of the step ahead by the line through the last one."""
    x_last, logsnr_last = carry
    x_hat = _denoise(denoise, z_t, levels.t).x
    gap = levels.t - logsnr_last  # 0 where a dtype can't tell the levels apart: no line then
    stride = jnp.where(gap > 0, 0.5 * (levels.s - levels.t) / jnp.where(gap > 0, gap, 1.0), 0.0)
    return x_hat + stride * (x_hat - x_last), (x_hat, levels.t)


def _nothing(z_1):
    return ()
