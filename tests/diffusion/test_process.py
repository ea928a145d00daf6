"""The process: conversion cycles, and q composed with its posterior."""

import contextlib
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cascade.diffusion import process, schedules
from cascade.errors import UserError

LOGSNRS = st.floats(-20, 20, width=32)
PAIRS = list(itertools.product(process.KINDS, repeat=2))


def truth(logsnr, dtype=np.float32):
    """(z_t, {"x", "eps", "v"}) of 4 pictures at one logsnr."""
    x, eps = np.random.default_rng(0).uniform(-1, 1, (2, 4, 3, 3, 2)).astype(dtype)
    logsnr = jnp.full(4, logsnr, dtype)
    alpha, sigma = schedules.alpha_sigma(process.along_batch(logsnr, x))
    return process.diffuse(x, eps, logsnr), {"x": x, "eps": eps, "v": alpha * eps - sigma * x}


def digits_lost(logsnr, *kinds):
    """How much conversions from these kinds magnify rounding: 1/sigma from x, 1/alpha from eps."""
    alpha, sigma = schedules.alpha_sigma(jnp.asarray(logsnr))
    return sum({"x": 1.0 / sigma, "eps": 1.0 / alpha, "v": 1.0}[kind] for kind in kinds)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("first", "second"), PAIRS)
@settings(deadline=None, max_examples=25)
@given(logsnr=LOGSNRS)
def test_every_cycle_of_conversions_returns(dtype, first, second, logsnr):
    with jax.enable_x64(True) if dtype == np.float64 else contextlib.nullcontext():
        z_t, known = truth(logsnr, dtype)
        levels = jnp.full(4, logsnr, dtype)
        there = process.predictions(known[first], z_t, levels, first)
        back = process.predictions(getattr(there, second), z_t, levels, second)
        assert getattr(back, first).dtype == dtype
        tolerance = 8 * np.finfo(dtype).eps * digits_lost(logsnr, first, second)
        np.testing.assert_allclose(getattr(back, first), known[first], rtol=0, atol=tolerance)


@pytest.mark.parametrize("kind", process.KINDS)
@settings(deadline=None, max_examples=50)
@given(logsnr=LOGSNRS)
def test_every_output_is_turned_into_the_truth(kind, logsnr):
    z_t, known = truth(logsnr)
    prediction = process.predictions(known[kind], z_t, jnp.full(4, logsnr), kind)
    # From v this bound has no logsnr in it: v is exact at both ends.
    tolerance = 8 * np.finfo(np.float32).eps * digits_lost(logsnr, kind)
    for name, value in known.items():
        np.testing.assert_allclose(getattr(prediction, name), value, rtol=0, atol=tolerance)


@pytest.mark.parametrize("kind", process.KINDS)
@pytest.mark.parametrize("logsnr", [-20.0, 20.0])
def test_conversions_are_finite_at_both_ends(kind, logsnr):
    output = np.random.default_rng(1).normal(0, 3, (2, 4, 4, 3)).astype(np.float32)
    prediction = process.predictions(output, -output, jnp.full(2, logsnr), kind)
    assert prediction.fraction is None
    for value in prediction[:3]:
        assert value.dtype == jnp.float32
        assert np.all(np.isfinite(value))


def test_each_example_has_its_own_logsnr():
    logsnr = jnp.array([-7.0, 0.0, 5.0, 12.0])
    z_t, known = truth(0.0)
    together = process.predictions(known["v"], z_t, logsnr, "v")
    for i in range(4):
        alone = process.predictions(known["v"][i : i + 1], z_t[i : i + 1], logsnr[i : i + 1], "v")
        np.testing.assert_allclose(together.x[i], alone.x[0], rtol=1e-6, atol=1e-7)


def test_learned_variance_is_split_off_and_free_to_leave_its_bounds():
    output = jnp.concatenate([jnp.ones((1, 2, 2, 3)), jnp.zeros((1, 2, 2, 3))], -1)
    raw = output.at[0, 0, 0, 3:].set(jnp.array([-1.0, 1.0, 5.0]))
    prediction = process.predictions(raw, jnp.zeros((1, 2, 2, 3)), jnp.zeros(1), "x")
    np.testing.assert_array_equal(prediction.x, jnp.ones((1, 2, 2, 3)))
    np.testing.assert_array_equal(prediction.fraction[0, 0, 0], [0.0, 1.0, 3.0])
    np.testing.assert_array_equal(prediction.fraction[0, 1, 1], [0.5, 0.5, 0.5])


