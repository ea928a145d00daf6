"""What is done to a condition before the network sees it: noise on `lowres`, text left out."""

import jax
import jax.numpy as jnp
from jax import Array

from cascade.diffusion.process import along_batch, diffuse, picture_noise
from cascade.diffusion.schedules import Schedule
from cascade.errors import UserError


def augment_lowres(
    key: Array, lowres: Array, schedule: Schedule, level: float | Array | None = None
) -> tuple[Array, Array]:
    """Noise conditioning augmentation: a draw of q(z_s|lowres), and its logsnr.

    In training s ~ U(0, 1) for each example; in sampling it is chosen. 0 leaves the picture as it
    is, more lets the stage repaint more of it (Ho et al. 2021, CDM; Saharia et al. 2022, §2.4).

    Args:
      key: one random key, or typed keys [B], one per picture, so that each picture's noise
        doesn't depend on the batch.
      lowres: [B,h,w,C].
      level: None draws s; else s itself, a float or [B], 0 … 1.

    Returns:
      The noised lowres [B,h,w,C] and aug_logsnr [B].

    Raises:
      UserError: a float level outside [0, 1].
    """
    if isinstance(level, int | float) and not 0 <= level <= 1:
        raise UserError(f"The augmentation level is {level}; give a number from 0 to 1.")
    keys = key if key.ndim else jax.random.split(key, len(lowres))
    level_keys, noise_keys = jax.vmap(jax.random.split, out_axes=1)(keys)
    if level is None:
        s = jax.vmap(jax.random.uniform)(level_keys)
    else:
        s = jnp.broadcast_to(jnp.asarray(level, lowres.dtype), lowres.shape[:1])
    eps = picture_noise(noise_keys, lowres.shape[1:], lowres.dtype)
    aug_logsnr = schedule(s)
    noised = diffuse(lowres, eps, aug_logsnr)
    return jnp.where(along_batch(s, lowres) > 0, noised, lowres), aug_logsnr


def upsample_lowres(lowres: Array, size: tuple[int, int]) -> Array:
    """Resizes [B,h,w,C] to [B,H,W,C] bilinearly, corner pixels on corner pixels.

    Output pixel i lies at i (h - 1) / (H - 1) of the input, as DeepFloyd IF has it; the usual
    convention puts the pictures' edges on one another instead.
    """
    for axis, length in enumerate(size, 1):
        last = lowres.shape[axis] - 1
        at = jnp.linspace(0.0, last, length)
        low = jnp.clip(jnp.floor(at).astype(int), 0, max(last - 1, 0))
        weight = (at - low).reshape(-1, *(1,) * (lowres.ndim - axis - 1))
        first, second = (jnp.take(lowres, low + i, axis, mode="clip") for i in (0, 1))
        lowres = first + weight * (second - first)
    return lowres


def drop_text(
    key: Array,
    text_emb: Array,
    text_mask: Array,
    rate: float,
    null_emb: Array | float = 0.0,
    null_mask: Array | bool = False,
) -> tuple[Array, Array]:
    """Replaces each example's text by the null text with probability `rate`, on its own.

    So one network learns both predictions that guidance mixes (Ho & Salimans 2021).

    Args:
      text_emb, text_mask: [B,L,D], [B,L].
      null_emb, null_mask: [L,D], [L], the text encoder's null condition; Imagen's, zeros and a
        cleared mask, by default.

    Returns:
      The new (text_emb, text_mask).

    Raises:
      UserError: rate is outside [0, 1].
    """
    if not 0 <= rate <= 1:
        raise UserError(f"The rate of dropping text is {rate}; give a number from 0 to 1.")
    dropped = jax.random.bernoulli(key, rate, text_emb.shape[:1])
    return (
        jnp.where(dropped[:, None, None], null_emb, text_emb),
        jnp.where(dropped[:, None], null_mask, text_mask),
    )
