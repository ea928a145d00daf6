"""Schedules: limits, direction, closed forms, and what shifting means."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cascade import registry
from cascade.diffusion import schedules
from cascade.errors import UserError

SECTIONS = [
    {"name": "cosine", "logsnr_min": -20.0, "logsnr_max": 20.0},
    {"name": "cosine", "logsnr_min": -10.0, "logsnr_max": 15.0},
    {"name": "linear", "start": 1e-4, "growth": 10.0},
    {
        "name": "shifted_cosine",
        "resolution": 256,
        "base_resolution": 64,
        "logsnr_min": -20.0,
        "logsnr_max": 20.0,
    },
    {
        "name": "interpolated_cosine",
        "resolution": 256,
        "coarse_resolution": 32,
        "fine_resolution": 256,
        "logsnr_min": -20.0,
        "logsnr_max": 20.0,
    },
    {"name": "discrete", "betas": "squaredcos_cap_v2", "train_steps": 1000},
    {"name": "discrete", "betas": "linear", "train_steps": 1000},
]


def build(section):
    return registry.build("schedule", schedules.SCHEDULES, section)


@pytest.mark.parametrize("section", SECTIONS, ids=lambda s: s["name"])
def test_decreases_within_the_bounds_and_differentiates(section):
    logsnr = build(section)
    t = jnp.linspace(0.0, 1.0, 2001)
    values = np.asarray(logsnr(t))
    assert values.dtype == np.float32
    assert np.all(np.diff(values) < 0)
    assert np.all(np.abs(values) <= 20.0)
    slopes = np.asarray(jax.vmap(jax.grad(logsnr))(t[1:-1]))
    assert np.all(np.isfinite(slopes)) and np.all(slopes < 0)
    # A Python number is a time too, in jit or out of it.
    np.testing.assert_allclose(jax.jit(logsnr)(0.25), values[500], rtol=1e-5)


@pytest.mark.parametrize("section", SECTIONS[:2] + SECTIONS[3:5], ids=lambda s: s["name"])
def test_cosines_reach_their_limits(section):
    logsnr = build(section)
    np.testing.assert_allclose(logsnr(jnp.array(0.0)), section["logsnr_max"], rtol=1e-6)
    np.testing.assert_allclose(logsnr(jnp.array(1.0)), section["logsnr_min"], rtol=1e-6)


def test_cosine_is_the_papers_formula():
    t = np.linspace(0.0, 1.0, 257)
    b = np.arctan(np.exp(-10.0))
    a = np.arctan(np.exp(10.0)) - b
    logsnr = schedules.cosine(logsnr_min=-20.0, logsnr_max=20.0)
    np.testing.assert_allclose(
        logsnr(jnp.asarray(t)), -2 * np.log(np.tan(a * t + b)), rtol=1e-5, atol=1e-5
    )


def test_linear_is_ddpm_in_continuous_time():
    logsnr = schedules.linear(start=1e-4, growth=10.0)
    alpha, _ = schedules.alpha_sigma(logsnr(jnp.array([0.1, 0.5, 1.0])))
    betas = np.linspace(1e-4, 0.02, 1000)
    discrete = np.cumprod(1 - betas)[[99, 499, 999]]
    # The continuous form leaves 0.1 t of 10.05 t out, so log alpha² agrees to some per cent.
    np.testing.assert_allclose(2 * np.log(alpha), np.log(discrete), rtol=0.1)


def test_shift_moves_the_cosine_by_the_resolutions():
    t = jnp.linspace(0.1, 0.9, 9)
    limits = {"logsnr_min": -20.0, "logsnr_max": 20.0}
    plain = schedules.cosine(**limits)
    shifted = schedules.shifted_cosine(resolution=256, base_resolution=64, **limits)
    # The limits hold after the shift, so in between it is exact only as they tend to infinity.
    np.testing.assert_allclose(shifted(t) - plain(t), -2 * np.log(4.0), atol=2e-2)
    same = schedules.shifted_cosine(resolution=64, base_resolution=64, **limits)
    np.testing.assert_array_equal(same(t), plain(t))


def test_interpolation_is_coarse_in_noise_and_fine_in_detail():
    limits = {"logsnr_min": -20.0, "logsnr_max": 20.0}
    mixed = schedules.interpolated_cosine(
        resolution=256, coarse_resolution=32, fine_resolution=256, **limits
    )
    coarse = schedules.shifted_cosine(resolution=256, base_resolution=32, **limits)
    fine = schedules.cosine(**limits)
    np.testing.assert_allclose(mixed(0.98) - coarse(0.98), 0.0, atol=0.1)
    np.testing.assert_allclose(mixed(0.02) - fine(0.02), 0.0, atol=0.1)
    np.testing.assert_allclose(mixed(0.5), (coarse(0.5) + fine(0.5)) / 2, rtol=1e-5)


@settings(deadline=None)
@given(st.floats(-20, 20, width=32))
def test_alpha_and_sigma_lie_on_the_circle_with_their_ratio_kept(logsnr):
    alpha, sigma = schedules.alpha_sigma(jnp.float32(logsnr))
    np.testing.assert_allclose(alpha**2 + sigma**2, 1.0, rtol=1e-6)
    np.testing.assert_allclose(2 * (np.log(alpha) - np.log(sigma)), logsnr, atol=1e-5)


@pytest.mark.parametrize(
    "section",
    [
        {"name": "cosine", "logsnr_min": -21.0, "logsnr_max": 20.0},
        {"name": "cosine", "logsnr_min": 5.0, "logsnr_max": -5.0},
        {"name": "cosine", "logsnr_min": float("nan"), "logsnr_max": 20.0},
        {"name": "linear", "start": 0.0, "growth": 10.0},
        {"name": "linear", "start": 1e-4, "growth": 100.0},
        {**SECTIONS[3], "base_resolution": 0},
        {**SECTIONS[4], "coarse_resolution": 512},
    ],
)
def test_impossible_schedules_are_refused(section):
    with pytest.raises(UserError, match=r"give|swap"):
        build(section)


@pytest.mark.parametrize("betas", schedules.BETAS)
def test_timesteps_are_the_products_of_what_ddpm_defines(betas):
    if betas == "linear":
        steps = np.linspace(1e-4, 0.02, 1000)
    else:
        signal = [math.cos((i / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(1001)]
        steps = np.array([min(1 - b / a, 0.999) for a, b in itertools.pairwise(signal)])
    signal = np.cumprod(1.0 - steps)
    table = schedules.timestep_logsnrs(betas, 1000)
    np.testing.assert_allclose(table, np.log(signal / (1 - signal)), rtol=1e-6, atol=1e-6)
    logsnr = schedules.discrete(betas=betas, train_steps=1000)
    np.testing.assert_array_equal(logsnr(jnp.arange(1, 1001) / 1000), table)


def test_discrete_cosine_follows_the_continuous_one():
    """alpha² = f(t) / f(0), f(t) = cos²(π/2 (t + 0.008) / 1.008), where betas aren't capped."""
    t = jnp.linspace(0.1, 0.9, 50)
    discrete = schedules.discrete(betas="squaredcos_cap_v2", train_steps=1000)(t)
    signal = np.cos((np.append(t, 0.0) + 0.008) / 1.008 * np.pi / 2) ** 2
    signal = signal[:-1] / signal[-1]
    np.testing.assert_allclose(discrete, np.log(signal / (1 - signal)), atol=1e-3)


def test_impossible_timesteps_are_refused():
    with pytest.raises(UserError, match="squaredcos_cap_v2, linear"):
        schedules.discrete(betas="sigmoid", train_steps=1000)
    with pytest.raises(UserError, match="2 or more"):
        schedules.discrete(betas="linear", train_steps=1)
