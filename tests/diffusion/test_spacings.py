"""Spacings: their ends, their order, their formulas, and what they refuse."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cascade import registry
from cascade.diffusion import schedules, spacings
from cascade.errors import UserError

BOUNDS = {"logsnr_min": -20.0, "logsnr_max": 20.0}
CONTINUOUS = {
    "uniform": spacings.uniform(),
    "uniform_logsnr": spacings.uniform_logsnr(),
    "karras": spacings.karras(),
}


@pytest.mark.parametrize("steps", [1, 2, 10, 250])
@pytest.mark.parametrize("limits", [BOUNDS, {"logsnr_min": -9.0, "logsnr_max": 12.0}])
@pytest.mark.parametrize("name", CONTINUOUS)
def test_levels_run_from_noise_to_clean(name, limits, steps):
    schedule = schedules.cosine(**limits)
    levels = np.asarray(CONTINUOUS[name](schedule, steps))
    assert levels.shape == (steps + 1,)
    np.testing.assert_allclose(levels[[0, -1]], list(limits.values()), rtol=1e-5)
    # Karras' last level is the clean end already; after it comes that end itself.
    within = levels[:-1] if name == "karras" else levels
    assert np.all(np.diff(within) > 0) and np.all(np.diff(levels) >= 0)


def test_uniform_is_even_in_time_and_uniform_logsnr_in_logsnr():
    schedule = schedules.cosine(**BOUNDS)
    levels = spacings.uniform()(schedule, 10)
    np.testing.assert_allclose(levels[4], schedule(np.float32(0.6)), rtol=1e-5)
    even = spacings.uniform_logsnr()(schedule, 10)
    np.testing.assert_allclose(np.diff(even), 4.0, rtol=1e-5)


def test_karras_is_even_in_the_root_of_sigma():
    spacing = spacings.karras(rho=7.0, sigma_min=0.002, sigma_max=80.0)
    levels = np.asarray(spacing(schedules.cosine(**BOUNDS), 18), np.float64)
    sigmas = np.exp(-0.5 * levels[:-1])
    # Karras et al. 2022, table 1 and eq. 5.
    np.testing.assert_allclose(sigmas[[0, -1]], [80.0, 0.002], rtol=1e-5)
    np.testing.assert_allclose(np.diff(sigmas ** (1 / 7), 2), 0.0, atol=1e-6)
    assert levels[-1] == 20.0


@pytest.mark.parametrize("name", CONTINUOUS)
def test_a_spacing_is_the_same_inside_a_program(name):
    schedule = schedules.linear(start=1e-4, growth=10.0)
    inside = jax.jit(lambda: CONTINUOUS[name](schedule, 6))()
    np.testing.assert_allclose(inside, CONTINUOUS[name](schedule, 6), rtol=1e-6)


def test_given_levels_are_what_was_given():
    levels = (-15.0, -2.5, 1.0, 20.0)
    section = {"name": "given", "levels": levels}
    spacing = registry.build("spacing", spacings.SPACINGS, section)
    np.testing.assert_array_equal(spacing(schedules.cosine(**BOUNDS), 3), levels)
    with pytest.raises(UserError, match="levels for 3 steps and sampling was asked to take 8"):
        spacing(schedules.cosine(**BOUNDS), 8)


@pytest.mark.parametrize(
    "levels", [(), (1.0,), (1.0, 1.0), (2.0, 1.0), (0.0, float("nan")), (-21.0, 0.0), (0.0, 20.5)]
)
def test_levels_that_are_none_are_refused(levels):
    with pytest.raises(UserError, match="each above the one before, from -20 to 20"):
        spacings.given(levels=levels)


@pytest.mark.parametrize(
    ("keywords", "said"),
    [
        ({"rho": 0.5}, "rho is 0.5"),
        ({"rho": float("inf")}, "rho is inf"),
        ({"sigma_min": -1.0}, "give positive numbers"),
        ({"sigma_max": float("nan")}, "give positive numbers"),
        ({"sigma_min": 2.0, "sigma_max": 1.0}, "sigma_min < sigma_max within its ends"),
        ({"sigma_max": 1e5}, "sigma_min < sigma_max within its ends"),
        ({"sigma_min": 1e-6}, "sigma_min < sigma_max within its ends"),
    ],
)
def test_impossible_karras_limits_are_refused(keywords, said):
    with pytest.raises(UserError, match=said):
        spacings.karras(**keywords)(schedules.cosine(**BOUNDS), 5)


@pytest.mark.parametrize("name", CONTINUOUS)
def test_no_steps_are_refused(name):
    for steps in (0, -3):
        with pytest.raises(UserError, match="1 or more"):
            CONTINUOUS[name](schedules.cosine(**BOUNDS), steps)


@given(st.sampled_from(["leading", "linspace", "trailing"]), st.integers(1, 1000))
@settings(deadline=None)
def test_discrete_spacings_visit_timesteps_in_order_and_end_clean(name, steps):
    visited = []
    spacing = spacings.SPACINGS[name](train_steps=1000)
    levels = spacing(lambda t: visited.append(np.asarray(t, np.float64)) or -t, steps)
    (times,) = visited
    timesteps = times[:-1] * 1000 - 1
    assert len(levels) == steps + 1 and times[-1] == 0
    np.testing.assert_allclose(timesteps, timesteps.round(), atol=1e-3)
    assert np.all(np.diff(timesteps) < -0.5) and timesteps[0] < 999.5 and timesteps[-1] > -0.5


def test_discrete_spacings_as_their_table_has_them():
    """Lin et al. 2023, table 2: 1000 timesteps, here in five steps."""
    expected = {
        "leading": [800, 600, 400, 200, 0],
        "linspace": [999, 749, 500, 250, 0],
        "trailing": [999, 799, 599, 399, 199],
    }
    for name, timesteps in expected.items():
        levels = spacings.SPACINGS[name](train_steps=1000)(lambda t: t * 1000 - 1, 5)
        np.testing.assert_allclose(levels[:-1], timesteps, atol=1e-3)


def test_more_steps_than_timesteps_are_refused():
    with pytest.raises(UserError, match="1 to 1000"):
        spacings.leading(train_steps=1000)(schedules.cosine(**BOUNDS), 1001)
