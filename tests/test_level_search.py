"""The search of levels: it never gets worse, keeps order, and helps on noise that it didn't see."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mixtures import MIXTURE, exact_denoiser, exact_solution

from cascade.diffusion import process, samplers, schedules, spacings
from cascade.level_search import losses_at_most, search_levels

SCHEDULE = schedules.cosine(logsnr_min=-20.0, logsnr_max=20.0)


def distance(name, seed):
    """loss(levels): from the exact flow of 512 values of noise, in float32."""
    keys = jax.random.split(jax.random.key(seed), 2)
    z_1 = process.picture_noise(keys, (16, 16, 1))
    denoise = exact_denoiser(MIXTURE)
    exact = exact_solution(MIXTURE, z_1, -20.0, 60.0)
    sampler = samplers.SAMPLERS[name]()

    @jax.jit
    def loss(levels):
        x = samplers.sample(sampler, denoise, z_1, levels, keys)
        return jnp.sqrt(jnp.mean(jnp.square(x - exact)))

    return lambda levels: loss(jnp.asarray(levels, jnp.float32))


@pytest.mark.parametrize("name", ["ddim", "dpmpp_2m", "heun", "addim"])
def test_searched_levels_beat_uniform_ones_on_other_noise(name):
    start = np.asarray(spacings.uniform()(SCHEDULE, 6), np.float64)
    searched, held_out = distance(name, 0), distance(name, 1)
    levels, least = search_levels(searched, [start], rounds=6)
    assert least == float(searched(levels)) < float(searched(start))
    assert float(held_out(levels)) < 0.9 * float(held_out(start))
    assert np.all(np.diff(levels) > 0) and levels[[0, -1]].tolist() == start[[0, -1]].tolist()


@pytest.mark.parametrize("steps", [2, 3, 9])
def test_what_is_tried_is_in_order_and_the_least_is_returned(steps):
    rng, tried = np.random.default_rng(0), []

    def loss(levels):
        tried.append((rng.choice([np.nan, np.inf, *rng.uniform(1, 9, 4)]), levels))
        return tried[-1][0]

    starts = [np.linspace(-9, 9, steps + 1), np.linspace(-8, 7, steps + 1)]
    told = []
    levels, least = search_levels(loss, starts, rounds=5, tried=told.append)
    values, candidates = zip(*tried, strict=True)
    assert len(values) <= losses_at_most(len(starts), steps, 5)
    assert all(np.all(np.diff(candidate) > 0) for candidate in candidates)
    assert least == np.nanmin(values) == told[-1]
    np.testing.assert_array_equal(levels, candidates[int(np.nanargmin(values))])
    assert told == sorted(told, reverse=True)


def test_a_minimum_is_found():
    aim = np.array([-9.0, -7.0, -6.5, 1.0, 5.0, 9.0])
    start = np.linspace(-9.0, 9.0, 6)
    levels, least = search_levels(lambda at: np.abs(at - aim).sum(), [start], rounds=60)
    assert least < 0.05 * np.abs(start - aim).sum()
    np.testing.assert_allclose(levels, aim, atol=0.3)
