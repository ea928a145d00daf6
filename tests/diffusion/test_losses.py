"""Weightings against their closed formulas, times, and the learned-variance bound."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cascade import registry
from cascade.diffusion import losses, process, schedules
from cascade.errors import UserError

COSINE = schedules.cosine(logsnr_min=-20.0, logsnr_max=20.0)
T = jnp.array([0.0, 0.03, 0.3, 0.5, 0.6, 0.97, 1.0])

# name -> (config keys, closed formula of the loss in SNR, x-MSE, eps-MSE and v-MSE)
FORMULAS = {
    "eps": ({}, lambda snr, x, eps, v: eps),
    "x": ({}, lambda snr, x, eps, v: x),
    "v": ({}, lambda snr, x, eps, v: v),
    "snr_truncated": ({}, lambda snr, x, eps, v: np.maximum(x, eps)),
    "min_snr": ({"gamma": 5.0}, lambda snr, x, eps, v: np.minimum(snr, 5.0) * x),
    "sigmoid": (
        {"bias": -3.0},
        lambda snr, x, eps, v: (
            eps / (1 + snr * np.exp(3.0)) * (np.sqrt(snr) + np.sqrt(1 / snr)) / 2
        ),
    ),
}


def noisy(kind, channels=3):
    """(prediction, x, eps, the plain squared error of `kind` [B]) for a network that errs."""
    rng = np.random.default_rng(0)
    x, eps, error = rng.normal(size=(3, len(T), 4, 4, channels)).astype(np.float32)
    logsnr = COSINE(T)
    z_t = process.diffuse(x, eps, logsnr)
    alpha, sigma = schedules.alpha_sigma(process.along_batch(logsnr, z_t))
    right = {"x": x, "eps": eps, "v": alpha * eps - sigma * x}[kind]
    prediction = process.predictions(right + error, z_t, logsnr, kind)
    return prediction, x, eps, np.square(error.astype(np.float64)).mean((1, 2, 3))


@pytest.mark.parametrize("kind", process.KINDS)
@pytest.mark.parametrize("name", FORMULAS)
def test_weighted_losses_are_their_closed_formulas(name, kind):
    keywords, formula = FORMULAS[name]
    weighting = registry.build("weighting", losses.WEIGHTINGS, {"name": name, **keywords})
    prediction, x, eps, own = noisy(kind)
    snr = np.exp(np.asarray(COSINE(T), np.float64))
    # With z_t given: eps-MSE = SNR x-MSE, and v-MSE = (SNR + 1) x-MSE.
    x_mse = {"x": own, "eps": own / snr, "v": own / (snr + 1)}[kind]
    loss = losses.denoising_loss(prediction, x, eps, T, COSINE, weighting)
    assert loss.shape == T.shape and loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, formula(snr, x_mse, snr * x_mse, (snr + 1) * x_mse), rtol=1e-4)


def test_every_weighting_is_covered_and_a_wrong_one_refused():
    assert FORMULAS.keys() == losses.WEIGHTINGS.keys()
    for gamma in (0.0, -1.0, float("nan")):
        with pytest.raises(UserError, match="positive"):
            losses.min_snr(gamma=gamma)


def test_weightings_are_finite_at_both_ends():
    ends = jnp.array([-20.0, 20.0])
    for name, (keywords, _) in FORMULAS.items():
        weight = losses.WEIGHTINGS[name](**keywords)(ends)
        assert np.all(np.isfinite(weight)) and np.all(np.asarray(weight) > 0), name


def test_a_right_prediction_costs_nothing():
    rng = np.random.default_rng(0)
    x, eps = rng.normal(size=(2, len(T), 4, 4, 3)).astype(np.float32)
    alpha, sigma = schedules.alpha_sigma(process.along_batch(COSINE(T), x))
    z_t = process.diffuse(x, eps, COSINE(T))
    prediction = process.predictions(alpha * eps - sigma * x, z_t, COSINE(T), "v")
    loss = losses.denoising_loss(prediction, x, eps, T, COSINE, losses.v_weighting())
    np.testing.assert_allclose(loss, 0.0, atol=1e-12)


@pytest.mark.parametrize("batch", [1, 7, 4096])
def test_times_fill_every_stratum_once_inside_the_open_interval(batch):
    times = jax.vmap(lambda k: losses.stratified_times(k, batch))(
        jax.random.split(jax.random.key(0), 64)
    )
    assert np.all(np.asarray(times) > 0) and np.all(np.asarray(times) < 1)
    strata = np.sort(np.floor(np.asarray(times, np.float64) * batch), axis=1)
    # Rounding to float32 may carry a time at a stratum's very edge across it.
    assert np.mean(strata == np.arange(batch)) > 0.999
    offsets = np.asarray(times[:, 0], np.float64) * batch % 1.0
    assert offsets.min() < 0.1 and offsets.max() > 0.9
    # Any one place in the batch meets early and late times.
    assert times[:, -1].min() < 0.2 and times[:, -1].max() > 0.8


def test_the_bound_is_the_divergence_of_two_gaussians():
    rng = np.random.default_rng(0)
    x, z_t, error = rng.normal(size=(3, 4, 2, 2, 3))
    fraction = rng.uniform(size=x.shape)
    t = np.array([0.01, 0.2, 0.5, 0.9])
    with jax.enable_x64(True):
        schedule = schedules.cosine(logsnr_min=-20.0, logsnr_max=20.0)
        logsnr_t, logsnr_s = schedule(jnp.asarray(t)), schedule(jnp.asarray(t) - 1e-3)
        mean_q, logvar_q = process.posterior(z_t, x, logsnr_t, logsnr_s, 0.0)
        mean_p, logvar_p = process.posterior(z_t, x + error, logsnr_t, logsnr_s, fraction)
        divergence = 0.5 * (
            logvar_p
            - logvar_q
            + np.exp(logvar_q - logvar_p)
            + (mean_q - mean_p) ** 2 * np.exp(-logvar_p)
            - 1
        )
        bound = losses.variance_bound(x, x + error, jnp.asarray(fraction), jnp.asarray(t), schedule)
        np.testing.assert_allclose(bound, divergence.mean((1, 2, 3)), rtol=1e-8)


def test_the_bound_teaches_the_variance_and_leaves_the_mean_alone():
    rng = np.random.default_rng(0)
    x, eps = rng.normal(size=(2, len(T), 4, 4, 3)).astype(np.float32)
    z_t = process.diffuse(x, eps, COSINE(T))
    output = jnp.asarray(rng.normal(size=(len(T), 4, 4, 6)) * 0.1, jnp.float32)

    def total(output):
        prediction = process.predictions(output, z_t, COSINE(T), "v")
        return losses.denoising_loss(prediction, x, eps, T, COSINE, losses.v_weighting()).sum()

    learned, plain = jax.grad(total)(output), jax.grad(total)(output[..., :3])
    assert np.all(np.isfinite(learned))
    np.testing.assert_allclose(learned[..., :3], plain, rtol=1e-5, atol=1e-8)
    moved = np.abs(np.asarray(learned[..., 3:])).max((1, 2, 3))
    # Every time but t = 0, whose step is taken without noise.
    assert np.all(moved[1:] > 0) and moved[0] == 0


def test_the_best_fraction_matches_what_is_unknown_of_x():
    """Unit noise of which x_hat = alpha z_t knows all there is to know wants the upper bound."""
    t = jnp.array([0.5])
    eps, x = jax.random.normal(jax.random.key(0), (2, 1, 128, 128, 1))
    z_t = process.diffuse(x, eps, COSINE(t))
    alpha, _ = schedules.alpha_sigma(COSINE(t))
    costs = [
        float(losses.variance_bound(x, alpha * z_t, jnp.full_like(x, f), t, COSINE)[0])
        for f in (0.0, 0.5, 1.0)
    ]
    assert costs[2] < costs[1] < costs[0]