def test_wrong_outputs_are_refused():
    z_t = jnp.zeros((1, 2, 2, 3))
    with pytest.raises(UserError, match="4 channels"):
        process.predictions(jnp.zeros((1, 2, 2, 4)), z_t, jnp.zeros(1), "x")
    with pytest.raises(UserError, match="x, eps, v"):
        process.predictions(z_t, z_t, jnp.zeros(1), "score")


def coefficients(logsnr_t, logsnr_s, fraction=0.0):
    """(of z_t, of x, variance) in the posterior: it is linear, so unit pictures show them."""
    one, zero = jnp.ones((1, 1)), jnp.zeros((1, 1))
    levels = jnp.array([logsnr_t]), jnp.array([logsnr_s])
    keep, logvar = process.posterior(one, zero, *levels, fraction)
    gain, _ = process.posterior(zero, one, *levels, fraction)
    return float(keep[0, 0]), float(gain[0, 0]), float(jnp.exp(logvar)[0, 0])


@settings(deadline=None)
@given(LOGSNRS, LOGSNRS)
def test_q_composed_with_the_posterior_is_q(one, other):
    logsnr_t, logsnr_s = sorted((one, other))
    alpha_t, sigma_t = map(float, schedules.alpha_sigma(jnp.array(logsnr_t)))
    alpha_s, sigma_s = map(float, schedules.alpha_sigma(jnp.array(logsnr_s)))
    keep, gain, variance = coefficients(logsnr_t, logsnr_s)
    # Through z_t and back, z_s has q(z_s|x)'s mean and variance, ...
    np.testing.assert_allclose(keep * alpha_t + gain, alpha_s, rtol=1e-5)
    np.testing.assert_allclose(keep**2 * sigma_t**2 + variance, sigma_s**2, rtol=2e-5)
    # ... and with z_t = (alpha_t / alpha_s) z_s + noise, the covariance that fixes the rest.
    np.testing.assert_allclose(keep * sigma_t**2, alpha_t / alpha_s * sigma_s**2, rtol=2e-5)


@settings(deadline=None)
@given(st.lists(LOGSNRS, min_size=3, max_size=3))
def test_two_posterior_steps_are_one(levels):
    logsnr_t, logsnr_s, logsnr_u = sorted(levels)
    keep_1, gain_1, variance_1 = coefficients(logsnr_t, logsnr_s)
    keep_2, gain_2, variance_2 = coefficients(logsnr_s, logsnr_u)
    keep, gain, variance = coefficients(logsnr_t, logsnr_u)
    np.testing.assert_allclose(keep_2 * keep_1, keep, rtol=2e-5)
    np.testing.assert_allclose(keep_2 * gain_1 + gain_2, gain, rtol=2e-5, atol=1e-12)
    np.testing.assert_allclose(keep_2**2 * variance_1 + variance_2, variance, rtol=2e-5, atol=1e-12)


def test_fraction_goes_from_the_lower_to_the_upper_variance():
    logsnr_t, logsnr_s = -1.0, 2.0
    rest = -np.expm1(logsnr_t - logsnr_s)
    low = rest / (1 + np.exp(logsnr_s))
    high = rest / (1 + np.exp(logsnr_t))
    variances = [coefficients(logsnr_t, logsnr_s, f)[2] for f in (0.0, 0.5, 1.0)]
    np.testing.assert_allclose(variances, [low, np.sqrt(low * high), high], rtol=1e-5)


def test_the_posterior_at_its_own_time_is_a_point():
    keep, gain, variance = coefficients(3.0, 3.0)
    assert (keep, gain, variance) == (1.0, 0.0, 0.0)


def test_noise_of_a_picture_follows_from_its_key_alone():
    keys = jax.random.split(jax.random.key(0), 5)
    together = process.picture_noise(keys, (4, 4, 3))
    alone = process.picture_noise(keys[3:4], (4, 4, 3))
    np.testing.assert_array_equal(together[3], alone[0])
    assert not np.allclose(together[2], together[3])
