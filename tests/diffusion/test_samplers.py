"""Samplers against exact solutions: orders of convergence, variances, and independence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mixtures import GAUSSIAN, MIXTURE, exact_denoiser, exact_solution

from cascade import registry
from cascade.diffusion import process, samplers, schedules, spacings
from cascade.diffusion.guidance import Denoised

BOUNDS = {"logsnr_min": -20.0, "logsnr_max": 20.0}
ADDIM = {"name": "addim", "eta": 0.1, "variance": 0.5}
ODE_SECTIONS = {name: {"name": name} for name in ("ddim", "heun", "dpmpp_2m")}
SECTIONS = {
    **ODE_SECTIONS,
    "addim": ADDIM,
    "ancestral": {"name": "ancestral", "gamma": 0.3},
    "dpmpp_2m_sde": {"name": "dpmpp_2m_sde"},
    "stochastic": {"name": "stochastic"},
}
ORDERS = {"ddim": 1, "addim": 1, "heun": 2, "dpmpp_2m": 2}


def build(name):
    return registry.build("sampler", samplers.SAMPLERS, SECTIONS[name])


def test_all_samplers_are_tested():
    assert set(SECTIONS) == set(samplers.SAMPLERS)
    assert set(ORDERS) == set(SECTIONS) - set(samplers.RANDOM_SAMPLERS)


def errors(name, data, limits, all_steps, run=samplers.integrate):
    """Largest errors over a picture of many values, by number of steps, in float64."""
    schedule = schedules.cosine(**limits)
    z = jnp.linspace(-2.5, 2.5, 41)[None]
    keys = picture_keys(1)
    denoise = exact_denoiser(data)
    end = 60.0 if run is samplers.sample else schedule(0.0)
    exact = exact_solution(data, z, schedule(1.0), end)
    draw = jax.jit(lambda levels: run(build(name), denoise, z, levels, keys))
    all_levels = [spacings.uniform()(schedule, n) for n in all_steps]
    if run is samplers.integrate:  # steps that go nowhere change nothing, and save compiling
        longest = max(all_steps) + 1
        all_levels = [jnp.pad(each, (0, longest - len(each)), "edge") for each in all_levels]
    return np.array([np.abs(draw(levels) - exact).max() for levels in all_levels])


def order(all_steps, all_errors):
    """The slope of the errors' logarithms against those of the steps, by regression."""
    return -np.polyfit(np.log(all_steps), np.log(all_errors), 1)[0]


@pytest.mark.parametrize("data", [GAUSSIAN, MIXTURE], ids=["gaussian", "mixture"])
@pytest.mark.parametrize("name", ORDERS)
def test_order_of_convergence(name, data):
    steps = (64, 128, 256)
    with jax.enable_x64(True):
        found = order(steps, errors(name, data, {"logsnr_min": -6.0, "logsnr_max": 6.0}, steps))
    assert found == pytest.approx(ORDERS[name], abs=0.06)


@pytest.mark.parametrize("name", ODE_SECTIONS)
def test_order_of_convergence_on_a_schedule_without_signal_or_noise_at_its_ends(name):
    with jax.enable_x64(True):
        found = order((128, 256), errors(name, MIXTURE, BOUNDS, (128, 256)))
    assert found == pytest.approx(ORDERS[name], abs=0.1)


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
        levels = spacings.uniform()(schedules.cosine(**BOUNDS), 64)
        keys = picture_keys(len(z))
        return samplers.sample(build(name), exact_denoiser(MIXTURE), z, levels, keys)

    single = draw(jnp.float32)
    assert single.dtype == jnp.float32
    with jax.enable_x64(True):
        np.testing.assert_allclose(single, draw(jnp.float64), atol=1e-4)


def picture_keys(batch, seed=0):
    return jax.random.split(jax.random.key(seed), batch)


SPACING_SECTIONS = [
    {"name": "uniform"},
    {"name": "uniform_logsnr"},
    {"name": "karras", "rho": 7.0, "sigma_min": 0.0, "sigma_max": 0.0},
    {"name": "karras", "rho": 7.0, "sigma_min": 0.002, "sigma_max": 80.0},
    {"name": "given", "levels": (-20.0, -19.99, 0.0, 19.99, 19.995, 20.0)},
    {"name": "leading", "train_steps": 1000},
    {"name": "linspace", "train_steps": 1000},
    {"name": "trailing", "train_steps": 1000},
]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", SECTIONS)
def test_any_network_gives_finite_pictures_from_any_levels(name, dtype):
    """bfloat16 can't tell some of these levels apart."""
    assert {section["name"] for section in SPACING_SECTIONS} == set(spacings.SPACINGS)

    @jax.jit
    def draw(levels, kind):
        def denoise(z_t, logsnr):
            output = jnp.sin(3 * z_t)
            every = [process.predictions(output, z_t, logsnr, each).x for each in process.KINDS]
            return Denoised(jax.lax.select_n(kind, *every))

        keys = picture_keys(2)
        z_1 = process.picture_noise(keys, (4, 4, 3), dtype)
        return samplers.sample(build(name), denoise, z_1, levels, keys)

    for section in SPACING_SECTIONS:
        spacing = registry.build("spacing", spacings.SPACINGS, section)
        levels = spacing(schedules.cosine(**BOUNDS), 5)
        for kind in range(len(process.KINDS)):
            pictures = draw(levels, kind)
            assert pictures.dtype == dtype
            assert np.all(np.isfinite(pictures)), (section, process.KINDS[kind])


@pytest.mark.parametrize("name", SECTIONS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_step_that_goes_nowhere_stays(name, dtype):
    keys = picture_keys(1)
    z = process.picture_noise(keys, (4, 4, 3), dtype)
    levels = jnp.array([1.0, 1.0, 1.0])
    stays = samplers.integrate(build(name), lambda z, _: Denoised(0.5 * z), z, levels, keys)
    tolerance = 4 * jnp.finfo(dtype).eps
    np.testing.assert_allclose(np.float32(stays), np.float32(z), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("steps", [1, 4])
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
    levels = spacings.uniform()(schedules.cosine(**BOUNDS), steps)
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
        levels = spacings.uniform()(schedules.cosine(**BOUNDS), 6)
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


def test_ddim_is_a_rotation_at_every_step():
    """Of unit noise as data nothing is to be done: z stays, and each step of DDIM takes a cosine.

    x_hat = alpha z and eps_hat = sigma z, so z_s = cos(angle between t and s) z_t exactly.
    """
    levels = spacings.uniform()(schedules.cosine(**BOUNDS), 7)
    unit = exact_denoiser((np.ones(1), np.zeros(1), np.ones(1)))
    z = process.picture_noise(picture_keys(2), (4, 4, 3))
    drawn = samplers.integrate(build("ddim"), unit, z, levels, picture_keys(2))
    angles = np.arctan(np.exp(-0.5 * np.float64(levels)))
    np.testing.assert_allclose(drawn, np.prod(np.cos(np.diff(angles))) * z, rtol=1e-5)


def test_2m_starts_as_ddim():
    keys = picture_keys(3)
    z_1 = process.picture_noise(keys, (4, 4, 3))
    levels = spacings.uniform()(schedules.cosine(**BOUNDS), 8)[:2]
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
