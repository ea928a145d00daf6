"""The ancestral sampler's variances, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mixtures import exact_denoiser

from cascade.diffusion import process, samplers, schedules, spacings
from cascade.diffusion.guidance import Denoised
from cascade.errors import UserError

BOUNDS = {"logsnr_min": -20.0, "logsnr_max": 20.0}


def ancestral_variances(gamma, spread, levels, fraction=None):
    """Variances of z at the last level, over 2^16 pixels of Gaussian data, and the right one."""
    keys = jax.random.split(jax.random.key(0), 4)
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
    levels = spacings.uniform()(schedules.cosine(**BOUNDS), 12)[:last]
    variance, right = ancestral_variances(gamma, spread, levels)
    assert variance == pytest.approx(right, rel=FIVE_ERRORS)
    wrong, _ = ancestral_variances(1.0 - gamma, spread, levels)
    assert wrong != pytest.approx(right, rel=FIVE_ERRORS)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
def test_ancestral_keeps_the_variance_of_any_gaussian_in_many_steps(gamma):
    levels = spacings.uniform()(schedules.cosine(**BOUNDS), 400)[:200]
    variance, right = ancestral_variances(gamma, 0.5, levels)
    assert variance == pytest.approx(right, rel=FIVE_ERRORS)


def test_a_learned_variance_goes_before_gamma():
    levels = spacings.uniform()(schedules.cosine(**BOUNDS), 12)[:-3]
    learned, _ = ancestral_variances(0.0, 1.0, levels, fraction=1.0)
    assert learned == ancestral_variances(1.0, 1.0, levels)[0]


def test_impossible_gammas_are_refused():
    for gamma in (-0.1, 1.5, float("nan")):
        with pytest.raises(UserError, match="0 to 1"):
            samplers.ancestral(gamma=gamma)
