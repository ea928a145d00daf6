"""Spacings: which noise levels a sampler visits.

A spacing is `spacing(schedule, steps) -> logsnr [steps + 1]`, increasing from noise to clean;
`cascade.diffusion.samplers.sample` evaluates all of them but the last. To add one, write a factory
that returns a spacing and name it in SPACINGS.
"""

import itertools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import Array

from cascade.diffusion.schedules import LOGSNR_BOUND, Schedule
from cascade.errors import UserError

Spacing = Callable[[Schedule, int], Array]


def uniform() -> Spacing:
    """Times spaced evenly from 1 down to 0."""

    def spacing(schedule, steps):
        _check_steps(steps)
        return schedule(jnp.linspace(1.0, 0.0, steps + 1))

    return spacing


def uniform_logsnr() -> Spacing:
    """logsnr spaced evenly between the schedule's ends (Lu et al. 2022, DPM-Solver, §3.3)."""

    def spacing(schedule, steps):
        _check_steps(steps)
        return jnp.linspace(*_ends(schedule), steps + 1, dtype=jnp.float32)

    return spacing


def karras(*, rho: float = 7.0, sigma_min: float = 0.0, sigma_max: float = 0.0) -> Spacing:
    """Noise over signal, sigma / alpha = exp(-logsnr / 2), spaced evenly in its rho-th root:

        (sigma_max^(1/rho) + i / (N - 1) (sigma_min^(1/rho) - sigma_max^(1/rho)))^rho

    for i = 0 … N - 1, and the schedule's clean end after them (Karras et al. 2022, eq. 5; theirs
    are rho 7, sigma_min 0.002 and sigma_max 80).

    Args:
      rho: 1 or more; the larger, the more levels at the clean end.
      sigma_min, sigma_max: 0 is the schedule's own end. Both must lie within its ends.

    Raises:
      UserError: rho is below 1, or the limits are no numbers, swapped or beyond the schedule's.
    """
    if not 1 <= rho < math.inf:
        raise UserError(f"The Karras spacing's rho is {rho}; give a number of 1 or more.")
    if not (0 <= sigma_min < math.inf and 0 <= sigma_max < math.inf):
        raise UserError(
            f"The Karras spacing goes from sigma {sigma_max} to {sigma_min}; give positive numbers,"
            " or 0 for the schedule's own end."
        )

    def spacing(schedule, steps):
        _check_steps(steps)
        noisy, clean = _ends(schedule)
        largest, smallest = math.exp(-0.5 * noisy), math.exp(-0.5 * clean)
        high, low = sigma_max or largest, sigma_min or smallest
        # A schedule's ends are float32, and a thousandth more is no other level.
        if not 0.999 * smallest <= low < high <= 1.001 * largest:
            raise UserError(
                f"The Karras spacing goes from sigma {high:g} to {low:g}, but the schedule from "
                f"{largest:g} to {smallest:g}; give sigma_min < sigma_max within its ends."
            )
        roots = [high ** (1 / rho), low ** (1 / rho)]
        sigmas = [roots[0] + i / max(steps - 1, 1) * (roots[1] - roots[0]) for i in range(steps)]
        levels = [-2.0 * rho * math.log(root) for root in sigmas]
        return jnp.array([*(min(max(level, noisy), clean) for level in levels), clean], jnp.float32)

    return spacing


def given(*, levels: tuple[float, ...]) -> Spacing:
    """Just these levels, for as many steps as they make: what `cascade tune-steps` finds.

    Args:
      levels: N + 1 of them in logsnr, increasing, within [-20, 20].

    Raises:
      UserError: fewer than two levels, or one that doesn't increase or isn't in the range; when it
        is used, another number of steps than N.
    """
    check_levels("The given spacing", levels)

    def spacing(schedule, steps):
        _check_steps(steps)
        if steps != len(levels) - 1:
            raise UserError(
                f"The given spacing has levels for {len(levels) - 1} steps and sampling was asked "
                f"to take {steps}; give as many steps, or another spacing."
            )
        return jnp.array(levels, jnp.float32)

    return spacing


def check_levels(what: str, levels: Sequence[float]):
    """Raises a UserError, beginning with `what`, unless `levels` are some, increasing, in range."""
    numbers = all(isinstance(level, int | float) for level in levels) and len(levels) > 1
    rising = numbers and all(low < high for low, high in itertools.pairwise(levels))
    if not (rising and max(-levels[0], levels[-1]) <= LOGSNR_BOUND):
        raise UserError(
            f"{what} has the levels {tuple(levels)}; give two or more in logsnr, each above the one"
            " before, from -20 to 20."
        )


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


SPACINGS = {
    "uniform": uniform,
    "uniform_logsnr": uniform_logsnr,
    "karras": karras,
    "given": given,
    "leading": leading,
    "linspace": linspace,
    "trailing": trailing,
}


def _discrete_spacing(train_steps: int, timestep: Callable[[int, int], int]) -> Spacing:
    """logsnr at `timestep(steps, i)`, i from steps - 1 down to 0, and at time 0 after them."""

    def spacing(schedule, steps):
        _check_steps(steps, train_steps)
        times = [(timestep(steps, i) + 1) / train_steps for i in reversed(range(steps))]
        return schedule(jnp.array([*times, 0.0], jnp.float32))

    return spacing


def _ends(schedule: Schedule) -> tuple[float, float]:
    """The schedule's least and largest logsnr, as numbers even where jax traces."""
    with jax.ensure_compile_time_eval():
        return float(schedule(jnp.array(1.0))), float(schedule(jnp.array(0.0)))


def _check_steps(steps: int, most: float = math.inf):
    """Raises a UserError unless `steps` is from 1 to `most`."""
    if not 1 <= steps <= most:
        limits = "1 or more" if most == math.inf else f"1 to {most}, a schedule's timesteps"
        raise UserError(f"Sampling was asked to take {steps} steps; give {limits}.")
