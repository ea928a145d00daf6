"""Samplers against exact solutions: orders of convergence, variances, and independence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cascade import registry
from cascade.diffusion import process, samplers, schedules
from cascade.diffusion.guidance import Denoised
from cascade.errors import UserError

BOUNDS = {"logsnr_min": -20.0, "logsnr_max": 20.0}
ODE_SECTIONS = {name: {"name": name} for name in ("ddim", "heun", "dpmpp_2m")}
SECTIONS = {**ODE_SECTIONS, "ancestral": {"name": "ancestral", "gamma": 0.3}}
ORDERS = {"ddim": 1, "heun": 2, "dpmpp_2m": 2}

# A mixture of Gaussians on the line, and one Gaussian: (weights, means, spreads).
MIXTURE = (np.array([0.3, 0.7]), np.array([-0.6, 0.5]), np.array([0.2, 0.3]))
GAUSSIAN = (np.array([1.0]), np.array([0.2]), np.array([0.5]))


def build(name):
    return registry.build("sampler", samplers.SAMPLERS, SECTIONS[name])


def noisy_parts(data, logsnr):
    """Means and spreads of z_t's parts, with the parts on the last axis."""
    _, means, spreads = data
    alpha, sigma = schedules.alpha_sigma(jnp.asarray(logsnr)[..., None])
    return alpha * means, jnp.sqrt(jnp.square(alpha * spreads) + jnp.square(sigma))


def exact_denoiser(data):
    """E[x|z_t] for data whose values are independent draws of the mixture, in closed form."""
    weights, means, spreads = data

    def denoise(z_t, logsnr):
        at, spread = noisy_parts(data, process.along_batch(logsnr, z_t))
        alpha, _ = schedules.alpha_sigma(process.along_batch(logsnr, z_t)[..., None])
        off = (z_t[..., None] - at) / spread
        part = jax.nn.softmax(jnp.log(weights) - jnp.log(spread) - 0.5 * jnp.square(off), -1)
        within = means + alpha * jnp.square(spreads) / spread * off
        return Denoised(jnp.sum(part * within, -1))

    return denoise


def cdf(data, z, logsnr):
    at, spread = noisy_parts(data, logsnr)
    return jnp.sum(data[0] * jax.scipy.special.ndtr((z[..., None] - at) / spread), -1)


def exact_solution(data, z_t, logsnr_t, logsnr_s):
    """The probability flow on the line keeps quantiles: F_s(z_s) = F_t(z_t), by bisection."""
    quantile = cdf(data, z_t, logsnr_t)
    low, high = jnp.full_like(z_t, -9.0), jnp.full_like(z_t, 9.0)
    for _ in range(60):
        middle = 0.5 * (low + high)
        below = cdf(data, middle, logsnr_s) < quantile
        low, high = jnp.where(below, middle, low), jnp.where(below, high, middle)
    return low


def errors(name, data, limits, all_steps, run=samplers.integrate):
    """Largest errors over many pictures of one value each, by number of steps, in float64."""
    schedule = schedules.cosine(**limits)
    z = jnp.linspace(-2.5, 2.5, 41)[:, None]
    keys = jax.random.split(jax.random.key(0), len(z))
    denoise = exact_denoiser(data)
    end = 60.0 if run is samplers.sample else schedule(0.0)
    exact = exact_solution(data, z, schedule(1.0), end)
    draw = jax.jit(lambda levels: run(build(name), denoise, z, levels, keys))
    return np.array(
        [np.abs(draw(samplers.uniform()(schedule, n)) - exact).max() for n in all_steps]
    )


@pytest.mark.parametrize("limit", [6.0, 20.0])
@pytest.mark.parametrize("data", [GAUSSIAN, MIXTURE], ids=["gaussian", "mixture"])
@pytest.mark.parametrize("name", ODE_SECTIONS)
def test_order_of_convergence(name, data, limit):
    limits = {"logsnr_min": -limit, "logsnr_max": limit}
    with jax.enable_x64(True):
        coarse, fine = errors(name, data, limits, (128, 256))
    assert np.log2(coarse / fine) == pytest.approx(ORDERS[name], abs=0.1)


@pytest.mark.parametrize("data", [GAUSSIAN, MIXTURE], ids=["gaussian", "mixture"])
def test_2m_beats_ddim_for_it_lands_on_x_hat(data):
    steps = (8, 64)
    with jax.enable_x64(True):
        ddim = errors("ddim", data, BOUNDS, steps, samplers.sample)
        two_m = errors("dpmpp_2m", data, BOUNDS, steps, samplers.sample)
        extrapolated = errors("dpmpp_2m", data, BOUNDS, steps, samplers.integrate)
    assert np.all(two_m < ddim)
    # Had its last step stayed second order, it would be worse than DDIM.
    assert np.all(extrapolated > ddim)


