"""What samplers make of means, variances and norms, against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mixtures import MIXTURE, exact_denoiser

from cascade.diffusion import process, samplers, schedules, spacings
from cascade.diffusion.guidance import Denoised
from cascade.errors import UserError

SPREAD = 0.5  # of Gaussian data around 0
# name -> (factory, weak order of the mean, of the variance); a posterior's mean is exact
RANDOM = {
    "ancestral 0": (lambda: samplers.ancestral(gamma=0.0), None, 1),
    "ancestral 1": (lambda: samplers.ancestral(gamma=1.0), None, 1),
    "dpmpp_2m_sde": (samplers.dpmpp_2m_sde, None, 2),
    "stochastic": (samplers.stochastic, 1, 1),
}


def picture_keys(batch, seed=0):
    return jax.random.split(jax.random.key(seed), batch)


def conditional_law(sampler, levels, monkeypatch):
    """Slope and variance of z at the last level, given z at the first: no chance is involved.

    With Gaussian data every sampler is linear in z and in its noise. Picture i is given unit noise
    in step i and none else; the last one has none at all, but starts from 1.
    """
    steps = len(levels) - 1
    base = jax.random.key(7)

    def unit_noise(keys, shape, dtype):
        own = jax.vmap(lambda i: jax.random.fold_in(base, i))(jnp.arange(steps + 1))
        now = jnp.all(jax.random.key_data(keys) == jax.random.key_data(own), -1)
        return now.astype(dtype)[:, None]

    monkeypatch.setattr(samplers, "picture_noise", unit_noise)
    z = jnp.zeros((steps + 1, 1)).at[steps].set(1.0)
    denoise = exact_denoiser((np.ones(1), np.zeros(1), np.array([SPREAD])))
    keys = jnp.broadcast_to(base, steps + 1)
    responses = samplers.integrate(sampler, denoise, z, levels, keys)[:, 0]
    return float(responses[steps]), float(jnp.square(responses[:steps]).sum())


@pytest.mark.parametrize("name", RANDOM)
def test_weak_order(name, monkeypatch):
    """E[z_s|z_t] and Var[z_s|z_t] of the diffusion reversed, between logsnr -6 and 6."""
    factory, *orders = RANDOM[name]
    steps = (64, 128, 256)
    with jax.enable_x64(True):
        schedule = schedules.cosine(logsnr_min=-6.0, logsnr_max=6.0)
        ends = schedule(jnp.array([1.0, 0.0]))
        (alpha_t, alpha_s), (sigma_t, sigma_s) = schedules.alpha_sigma(ends)
        var_t, var_s = (alpha_t * SPREAD) ** 2 + sigma_t**2, (alpha_s * SPREAD) ** 2 + sigma_s**2
        covariance = alpha_t / alpha_s * var_s  # z_t is z_s scaled, and noise
        exact = np.array([covariance / var_t, var_s - covariance**2 / var_t])
        laws = [
            conditional_law(factory(), spacings.uniform()(schedule, n), monkeypatch) for n in steps
        ]
    for law, right, order in zip(np.array(laws).T, exact, orders, strict=True):
        if order is None:
            np.testing.assert_allclose(law, right, rtol=1e-12)
        else:
            slope = np.polyfit(np.log(steps), np.log(np.abs(law - right)), 1)[0]
            assert -slope == pytest.approx(order, abs=0.1)


@pytest.mark.parametrize("name", RANDOM)
def test_a_mixture_keeps_its_mean_and_variance(name):
    weights, means, spreads = MIXTURE
    levels = spacings.uniform()(schedules.cosine(logsnr_min=-8.0, logsnr_max=8.0), 256)
    keys = picture_keys(4)
    z_1 = process.picture_noise(keys, (64, 128, 1))
    sampler = RANDOM[name][0]()
    drawn = jax.jit(lambda z: samplers.sample(sampler, exact_denoiser(MIXTURE), z, levels, keys))(
        z_1
    )
    mean = weights @ means
    variance = weights @ (spreads**2 + means**2) - mean**2
    fourth = weights @ (3 * spreads**4 + 6 * spreads**2 * (means - mean) ** 2 + (means - mean) ** 4)
    # Five standard errors over 2^15 values, and what 256 steps of first order leave.
    assert float(drawn.mean()) == pytest.approx(mean, abs=5 * np.sqrt(variance / 2**15) + 0.002)
    error = 5 * np.sqrt((fourth - variance**2) / 2**15)
    assert float(drawn.var()) == pytest.approx(variance, abs=error + 0.01 * variance)


def test_the_stochastic_sampler_takes_two_steps_and_comes_one_back():
    logsnrs = jnp.array([-3.0, -1.0, 2.0, 6.0])
    keys = picture_keys(3)
    z = process.picture_noise(keys, (4, 4, 3))

    def denoise(z_t, logsnr):
        return Denoised(jnp.tanh(z_t))

    x = jnp.tanh(z)
    eps = process.predictions(x, z, logsnrs[0], "x").eps
    ahead = process.diffuse(x, eps, logsnrs[2])
    step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, 0)
    noise = process.picture_noise(step_keys, z.shape[1:])
    back = process.diffuse_further(ahead, noise, logsnrs[2], logsnrs[1])
    levels = samplers.Levels(*logsnrs[:3])
    stepped, _ = samplers.stochastic().step(denoise, z, (), levels, step_keys)
    np.testing.assert_allclose(stepped, back, rtol=1e-5, atol=1e-6)
    # `sample` looks ahead to the clean end, `integrate` no further than it goes.
    looked = samplers.sample(samplers.stochastic(), denoise, z, logsnrs[:3], keys)
    np.testing.assert_allclose(looked, jnp.tanh(back), rtol=1e-5, atol=1e-6)
    short = samplers.integrate(samplers.stochastic(), denoise, z, logsnrs[:2], keys)
    np.testing.assert_allclose(
        short, samplers.integrate(samplers.ddim(), denoise, z, logsnrs[:2], keys), atol=1e-6
    )


def test_noising_further_is_noising_at_once():
    """q(z_t|x) is q(z_t|z_s) of q(z_s|x): the same mean, and the same variance."""
    for logsnr_s, logsnr_t in [(20.0, -20.0), (3.0, -1.0), (-19.0, -20.0), (20.0, 19.0)]:
        noises = np.array([0.0, 1.0])
        z_s = process.diffuse(jnp.array([1.0, 0.0]), noises, logsnr_s)  # of x = 1; of unit noise
        kept = process.diffuse_further(z_s, jnp.zeros(2), logsnr_s, logsnr_t)
        added = process.diffuse_further(jnp.zeros(1), jnp.ones(1), logsnr_s, logsnr_t)
        alpha_t, sigma_t = schedules.alpha_sigma(logsnr_t)
        np.testing.assert_allclose(kept[0], alpha_t, rtol=1e-5)
        np.testing.assert_allclose(kept[1] ** 2 + added[0] ** 2, sigma_t**2, rtol=1e-5)


def addim_step(z_t, x_hat, logsnr_t, logsnr_s, spread):
    """aDDIM's step, as the sampler takes it."""
    longer = samplers.adjusted(x_hat, z_t, spread, logsnr_t, logsnr_s)
    return samplers.ddim_step(z_t, longer, logsnr_t, logsnr_s)


