"""What a student of few steps is to answer: progressive and multistep consistency distillation.

An objective is a function that returns the target, and OBJECTIVES names them; every one is

    objective(key, x, teacher, student, schedule, steps, fraction) -> Example

with x [B, ...] clean pictures, teacher and student plain denoisers (`diffusion.guidance`; a guided
or thresholded teacher is one too), `schedule` logsnr(t), `steps` the number N of DDIM steps in
which the student is to draw, and `fraction` how far training has come, from 0 to 1; either may be
traced, one program serves them all. What comes back carries no gradient of teacher or student, and
is float32 where x is less.

All of it is made of DDIM's step from t to s,

    z_s = (sigma_s / sigma_t) z_t + alpha_s (1 - e^½(logsnr_t - logsnr_s)) x_hat.

Two steps in a row, t → m → s, are one step with a mean of their pictures (`joined`): a target is
never taken from a difference of z's, which at logsnr -20 would leave it no digits. The last step of
a drawing lands on x_hat itself, as `samplers.sample`'s does: time 0 is a level of logsnr ∞ here,
at which the formulas hold as they stand.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from cascade.diffusion.guidance import Denoise
from cascade.diffusion.losses import Weighting, stratified_times
from cascade.diffusion.process import Prediction, along_batch, diffuse, predictions
from cascade.diffusion.samplers import adjusted, ddim_step, guessed_spread, shrunk
from cascade.diffusion.schedules import Schedule
from cascade.errors import UserError

# Heek et al. 2024: how much of the teacher's squared error counts as spread of x given z_t.
SPREAD_OF_ERROR = 0.75


class Example(NamedTuple):
    """The student, given z_t [B, ...] at logsnr_t [B], is to answer x [B, ...].

    `weight` [B] says how much its squared error there counts, besides the loss's weighting.
    """

    z_t: Array
    logsnr_t: Array
    x: Array
    weight: Array


Objective = Callable[..., Example]


def progressive(*, backward: bool) -> Objective:
    """One step of the student is to do what two of the teacher do (Salimans & Ho 2022, alg. 2).

    With i uniform in 0 … N-1, t = (i + 1) / N, m = t - 1 / 2N and s = i / N, the target is the x
    with which DDIM goes from z_t to where the teacher's steps t → m → s lead. At i = 0 this is
    the teacher's x_hat at m.

    Args:
      backward: z_t is the student's own, see `trajectory`, instead of noised x.
    """

    def objective(key, x, teacher, student, schedule, steps, fraction):
        _check_steps(steps)
        x = _wide(x)
        time_key, noise_key = jax.random.split(key)
        i = _uniform_index(time_key, len(x), steps)
        logsnr_t, logsnr_m = schedule((i + 1) / steps), schedule((i + 0.5) / steps)
        logsnr_s = _level(schedule, i / steps)
        eps = jax.random.normal(noise_key, x.shape, x.dtype)
        if backward:
            z_t = trajectory(student, eps, schedule, steps, logsnr_t, steps - 1)
        else:
            z_t = diffuse(x, eps, logsnr_t)
        first = _answer(teacher, z_t, logsnr_t)
        z_m = ddim_step(z_t, first, logsnr_t, logsnr_m)
        second = _answer(teacher, z_m, logsnr_m)
        target = joined(first, second, logsnr_t, logsnr_m, logsnr_s)
        return Example(z_t, logsnr_t, target, jnp.ones_like(logsnr_t))

    return objective


def consistency(*, backward: bool, teacher_steps_start: int, teacher_steps_end: int) -> Objective:
    """Multistep consistency (Heek, Hoogeboom & Salimans 2024, algorithm 1), in N segments of time.

    From anywhere in the segment (r, r + 1/N] the student's DDIM step to r is to lead to the same
    z_r. T teacher steps cover all of time, T/N each segment; t is uniform among their ends and
    s = t - 1/T. The target is the x with which DDIM goes from z_t to where the teacher's step t → s
    and the student's t → r, from there, lead; at s = r it is the teacher's, and at r = 0, s > 0 the
    student's x_hat at s. The teacher's step is `samplers.adjusted`. N = 1 are consistency models
    (Song et al. 2023), large N diffusion models.

    The error that counts is z_r's, as in the paper's equation 6: from t a step moves z_r by
    1 - e^½(logsnr_t - logsnr_r) of what x_hat errs, in units of alpha_r, and the square of that,
    over the same from the segment's start r + 1/N, is the example's `weight`. At a border the
    answer jumps, between the one that leads to the border and the one that leads away from it, and
    a network can't; weighted so, it keeps to the second, which is drawn with, since the first
    moves nothing there. The paper's algorithm has weight 1.

    Args:
      backward: z_t is the student's own, see `trajectory`, instead of noised x.
      teacher_steps_start, teacher_steps_end: T at `fraction` 0 and 1, log-linear between, each
        rounded to whole steps a segment, at least one. The paper's are 64 and 1280.

    Raises:
      UserError: not 1 <= teacher_steps_start <= teacher_steps_end.
    """
    if not 1 <= teacher_steps_start <= teacher_steps_end:
        raise UserError(
            f"The consistency objective's teacher steps go from {teacher_steps_start} to "
            f"{teacher_steps_end}; give 1 or more, and no fewer at the end."
        )

    def objective(key, x, teacher, student, schedule, steps, fraction):
        _check_steps(steps)
        x = _wide(x)
        time_key, noise_key = jax.random.split(key)
        each = _annealed(teacher_steps_start, teacher_steps_end, fraction, steps)
        index = _uniform_index(time_key, len(x), steps * each)
        segment, total = index // each, steps * each
        logsnr_t, logsnr_r = schedule((index + 1) / total), _level(schedule, segment / steps)
        whole = shrunk(schedule((segment + 1) / steps), logsnr_r)
        # A segment's own end, to the bit, lest a step of no length be one of rounding errors.
        at_end = index == segment * each
        logsnr_s = jnp.where(at_end, logsnr_r, schedule(index / total))
        eps = jax.random.normal(noise_key, x.shape, x.dtype)
        if backward:
            z_t = trajectory(student, eps, schedule, steps, logsnr_t, steps)
        else:
            z_t = diffuse(x, eps, logsnr_t)
        first = _answer(teacher, z_t, logsnr_t)
        spread = guessed_spread(logsnr_t) if backward else _measured_spread(first, x)
        first = adjusted(first, z_t, spread, logsnr_t, logsnr_s)
        z_s = ddim_step(z_t, first, logsnr_t, logsnr_s)
        # Where s is the clean end the student's answer counts nothing; its level is a finite one.
        second = _answer(student, z_s, jnp.minimum(logsnr_s, schedule(0.0)))
        target = joined(first, second, logsnr_t, logsnr_s, logsnr_r)
        weight = jnp.square(shrunk(logsnr_t, logsnr_r) / whole)
        return Example(z_t, logsnr_t, target, weight)

    return objective


OBJECTIVES = {"progressive": progressive, "consistency": consistency}


def matching() -> Objective:
    """The student is to answer what the teacher does, at any time (Meng et al. 2023, §3.1).

    The first stage of guided distillation: with a guided teacher, a student that is told the
    weight learns its two evaluations as one. It needs no steps, and is none of OBJECTIVES, which
    make steps fewer.
    """

    def objective(key, x, teacher, student, schedule, steps, fraction):
        x = _wide(x)
        time_key, noise_key = jax.random.split(key)
        logsnr_t = schedule(stratified_times(time_key, len(x)))
        z_t = diffuse(x, jax.random.normal(noise_key, x.shape, x.dtype), logsnr_t)
        return Example(z_t, logsnr_t, _answer(teacher, z_t, logsnr_t), jnp.ones_like(logsnr_t))

    return objective


def distillation_loss(prediction: Prediction, example: Example, weighting: Weighting) -> Array:
    """weight · weighting(logsnr) · mean (eps - eps_hat)² of each example, [B], of its x's eps.

    The same number as weight · SNR · weighting · mean (x - x_hat)², by way of v as in
    `denoising_loss`: "snr_truncated" is max(SNR, 1) on x (Salimans & Ho 2022). A learned variance
    isn't trained.

    Args:
      prediction: the student's, at z_t = example.z_t.
    """
    v = predictions(example.x, example.z_t, example.logsnr_t, "x").v
    error = jnp.mean(jnp.square(v - prediction.v), axis=tuple(range(1, v.ndim)))
    return example.weight * weighting(example.logsnr_t) * jax.nn.sigmoid(example.logsnr_t) * error


def joined(first: Array, second: Array, logsnr_t: Array, logsnr_m: Array, logsnr_s: Array) -> Array:
    """The x whose DDIM step t → s goes where t → m with `first` and m → s with `second` lead.

        x = first + w (second - first),  w = (1 - e^½(m - s)) / (1 - e^½(t - s))

    with t, m and s for their logsnr, t < m <= s: (z_s - (sigma_s / sigma_t) z_t) / (alpha_s -
    (sigma_s / sigma_t) alpha_t) of Salimans & Ho 2022, in which z_t has cancelled. w lies from 0
    (m = s) to 1 (logsnr_s = ∞).
    """
    t, m, s = (along_batch(level, first) for level in (logsnr_t, logsnr_m, logsnr_s))
    return first + shrunk(m, s) / shrunk(t, s) * (second - first)


def trajectory(
    student: Denoise, z_1: Array, schedule: Schedule, steps: int, logsnr_t: Array, most: int
) -> Array:
    """Takes noise z_1 to logsnr_t [B] by the student's own DDIM steps, N to the whole of time.

    Backward distillation (Kohler et al. 2024, "Imagine Flash", §4.1): what the student is trained
    on is what it will see when it draws, nothing of x. A level within a step is met on the way of
    that step, z_t = alpha_t x_hat + sigma_t eps_hat of the step's start.

    Args:
      z_1: [B, ...] unit noise.
      most: steps that the lowest of logsnr_t may be away, each an evaluation of the student.
    """

    def step(n, z):
        start, end = (jnp.full_like(logsnr_t, schedule(1.0 - k / steps)) for k in (n, n + 1))
        x_hat = _answer(student, z, start)
        on_the_way = along_batch(start < logsnr_t, z)
        return jnp.where(on_the_way, ddim_step(z, x_hat, start, jnp.minimum(end, logsnr_t)), z)

    return jax.lax.fori_loop(0, most, step, z_1)


def _level(schedule, t):
    """logsnr(t), and ∞ at t = 0."""
    return jnp.where(t > 0, schedule(t), jnp.inf)


def _uniform_index(key, batch, count):
    """Whole numbers [batch], floats, uniform in 0 … count-1 and evenly spread over the batch."""
    return jnp.minimum(jnp.floor(stratified_times(key, batch) * count), count - 1)


def _annealed(start, end, fraction, steps):
    """Teacher steps a segment, a scalar, whole."""
    fraction = jnp.clip(fraction, 0.0, 1.0)
    total = jnp.exp((1.0 - fraction) * math.log(start) + fraction * math.log(end))
    return jnp.maximum(jnp.round(total / steps), 1.0)


def _measured_spread(x_hat, x):
    """The teacher's error is a draw of what z_t leaves open, and known where x is."""
    return SPREAD_OF_ERROR * jnp.mean(jnp.square(x_hat - x), axis=tuple(range(1, x.ndim)))


def _answer(denoise, z, logsnr):
    """x_hat as `_wide` has it, and a constant to whoever differentiates."""
    return jax.lax.stop_gradient(_wide(denoise(z, logsnr).x))


def _wide(x):
    """float32 at least."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _check_steps(steps):
    if isinstance(steps, int) and steps < 1:
        raise UserError(f"A student was asked to draw in {steps} steps; give 1 or more.")