@pytest.mark.parametrize("name", ODE_SECTIONS)
def test_float32_is_enough_for_a_whole_run(name):
    def draw(dtype):
        z = jnp.linspace(-2.5, 2.5, 41, dtype=dtype)[:, None]
        levels = samplers.uniform()(schedules.cosine(**BOUNDS), 64)
        keys = picture_keys(len(z))
        return samplers.sample(build(name), exact_denoiser(MIXTURE), z, levels, keys)

    single = draw(jnp.float32)
    assert single.dtype == jnp.float32
    with jax.enable_x64(True):
        np.testing.assert_allclose(single, draw(jnp.float64), atol=1e-4)


def picture_keys(batch, seed=0):
    return jax.random.split(jax.random.key(seed), batch)


@pytest.mark.parametrize("kind", process.KINDS)
@pytest.mark.parametrize("name", SECTIONS)
def test_any_network_gives_finite_pictures(name, kind):
    def denoise(z_t, logsnr):
        return Denoised(process.predictions(jnp.sin(3 * z_t), z_t, logsnr, kind).x)

    keys = picture_keys(2)
    z_1 = process.picture_noise(keys, (4, 4, 3))
    levels = samplers.uniform()(schedules.cosine(**BOUNDS), 5)
    pictures = jax.jit(lambda z: samplers.sample(build(name), denoise, z, levels, keys))(z_1)
    assert np.all(np.isfinite(pictures))


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("name", SECTIONS)
def test_the_last_step_lands_on_x_hat_after_the_expected_evaluations(name, steps):
    seen = []
    picture = process.picture_noise(picture_keys(2, seed=1), (4, 4, 3))

    def denoise(z_t, logsnr):
        assert logsnr.shape == (2,)
        jax.debug.callback(lambda level: seen.append(float(level)), logsnr[0])
        return Denoised(picture)

    keys = picture_keys(2)
    z_1 = process.picture_noise(keys, (4, 4, 3))
    levels = samplers.uniform()(schedules.cosine(**BOUNDS), steps)
    result = samplers.sample(build(name), denoise, z_1, levels, keys)
    jax.effects_barrier()
    np.testing.assert_array_equal(result, picture)
    assert len(seen) == (2 * steps - 1 if name == "heun" else steps)
    # The clean end itself is never asked for: there x_hat is z.
    assert max(seen) == levels[-2] and min(seen) == levels[0]


@pytest.mark.parametrize("name", SECTIONS)
def test_a_picture_does_not_depend_on_its_batch(name):
    @jax.jit
    def draw(keys):
        levels = samplers.uniform()(schedules.cosine(**BOUNDS), 6)
        z_1 = process.picture_noise(keys, (4, 4, 3))
        return samplers.sample(build(name), exact_denoiser(MIXTURE), z_1, levels, keys)

    keys = picture_keys(5)
    together = draw(keys)
    np.testing.assert_allclose(together[2:3], draw(keys[2:3]), rtol=1e-5, atol=1e-5)
    assert np.abs(together[0] - together[1]).max() > 0.1


@pytest.mark.parametrize("name", ODE_SECTIONS)
def test_a_known_picture_is_followed_exactly_in_any_number_of_steps(name):
    keys = picture_keys(2)
    eps, x = (process.picture_noise(picture_keys(2, seed), (4, 4, 3)) for seed in (1, 2))
    levels = jnp.array([-6.0, -1.0, 4.0])
    z = process.diffuse(x, eps, levels[0])
    result = samplers.integrate(build(name), lambda *_: Denoised(x), z, levels, keys)
    np.testing.assert_allclose(result, process.diffuse(x, eps, levels[-1]), atol=1e-5)


def test_2m_starts_as_ddim():
    keys = picture_keys(3)
    z_1 = process.picture_noise(keys, (4, 4, 3))
    levels = samplers.uniform()(schedules.cosine(**BOUNDS), 8)[:2]
    one, other = (
        samplers.integrate(build(name), exact_denoiser(MIXTURE), z_1, levels, keys)
        for name in ("ddim", "dpmpp_2m")
    )
    np.testing.assert_array_equal(one, other)


