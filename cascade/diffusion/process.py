"""The diffusion process: q(z_t|x), q(z_s|z_t, x), and what a network's output means.

Pictures are [B, ...], usually [B,H,W,C]; every logsnr is a scalar or [B]. `s < t`, so
logsnr_s > logsnr_t.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from cascade.diffusion.schedules import alpha_sigma
from cascade.errors import UserError

KINDS = ("x", "eps", "v")


class Prediction(NamedTuple):
    """One prediction in all its forms, each shaped as z_t; z_t = alpha x + sigma eps holds.

    `fraction` places a learned variance by the posterior's bounds, see `posterior`; None where
    the network doesn't learn it.
    """

    x: Array
    eps: Array
    v: Array
    fraction: Array | None


def along_batch(value: Array, like: Array) -> Array:
    """Appends axes to `value` [B], so that it broadcasts over `like` [B, ...]; scalars pass."""
    value = jnp.asarray(value)
    return value.reshape(value.shape + (1,) * (like.ndim - value.ndim)) if value.ndim else value


def diffuse(x: Array, eps: Array, logsnr: Array) -> Array:
    """z_t = alpha_t x + sigma_t eps: with eps ~ N(0, 1) a draw of q(z_t|x).

    With a prediction's x and eps at another time it is DDIM's step to `logsnr`.
    """
    alpha, sigma = alpha_sigma(along_batch(logsnr, x))
    return alpha * x + sigma * eps


def diffuse_further(z_s: Array, eps: Array, logsnr_s: Array, logsnr_t: Array) -> Array:
    """With eps ~ N(0, 1) a draw of q(z_t|z_s), from z_s to more noise:

        z_t = (alpha_t / alpha_s) z_s + sigma_t sqrt(1 - SNR_t / SNR_s) eps

    (Kingma et al. 2021, appendix A.1). z_s itself where t = s.
    """
    logsnr_s, logsnr_t = along_batch(logsnr_s, z_s), along_batch(logsnr_t, z_s)
    _, sigma_t = alpha_sigma(logsnr_t)
    keep = jnp.exp(0.5 * (jax.nn.log_sigmoid(logsnr_t) - jax.nn.log_sigmoid(logsnr_s)))
    return keep * z_s + sigma_t * jnp.sqrt(-jnp.expm1(logsnr_t - logsnr_s)) * eps


def picture_noise(keys: Array, shape: tuple[int, ...], dtype=jnp.float32) -> Array:
    """Unit noise [B, *shape] from typed keys [B]: each picture's depends on its own key alone.

    So a picture does not depend on the batch it is drawn in.
    """
    return jax.vmap(lambda key: jax.random.normal(key, shape, dtype))(keys)


def posterior(
    z_t: Array, x: Array, logsnr_t: Array, logsnr_s: Array, fraction: Array | float
) -> tuple[Array, Array]:
    """Mean and log-variance of q(z_s|z_t, x). With r = SNR_t / SNR_s = exp(logsnr_t - logsnr_s):

        mean = r (alpha_s / alpha_t) z_t + (1 - r) alpha_s x
        log variance = log(1 - r) + (1 - fraction) log sigma_s² + fraction log sigma_t²

    `fraction` 0 is the exact posterior, right where x is known; 1 is right where x is unit noise
    of which nothing is known (Ho et al. 2020, §3.2). Between them, in log space, lies what a
    network can learn (Nichol & Dhariwal 2021, eq. 15) or a sampler can choose.

    Args:
      fraction: scalar, [B], or shaped as z_t.

    Returns:
      mean shaped as z_t; log variance that broadcasts against it, -inf where s = t.
    """
    logsnr_t, logsnr_s = along_batch(logsnr_t, z_t), along_batch(logsnr_s, z_t)
    fraction = along_batch(fraction, z_t)
    # alpha_t alone may be tiny; with r it is not, so they are joined before exp.
    log_alpha_ratio = 0.5 * (jax.nn.log_sigmoid(logsnr_s) - jax.nn.log_sigmoid(logsnr_t))
    keep = jnp.exp(logsnr_t - logsnr_s + log_alpha_ratio)
    one_minus_r = -jnp.expm1(logsnr_t - logsnr_s)
    alpha_s, _ = alpha_sigma(logsnr_s)
    log_var_s, log_var_t = jax.nn.log_sigmoid(-logsnr_s), jax.nn.log_sigmoid(-logsnr_t)
    logvar = jnp.log(one_minus_r) + (1.0 - fraction) * log_var_s + fraction * log_var_t
    return keep * z_t + one_minus_r * alpha_s * x, logvar


def split_output(output: Array, channels: int) -> tuple[Array, Array | None]:
    """Splits a network's output [..., C or 2C] into the prediction [..., C] and its fraction.

    The second half o of a learned-variance output becomes (o + 1) / 2, which isn't held to
    [0, 1]: a variance may leave the posterior's bounds (Nichol & Dhariwal 2021, §3.1).

    Raises:
      UserError: the output has neither C nor 2C channels.
    """
    if output.shape[-1] == channels:
        return output, None
    if output.shape[-1] != 2 * channels:
        raise UserError(
            f"The network's output has {output.shape[-1]} channels for pictures of {channels}; "
            f"give it {channels}, or {2 * channels} to learn the variance."
        )
    output, raw = jnp.split(output, 2, axis=-1)
    return output, 0.5 * (raw + 1.0)


def predictions(output: Array, z_t: Array, logsnr: Array, kind: str) -> Prediction:
    """Turns a network's output into x_hat, eps_hat and v_hat, with v = alpha eps - sigma x.

    Args:
      output: [B,H,W,C], or [B,H,W,2C] with a learned variance.
      z_t: [B,H,W,C] what the network saw.
      kind: "x", "eps" or "v": what the output's first C channels are.

    x from eps costs digits as 1/alpha, eps from x as 1/sigma; v is exact at both ends.

    Raises:
      UserError: an unknown `kind`, or a number of channels that doesn't fit.
    """
    check_kind(kind)
    output, fraction = split_output(output, z_t.shape[-1])
    alpha, sigma = alpha_sigma(along_batch(logsnr, z_t))
    if kind == "x":
        x, eps = output, (z_t - alpha * output) / sigma
        v = (alpha * z_t - output) / sigma
    elif kind == "eps":
        x, eps = (z_t - sigma * output) / alpha, output
        v = (output - sigma * z_t) / alpha
    else:
        x, eps = alpha * z_t - sigma * output, sigma * z_t + alpha * output
        v = output
    return Prediction(x, eps, v, fraction)


def check_kind(kind: str):
    """Raises a UserError unless `kind` is one of KINDS."""
    if kind not in KINDS:
        raise UserError(f"Unknown network output {kind!r}; give one of x, eps, v.")