def test_addim_without_correction_is_ddim():
    keys = picture_keys(2)
    z_1 = process.picture_noise(keys, (4, 4, 3))
    levels = spacings.uniform()(schedules.cosine(logsnr_min=-20.0, logsnr_max=20.0), 8)
    plain, adjusted = (
        samplers.sample(sampler, exact_denoiser(MIXTURE), z_1, levels, keys)
        for sampler in (samplers.ddim(), samplers.addim(eta=0.0, variance=0.5))
    )
    np.testing.assert_allclose(adjusted, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("logsnr_s", [-10.0, 1.0, 20.0])
def test_addim_gives_orthogonal_noise_its_missing_square_exactly(logsnr_s):
    """mean(z_s²) = alpha_s² mean(x²) + sigma_s² mean(eps²) + w² x_var, whatever eps is."""
    logsnr_t, x_var = jnp.float32(-11.0), jnp.array([0.3, 0.05])
    x = jnp.tile(jnp.array([1.0, 0.5, 0.0, 0.0]), (2, 1))
    eps = jnp.tile(jnp.array([0.0, 0.0, 3.0, -0.2]), (2, 1))
    z_t = process.diffuse(x, eps, logsnr_t)
    z_s = addim_step(z_t, x, logsnr_t, jnp.float32(logsnr_s), x_var)
    (alpha_t, sigma_t), (alpha_s, sigma_s) = map(schedules.alpha_sigma, (logsnr_t, logsnr_s))
    w = alpha_s - alpha_t * sigma_s / sigma_t
    squares = alpha_s**2 * x**2 + sigma_s**2 * eps**2
    np.testing.assert_allclose((z_s**2).mean(1), squares.mean(1) + w**2 * x_var, rtol=1e-4)


def test_addim_keeps_the_norm_that_ddim_loses():
    """Pictures ±u: their posterior is a tanh, and but for one direction eps_hat is orthogonal.

    Heek et al. 2024, eq. 10-14: a perfect sampler would draw x, and step by it.
    """
    u = process.picture_noise(picture_keys(1), (4096,))[0]
    logsnr_t, logsnr_s = jnp.float32(-8.0), jnp.float32(-3.0)
    z_t = process.diffuse(u, process.picture_noise(picture_keys(16, seed=1), (4096,)), logsnr_t)
    (alpha_t, sigma_t), (alpha_s, sigma_s) = map(schedules.alpha_sigma, (logsnr_t, logsnr_s))
    likely = jnp.tanh(alpha_t / sigma_t**2 * (z_t @ u))[:, None]
    x_hat, x_var = likely * u, (1 - likely[:, 0] ** 2) * jnp.mean(u**2)
    w, kept = alpha_s - alpha_t * sigma_s / sigma_t, sigma_s / sigma_t
    squares = w**2 * u**2 + kept**2 * z_t**2 + 2 * w * kept * x_hat * z_t
    right = squares.mean(1)  # E[z_s²|z_t] of the perfect sampler
    ddim = samplers.ddim_step(z_t, x_hat, logsnr_t, logsnr_s)
    np.testing.assert_allclose((ddim**2).mean(1), right - w**2 * x_var, rtol=1e-4)
    addim = addim_step(z_t, x_hat, logsnr_t, logsnr_s, x_var)
    np.testing.assert_allclose((addim**2).mean(1), right, atol=0.02 * float(w**2 * x_var.mean()))


def test_addim_steps_by_what_its_data_leave_open():
    """eta of N(0, variance)'s variance given z_t; by default the paper's 0.1 / (2 + SNR)."""
    z_t = process.picture_noise(picture_keys(2), (4, 4, 3))
    t, s = jnp.float32(-3.0), jnp.float32(1.0)
    denoise = exact_denoiser(MIXTURE)
    x_hat = denoise(z_t, jnp.full(2, t)).x
    alpha_t, sigma_t = schedules.alpha_sigma(t)
    own = 0.3 * 2.0 * sigma_t**2 / (2.0 * alpha_t**2 + sigma_t**2)
    for sampler, x_var in (
        (samplers.addim(), 0.1 / (2.0 + jnp.exp(t))),
        (samplers.addim(eta=0.3, variance=2.0), own),
    ):
        z_s, _ = sampler.step(denoise, z_t, (), samplers.Levels(t, s, s), picture_keys(2))
        stepped = addim_step(z_t, x_hat, t, s, x_var)
        np.testing.assert_allclose(z_s, stepped, rtol=1e-5, atol=1e-6)


def test_no_noise_is_not_lengthened():
    zeros = jnp.zeros((1, 4))
    stepped = addim_step(zeros, zeros, jnp.float32(0.0), jnp.float32(3.0), 0.5)
    np.testing.assert_array_equal(stepped, zeros)


def test_impossible_corrections_are_refused():
    for keywords in ({"eta": -0.1}, {"eta": 1.5}, {"eta": float("nan")}):
        with pytest.raises(UserError, match="0 to 1"):
            samplers.addim(**keywords)
    for variance in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(UserError, match="positive"):
            samplers.addim(variance=variance)
