"""Noise schedules: logsnr(t), decreasing in t ∈ [0, 1], within [-20, 20].

A factory takes what its config section states and returns the function of t. Beyond ±20 float32
cannot tell `alpha` from 1 at one end nor `sigma` at the other, so no schedule goes there.
"""

import itertools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from cascade.errors import UserError

Schedule = Callable[[Array], Array]
LOGSNR_BOUND = 20.0
BETAS = ("squaredcos_cap_v2", "linear")


def alpha_sigma(logsnr: Array) -> tuple[Array, Array]:
    """Signal and noise scales (alpha, sigma) = (sqrt sigmoid(logsnr), sqrt sigmoid(-logsnr)).

    Through log_sigmoid both keep their relative precision at either end. Shapes as `logsnr`.
    """
    return jnp.exp(0.5 * jax.nn.log_sigmoid(logsnr)), jnp.exp(0.5 * jax.nn.log_sigmoid(-logsnr))


def cosine(*, logsnr_min: float, logsnr_max: float) -> Schedule:
    """logsnr(t) = -2 log tan(a t + b), from `logsnr_max` at t = 0 to `logsnr_min` at t = 1.

    Nichol & Dhariwal 2021 in the continuous form of Salimans & Ho 2022.

    Raises:
      UserError: the limits don't satisfy -20 <= logsnr_min < logsnr_max <= 20.
    """
    _check_limits(logsnr_min, logsnr_max)
    return _shifted(0.0, logsnr_min, logsnr_max)


def linear(*, start: float, growth: float) -> Schedule:
    """logsnr(t) = -log expm1(start + growth t²): DDPM's linear betas in continuous time.

    DDPM (betas 1e-4 … 0.02 over 1000 steps; Ho et al. 2020) is start = 1e-4, growth = 10, as in
    Kingma et al. 2021, "Variational diffusion models".

    Raises:
      UserError: the schedule would not decrease, or would leave [-20, 20].
    """
    if not (math.exp(-LOGSNR_BOUND) < start and growth > 0 and start + growth <= LOGSNR_BOUND):
        raise UserError(
            f"A linear schedule with start {start} and growth {growth} leaves logsnr's range "
            "[-20, 20]; give start > 2.1e-9, growth > 0 and start + growth <= 20."
        )

    def logsnr(t):
        return -jnp.log(jnp.expm1(start + growth * jnp.square(t)))

    return logsnr


def shifted_cosine(
    *, resolution: int, base_resolution: int, logsnr_min: float, logsnr_max: float
) -> Schedule:
    """The cosine schedule of `base_resolution`, moved by 2 log(base_resolution / resolution).

    At `resolution` this noises a picture as much as the plain cosine noises the same picture at
    `base_resolution`. The limits hold after the shift. Hoogeboom et al. 2023, "Simple diffusion".

    Raises:
      UserError: a resolution is below 1, or the limits are wrong as for `cosine`.
    """
    _check_limits(logsnr_min, logsnr_max)
    return _shifted(_shift(base_resolution, resolution), logsnr_min, logsnr_max)


def interpolated_cosine(
    *,
    resolution: int,
    coarse_resolution: int,
    fine_resolution: int,
    logsnr_min: float,
    logsnr_max: float,
) -> Schedule:
    """logsnr(t) = t · shifted(coarse)(t) + (1 - t) · shifted(fine)(t).

    Shapes are drawn as if at `coarse_resolution` and details, late, as if at `fine_resolution`.
    Hoogeboom et al. 2023, "Simple diffusion".

    Raises:
      UserError: coarse_resolution > fine_resolution, or as for `shifted_cosine`.
    """
    _check_limits(logsnr_min, logsnr_max)
    if coarse_resolution > fine_resolution:
        raise UserError(
            f"An interpolated schedule goes from a coarse to a fine resolution, not from "
            f"{coarse_resolution} to {fine_resolution}; swap them."
        )
    coarse = _shifted(_shift(coarse_resolution, resolution), logsnr_min, logsnr_max)
    fine = _shifted(_shift(fine_resolution, resolution), logsnr_min, logsnr_max)

    def logsnr(t):
        return t * coarse(t) + (1.0 - t) * fine(t)

    return logsnr


