"""The training objective: a weighted error of the denoiser, and the times it is taken at.

A weighting is a function of logsnr [B] that multiplies the mean squared error of eps, whatever
the network predicts; times are uniform. On the scale of x it is SNR times as much, on that of v
alpha² times, for with z_t given the errors are one: |eps error| = alpha |v error| =
(alpha / sigma) |x error|.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from cascade.diffusion.process import Prediction, along_batch
from cascade.diffusion.schedules import Schedule, alpha_sigma
from cascade.errors import UserError

Weighting = Callable[[Array], Array]
BOUND_STEPS = 1000
BOUND_SCALE = 1e-3


def eps_weighting() -> Weighting:
    """1: the plain eps-MSE (Ho et al. 2020, eq. 14)."""
    return jnp.ones_like


def x_weighting() -> Weighting:
    """1/SNR: the plain x-MSE."""
    return lambda logsnr: jnp.exp(-logsnr)


def v_weighting() -> Weighting:
    """1 + 1/SNR: the plain v-MSE, SNR + 1 on x (Salimans & Ho 2022)."""
    return lambda logsnr: 1.0 + jnp.exp(-logsnr)


def snr_truncated() -> Weighting:
    """max(1, 1/SNR): the larger of x-MSE and eps-MSE, max(SNR, 1) on x (Salimans & Ho 2022)."""
    return lambda logsnr: jnp.exp(jnp.maximum(-logsnr, 0.0))


def min_snr(*, gamma: float) -> Weighting:
    """min(1, gamma/SNR): min(SNR, gamma) on x (Hang et al. 2023).

    Raises:
      UserError: gamma is not positive.
    """
    if not gamma > 0:
        raise UserError(f"The min_snr weighting's gamma is {gamma}; give a positive number.")
    return lambda logsnr: jnp.minimum(1.0, gamma * jnp.exp(-logsnr))


def sigmoid(*, bias: float) -> Weighting:
    """sigmoid(bias - logsnr) · cosh(logsnr / 2).

    VDM++ (Kingma & Gao 2023) and SiD2 (Hoogeboom et al. 2024) weigh the eps-MSE by sigmoid(bias -
    logsnr) over *uniform logsnr*. Uniform times of the cosine schedule have density ∝ sech(logsnr
    / 2) there, which the second factor undoes; on other schedules the product is approximate.
    """
    return lambda logsnr: jax.nn.sigmoid(bias - logsnr) * jnp.cosh(0.5 * logsnr)


WEIGHTINGS = {
    "eps": eps_weighting,
    "x": x_weighting,
    "v": v_weighting,
    "snr_truncated": snr_truncated,
    "min_snr": min_snr,
    "sigmoid": sigmoid,
}


def stratified_times(key: Array, batch: int) -> Array:
    """Times [B] in (0, 1), each uniform, evenly spread over the batch: (i + u) / B with one u.

    Kingma et al. 2021, appendix I.1. Their order is random, so that a part of the batch, such as
    what isn't padding, meets early and late times alike.
    """
    order_key, shift_key = jax.random.split(key)
    t = (jax.random.permutation(order_key, batch) + jax.random.uniform(shift_key)) / batch
    bound = jnp.finfo(t.dtype).epsneg
    return jnp.clip(t, bound, 1.0 - bound)


def denoising_loss(
    prediction: Prediction,
    x: Array,
    eps: Array,
    t: Array,
    schedule: Schedule,
    weighting: Weighting,
) -> Array:
    """weighting(logsnr) · mean (eps - eps_hat)² for each example, [B].

    Taken as alpha² (v - v_hat)², the same number: v's error keeps its digits at both ends of the
    schedule. Where the network learned its variance too, `variance_bound` is added.

    Args:
      prediction: the network's, at z_t = diffuse(x, eps, schedule(t)).
      x, eps: [B,H,W,C] pictures and the noise added.
      t: [B] times.
    """
    logsnr = schedule(t)
    alpha, sigma = alpha_sigma(along_batch(logsnr, x))
    v = alpha * eps - sigma * x
    scale = weighting(logsnr) * jax.nn.sigmoid(logsnr)
    loss = scale * _mean(jnp.square(v - prediction.v))
    if prediction.fraction is None:
        return loss
    return loss + variance_bound(x, prediction.x, prediction.fraction, t, schedule)


def variance_bound(x: Array, x_hat: Array, fraction: Array, t: Array, schedule: Schedule) -> Array:
    """0.001 · T · KL(q(z_s|z_t, x) ‖ p(z_s|z_t)) in nats per value, s = t - 1/T, T = 1000; [B].

    The second term of Improved DDPM's hybrid objective (Nichol & Dhariwal 2021, eq. 16): it
    teaches `fraction` alone, the mean's gradient is stopped. With d = log of p's variance over
    q's, the divergence is (d + expm1(-d) + (SNR_s - SNR_t) (x - x_hat)² e^-d) / 2.

    The last step to a clean picture, s < 1/T, is taken without noise: it counts nothing.
    """
    step = 1.0 / BOUND_STEPS
    s = jnp.maximum(t - step, step)
    logsnr_t, logsnr_s = (along_batch(schedule(u), x) for u in (t, s))
    d = fraction * (jax.nn.log_sigmoid(-logsnr_t) - jax.nn.log_sigmoid(-logsnr_s))
    gain = jnp.exp(logsnr_s) * -jnp.expm1(logsnr_t - logsnr_s)
    error = jnp.square(x - jax.lax.stop_gradient(x_hat))
    divergence = 0.5 * (d + jnp.expm1(-d) + gain * error * jnp.exp(-d))
    return jnp.where(t >= 2.0 * step, BOUND_SCALE * BOUND_STEPS * _mean(divergence), 0.0)


def _mean(value: Array) -> Array:
    return jnp.mean(value, axis=tuple(range(1, value.ndim)))
