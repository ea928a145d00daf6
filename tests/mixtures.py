"""Data whose exact denoiser is a formula: Gaussians and mixtures of them, value by value."""

import jax
import jax.numpy as jnp
import numpy as np

from cascade.diffusion import process, schedules
from cascade.diffusion.guidance import Denoised

# A mixture of Gaussians on the line, and one Gaussian: (weights, means, spreads).
MIXTURE = (np.array([0.3, 0.7]), np.array([-0.6, 0.5]), np.array([0.2, 0.3]))
GAUSSIAN = (np.array([1.0]), np.array([0.2]), np.array([0.5]))


def noisy_parts(data, logsnr):
    """Means and spreads of z_t's parts, with the parts on the last axis."""
    _, means, spreads = data
    alpha, sigma = schedules.alpha_sigma(jnp.asarray(logsnr)[..., None])
    return alpha * means, jnp.sqrt(jnp.square(alpha * spreads) + jnp.square(sigma))


def exact_denoiser(data):
    """E[x|z_t] for data whose values are independent draws of the mixture, in closed form."""
    weights, means, spreads = data

    def denoise(z_t, logsnr):
        at, spread = noisy_parts(data, process.along_batch(logsnr, z_t))
        alpha, _ = schedules.alpha_sigma(process.along_batch(logsnr, z_t)[..., None])
        off = (z_t[..., None] - at) / spread
        part = jax.nn.softmax(jnp.log(weights) - jnp.log(spread) - 0.5 * jnp.square(off), -1)
        within = means + alpha * jnp.square(spreads) / spread * off
        return Denoised(jnp.sum(part * within, -1))

    return denoise


def cdf(data, z, logsnr):
    at, spread = noisy_parts(data, logsnr)
    return jnp.sum(data[0] * jax.scipy.special.ndtr((z[..., None] - at) / spread), -1)


def exact_solution(data, z_t, logsnr_t, logsnr_s):
    """The probability flow on the line keeps quantiles: F_s(z_s) = F_t(z_t), by bisection."""
    quantile = cdf(data, z_t, logsnr_t)

    def halved(_, bounds):
        low, high = bounds
        middle = 0.5 * (low + high)
        below = cdf(data, middle, logsnr_s) < quantile
        return jnp.where(below, middle, low), jnp.where(below, high, middle)

    bounds = jnp.full_like(z_t, -9.0), jnp.full_like(z_t, 9.0)
    return jax.lax.fori_loop(0, 60, halved, bounds)[0]