def discrete(*, betas: str, train_steps: int) -> Schedule:
    """The schedule of a DDPM that was trained on `train_steps` discrete timesteps.

    Timestep i is time (i + 1) / train_steps; logsnr is linear between timesteps, and 20 at t = 0.
    Times within a thousandth of a timestep are taken for it, since float32 can't name all exactly
    and the cosine's last step is steep.

    Args:
      betas: as `timestep_logsnrs`.

    Raises:
      UserError: as `timestep_logsnrs`.
    """
    levels = jnp.concatenate([jnp.array([LOGSNR_BOUND]), timestep_logsnrs(betas, train_steps)])

    def logsnr(t):
        step = t * train_steps
        off = jax.lax.stop_gradient(jnp.round(step) - step)
        step += jnp.where(jnp.abs(off) < 1e-3, off, 0.0)
        return jnp.interp(step, jnp.arange(train_steps + 1.0), levels)

    return logsnr


def timestep_logsnrs(betas: str, train_steps: int) -> Array:
    """logsnr of each timestep of a discrete DDPM, decreasing, float32 [train_steps].

    alpha_i² is the product of 1 - beta_j for j ≤ i. It is computed in Python's floats, 64 bits
    wide, and held to [-20, 20].

    Args:
      betas: "squaredcos_cap_v2": 1 - f(i + 1) / f(i), at most 0.999, with f(i) =
        cos²(π/2 · (i / train_steps + 0.008) / 1.008) (Nichol & Dhariwal 2021, eq. 17);
        "linear": from 1e-4 to 0.02 (Ho et al. 2020).
      train_steps: how many timesteps.

    Raises:
      UserError: other betas, or fewer than two timesteps.
    """
    if betas not in BETAS:
        raise UserError(f"Unknown betas {betas!r}; choose from {', '.join(BETAS)}.")
    if train_steps < 2:
        raise UserError(f"A schedule of {train_steps} timesteps is too short; give 2 or more.")

    def level(i):
        return math.cos((i / train_steps + 0.008) / 1.008 * (math.pi / 2)) ** 2

    def beta(i):
        if betas == "linear":
            return 1e-4 + (0.02 - 1e-4) * i / (train_steps - 1)
        return min(1.0 - level(i + 1) / level(i), 0.999)

    log_signals = itertools.accumulate(math.log1p(-beta(i)) for i in range(train_steps))
    logsnrs = [log - math.log(-math.expm1(log)) for log in log_signals]  # log is log alpha²
    return jnp.clip(jnp.array(logsnrs, jnp.float32), -LOGSNR_BOUND, LOGSNR_BOUND)


def _shift(base_resolution: int, resolution: int) -> float:
    if base_resolution < 1 or resolution < 1:
        raise UserError(
            f"A schedule's resolutions are {base_resolution} and {resolution}; give 1 or more."
        )
    return 2.0 * math.log(base_resolution / resolution)


def _shifted(shift: float, logsnr_min: float, logsnr_max: float) -> Schedule:
    clean = math.atan(math.exp(-0.5 * (logsnr_max - shift)))
    noise = math.atan(math.exp(0.5 * (logsnr_min - shift)))
    span = 0.5 * math.pi - clean - noise

    def logsnr(t):
        # Near π/2 float32 has no digits left for tan, so each half is measured from its own end.
        first = jnp.less(t, 0.5)
        angle = span * jnp.where(first, t, 1.0 - t) + jnp.where(first, clean, noise)
        value = jnp.where(first, -2.0, 2.0) * jnp.log(jnp.tan(angle)) + shift
        return jnp.clip(value, logsnr_min, logsnr_max)

    return logsnr


def _check_limits(logsnr_min: float, logsnr_max: float):
    if not -LOGSNR_BOUND <= logsnr_min < logsnr_max <= LOGSNR_BOUND:
        raise UserError(
            f"A schedule from logsnr {logsnr_max} down to {logsnr_min} is not possible; give "
            "-20 <= logsnr_min < logsnr_max <= 20."
        )


SCHEDULES = {
    "cosine": cosine,
    "linear": linear,
    "shifted_cosine": shifted_cosine,
    "interpolated_cosine": interpolated_cosine,
    "discrete": discrete,
}