def test_2m_extrapolates_what_is_linear_in_logsnr():
    """The second step is DDIM's with x_hat continued to the middle of the step ahead."""
    levels = jnp.array([-2.0, -0.5, 2.5])
    keys = picture_keys(1)
    z = jnp.ones((1, 1))

    def denoise(z_t, logsnr):
        return Denoised(0.1 * logsnr[:, None])

    middle = Denoised(jnp.full((1, 1), 0.1 * 1.0))
    z_mid = samplers.integrate(build("dpmpp_2m"), denoise, z, levels[:2], keys)
    expected = samplers.integrate(build("ddim"), lambda *_: middle, z_mid, levels[1:], keys)
    result = samplers.integrate(build("dpmpp_2m"), denoise, z, levels, keys)
    np.testing.assert_allclose(result, expected, rtol=1e-5)


def ancestral_variances(gamma, spread, levels, fraction=None):
    """Variances of z at the last level, over 2^16 pixels of Gaussian data, and the right one."""
    keys = picture_keys(4)
    z_1 = process.picture_noise(keys, (128, 128, 1))
    exact = exact_denoiser((np.ones(1), np.zeros(1), np.array([spread])))

    def denoise(z_t, logsnr):
        x = exact(z_t, logsnr).x
        return Denoised(x, None if fraction is None else jnp.full_like(x, fraction))

    sampler = samplers.ancestral(gamma=gamma)
    z = jax.jit(lambda z: samplers.integrate(sampler, denoise, z, levels, keys))(z_1)
    alpha, sigma = schedules.alpha_sigma(levels[-1])
    return float(z.var()), float(alpha**2 * spread**2 + sigma**2)


# Five standard errors of a variance over 2^16 values.
FIVE_ERRORS = 5 * np.sqrt(2 / 2**16)


@pytest.mark.parametrize("last", [-10, -3, -2])
@pytest.mark.parametrize(("gamma", "spread"), [(1.0, 1.0), (0.0, 1e-4)])
def test_ancestral_keeps_the_variance_exactly_where_a_bound_is_right(gamma, spread, last):
    """The upper bound for unit noise and the lower for known data, in as few steps as you like."""
    levels = samplers.uniform()(schedules.cosine(**BOUNDS), 12)[:last]
    variance, right = ancestral_variances(gamma, spread, levels)
    assert variance == pytest.approx(right, rel=FIVE_ERRORS)
    wrong, _ = ancestral_variances(1.0 - gamma, spread, levels)
    assert wrong != pytest.approx(right, rel=FIVE_ERRORS)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
def test_ancestral_keeps_the_variance_of_any_gaussian_in_many_steps(gamma):
    levels = samplers.uniform()(schedules.cosine(**BOUNDS), 400)[:200]
    variance, right = ancestral_variances(gamma, 0.5, levels)
    assert variance == pytest.approx(right, rel=FIVE_ERRORS)


def test_a_learned_variance_goes_before_gamma():
    levels = samplers.uniform()(schedules.cosine(**BOUNDS), 12)[:-3]
    learned, _ = ancestral_variances(0.0, 1.0, levels, fraction=1.0)
    assert learned == ancestral_variances(1.0, 1.0, levels)[0]


def test_levels_run_from_noise_to_clean():
    schedule = schedules.cosine(**BOUNDS)
    levels = samplers.uniform()(schedule, 10)
    assert levels.shape == (11,)
    assert (float(levels[0]), float(levels[-1])) == (-20.0, 20.0)
    assert np.all(np.diff(levels) > 0)
    np.testing.assert_allclose(levels[4], schedule(jnp.float32(0.6)), rtol=1e-5)


def test_impossible_settings_are_refused():
    for steps in (0, -3):
        with pytest.raises(UserError, match="1 or more"):
            samplers.uniform()(schedules.cosine(**BOUNDS), steps)
    for gamma in (-0.1, 1.5, float("nan")):
        with pytest.raises(UserError, match="0 to 1"):
            samplers.ancestral(gamma=gamma)


@given(st.sampled_from(["leading", "linspace", "trailing"]), st.integers(1, 1000))
@settings(deadline=None)
def test_discrete_spacings_visit_timesteps_in_order_and_end_clean(name, steps):
    visited = []
    spacing = samplers.SPACINGS[name](train_steps=1000)
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
        levels = samplers.SPACINGS[name](train_steps=1000)(lambda t: t * 1000 - 1, 5)
        np.testing.assert_allclose(levels[:-1], timesteps, atol=1e-3)


def test_more_steps_than_timesteps_are_refused():
    with pytest.raises(UserError, match="1 to 1000"):
        samplers.leading(train_steps=1000)(schedules.cosine(**BOUNDS), 1001)
