"""Denoisers, and what is wrapped around them: threshold ∘ guide ∘ denoiser ∘ network.

A conditional denoiser is `denoise(z_t, logsnr, cond) -> Denoised`, a plain one lacks `cond`;
z_t is [B,H,W,C], logsnr [B], cond a dict of arrays [B, ...]. Samplers see only plain ones.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from cascade.diffusion.process import along_batch, check_kind, predictions
from cascade.errors import UserError


class Denoised(NamedTuple):
    """x_hat [B,H,W,C], and the variance's `fraction` (as `posterior`'s) if it was learned."""

    x: Array
    fraction: Array | None = None


Denoise = Callable[[Array, Array], Denoised]
ConditionalDenoise = Callable[[Array, Array, dict], Denoised]
Threshold = Callable[[Array], Array]
Weight = float | Array | Callable[[Array], Array]  # a function is of logsnr [B]
# schedule(guidance_weight, levels) -> Weight; levels are logsnr [N + 1], those of a spacing.
GuidanceSchedule = Callable[[float | Array, Array], Weight]


def denoiser(predict: Callable[[Array, Array, dict], Array], kind: str) -> ConditionalDenoise:
    """Makes a conditional denoiser of a network `predict(z_t, logsnr, cond) -> output`.

    Raises:
      UserError: an unknown `kind`; it is "x", "eps" or "v".
    """
    check_kind(kind)

    def denoise(z_t, logsnr, cond):
        prediction = predictions(predict(z_t, logsnr, cond), z_t, logsnr, kind)
        return Denoised(prediction.x, prediction.fraction)

    return denoise


def guide(
    denoise: ConditionalDenoise,
    cond: dict,
    null_cond: dict,
    guidance_weight: Weight,
    rescale: float = 0.0,
) -> Denoise:
    """Classifier-free guidance: eps = w eps(cond) + (1 - w) eps(null), with w = guidance_weight.

    Ho & Salimans 2021 in Imagen's scale, where w = 1 is no guidance. At a given z_t, eps is
    affine in x, so the same mix is made of x. The variance's fraction is the conditional one.

    Args:
      cond, null_cond: dicts with the same keys and shapes; `null_cond` holds the text encoder's
        null condition or a negative prompt, and the same `lowres` and `aug_logsnr`.
      guidance_weight: a float, an array [B] for a weight per picture, or a function of logsnr [B]
        that gives such (see GUIDANCE_SCHEDULES). The float 1 costs one evaluation; all else costs
        one evaluation on a doubled batch.
      rescale: 0 … 1, how far the guided x's spread over each picture is brought back to that of
        the conditional x (Lin et al. 2023, eq. 15-16).

    Raises:
      UserError: w is not finite, rescale is outside [0, 1], or the keys differ.
    """
    _check_guidance(cond, null_cond, guidance_weight, rescale)
    if _is_off(guidance_weight):
        return lambda z_t, logsnr: denoise(z_t, logsnr, cond)

    def guided(z_t, logsnr):
        pair = (z_t, logsnr, cond), (z_t, logsnr, null_cond)
        x, fraction = denoise(*jax.tree.map(lambda *two: jnp.concatenate(two), *pair))
        x_cond, x_null = jnp.split(x, 2)
        weight = guidance_weight(logsnr) if callable(guidance_weight) else guidance_weight
        weight = along_batch(jnp.asarray(weight, x.dtype), x_cond)
        x_hat = weight * x_cond + (1.0 - weight) * x_null
        if rescale:
            x_hat = rescale * _with_spread_of(x_cond, x_hat) + (1.0 - rescale) * x_hat
        return Denoised(x_hat, None if fraction is None else jnp.split(fraction, 2)[0])

    return guided


def constant() -> GuidanceSchedule:
    """The guidance weight at every level."""
    return lambda guidance_weight, levels: guidance_weight


def interval(*, low: float, high: float) -> GuidanceSchedule:
    """The guidance weight where low < logsnr < high, and 1 elsewhere (Kynkäänniemi et al. 2024).

    It changes pictures, not the cost.

    Raises:
      UserError: low isn't below high.
    """
    if not low < high:
        raise UserError(
            f"The guidance interval is ({low}, {high}); give logsnr limits, lower first."
        )

    def schedule(guidance_weight, levels):
        def weight(logsnr):
            return jnp.where((logsnr > low) & (logsnr < high), guidance_weight, 1.0)

        return guidance_weight if _is_off(guidance_weight) else weight

    return schedule


def oscillating(*, steps: int, low: float) -> GuidanceSchedule:
    """The guidance weight for `steps` steps, then `low`, the weight, `low`, the weight, …

    Imagen Video's (Ho et al. 2022): a high weight's likeness to the prompt without all of its
    saturation. A level belongs to the step that begins nearest to it, so that a sampler which
    evaluates between, or at, two of the levels is guided there too. A guidance weight of 1 is no
    guidance at all.

    Args:
      steps: how many steps keep the guidance weight before it first becomes `low`.
      low: the other weight, 1 in the paper.

    Raises:
      UserError: steps is negative, or low isn't finite.
    """
    if steps < 0:
        raise UserError(f"Oscillating guidance begins after {steps} steps; give 0 or more.")
    if not math.isfinite(low):
        raise UserError(f"Oscillating guidance's low weight is {low}; give a finite number.")

    def schedule(guidance_weight, levels):
        starts = levels[:-1]
        borders = 0.5 * (starts[:-1] + starts[1:])

        def weight(logsnr):
            step = jnp.searchsorted(borders.astype(logsnr.dtype), logsnr)
            is_low = (step >= steps) & ((step - steps) % 2 == 0)
            return jnp.where(is_low, low, guidance_weight)

        return guidance_weight if _is_off(guidance_weight) else weight

    return schedule


GUIDANCE_SCHEDULES = {"constant": constant, "interval": interval, "oscillating": oscillating}


def thresholded(denoise: Denoise, threshold: Threshold) -> Denoise:
    """Applies `threshold` to every x_hat of `denoise`."""

    def bounded(z_t, logsnr):
        x, fraction = denoise(z_t, logsnr)
        return Denoised(threshold(x), fraction)

    return bounded


def threshold_static(x: Array) -> Array:
    """Clips x_hat to [-1, 1]."""
    return jnp.clip(x, -1.0, 1.0)


def threshold_dynamic(x: Array, percentile: float, cap: float) -> Array:
    """x_hat <- clip(x_hat, -s, s) / s with s = percentile of |x_hat| in its picture, in [1, cap].

    Saharia et al. 2022, §2.3 (Imagen: 99.5, no cap); the cap is DeepFloyd's (95, and 1.5 or 1).

    Args:
      x: [B, ...]; each picture has its own s.
      percentile: 0 … 100, interpolated linearly between values.
      cap: largest s; 1 is static thresholding.
    """
    spread = jnp.percentile(jnp.abs(x).reshape(x.shape[0], -1), percentile, axis=1)
    s = along_batch(jnp.clip(spread, 1.0, cap), x)
    return jnp.clip(x, -s, s) / s


def no_threshold() -> Threshold:
    """Leaves x_hat as it is."""
    return lambda x: x


def static_threshold() -> Threshold:
    """See `threshold_static`."""
    return threshold_static


def dynamic_threshold(*, percentile: float, cap: float) -> Threshold:
    """See `threshold_dynamic`.

    Raises:
      UserError: percentile is outside (0, 100], or cap is below 1.
    """
    if not 0 < percentile <= 100:
        raise UserError(f"Dynamic thresholding's percentile is {percentile}; give (0, 100].")
    if not cap >= 1:
        raise UserError(f"Dynamic thresholding's cap is {cap}; give 1 or more.")
    return lambda x: threshold_dynamic(x, percentile, cap)


THRESHOLDS = {"none": no_threshold, "static": static_threshold, "dynamic": dynamic_threshold}


def _is_off(guidance_weight: Weight) -> bool:
    """Whether it is the number 1, known before anything is traced."""
    return isinstance(guidance_weight, int | float) and guidance_weight == 1


def _with_spread_of(reference: Array, x: Array) -> Array:
    axes = tuple(range(1, x.ndim))
    wanted, spread = (jnp.std(each, axes, keepdims=True) for each in (reference, x))
    # A flat picture has no spread to bring back.
    return x * jnp.where(spread > 0, wanted / jnp.where(spread > 0, spread, 1.0), 1.0)


def _check_guidance(cond, null_cond, guidance_weight, rescale):
    if isinstance(guidance_weight, int | float) and not math.isfinite(guidance_weight):
        raise UserError(f"The guidance weight is {guidance_weight}; give a finite number.")
    if not 0 <= rescale <= 1:
        raise UserError(f"The guidance rescale is {rescale}; give a number from 0 to 1.")
    if cond.keys() != null_cond.keys():
        raise UserError(
            f"The condition has {sorted(cond)} but the null condition {sorted(null_cond)}; "
            "give both the same keys."
        )
