"""Low-resolution augmentation and text dropping, each example on its own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cascade.diffusion import schedules
from cascade.diffusion.conditioning import augment_lowres, drop_text, upsample_lowres
from cascade.errors import UserError

COSINE = schedules.cosine(logsnr_min=-20.0, logsnr_max=20.0)
LOWRES = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (64, 16, 16, 3)), jnp.float32)


def test_training_draws_a_level_for_each_example_and_adds_just_that_noise():
    noised, aug_logsnr = augment_lowres(jax.random.key(0), LOWRES, COSINE)
    assert noised.shape == LOWRES.shape and aug_logsnr.shape == (64,)
    levels = np.interp(
        -np.asarray(aug_logsnr),
        -np.asarray(COSINE(jnp.linspace(0, 1, 4001))),
        np.linspace(0, 1, 4001),
    )
    # s ~ U(0, 1): Kolmogorov-Smirnov at the 1e-4 level.
    empirical = (np.arange(64) + 0.5) / 64
    assert np.abs(np.sort(levels) - empirical).max() < 2.2 / np.sqrt(64)
    alpha, sigma = schedules.alpha_sigma(aug_logsnr[:, None, None, None])
    noise = np.asarray((noised - alpha * LOWRES) / sigma)[np.asarray(sigma).ravel() > 1e-2]
    # 768 unit normals a picture: the standard error of each spread is 2.6 %.
    np.testing.assert_allclose(noise.std((1, 2, 3)), 1.0, atol=0.13)
    correlations = np.corrcoef(noise.reshape(len(noise), -1)) - np.eye(len(noise))
    assert np.abs(correlations).max() < 0.25


def test_level_zero_leaves_the_picture_untouched():
    noised, aug_logsnr = augment_lowres(jax.random.key(0), LOWRES, COSINE, 0.0)
    np.testing.assert_array_equal(noised, LOWRES)
    np.testing.assert_array_equal(aug_logsnr, jnp.full(64, COSINE(jnp.float32(0.0))))


def test_levels_may_be_chosen_for_each_picture():
    level = jnp.linspace(0.0, 1.0, 64)
    noised, aug_logsnr = augment_lowres(jax.random.key(0), LOWRES, COSINE, level)
    np.testing.assert_array_equal(aug_logsnr, COSINE(level))
    np.testing.assert_array_equal(noised[0], LOWRES[0])
    distance = np.abs(np.asarray(noised - LOWRES)).mean((1, 2, 3))
    assert distance[8] < distance[24] < distance[48]


@pytest.mark.parametrize("level", [None, 0.3])
def test_with_a_key_for_each_picture_the_batch_does_not_matter(level):
    keys = jax.random.split(jax.random.key(1), 64)
    together, logsnr = augment_lowres(keys, LOWRES, COSINE, level)
    alone, own_logsnr = augment_lowres(keys[5:6], LOWRES[5:6], COSINE, level)
    np.testing.assert_allclose(together[5], alone[0], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(logsnr[5], own_logsnr[0], rtol=1e-6)


def test_text_is_dropped_whole_for_some_examples_and_kept_for_the_rest():
    text_emb, text_mask = jnp.ones((4000, 5, 3)), jnp.ones((4000, 5), bool)
    emb, mask = map(np.asarray, drop_text(jax.random.key(0), text_emb, text_mask, 0.1))
    dropped = ~mask.any(1)
    np.testing.assert_array_equal(mask, np.repeat(~dropped[:, None], 5, 1))
    np.testing.assert_array_equal(emb, np.broadcast_to((~dropped)[:, None, None], emb.shape))
    # Five standard errors of a binomial share.
    assert abs(dropped.mean() - 0.1) < 5 * np.sqrt(0.1 * 0.9 / 4000)


def test_the_null_condition_may_be_an_embedding():
    text_emb, text_mask = jnp.ones((3, 5, 2)), jnp.ones((3, 5), bool)
    null_emb, null_mask = jnp.full((5, 2), 7.0), jnp.arange(5) < 2
    emb, mask = drop_text(jax.random.key(0), text_emb, text_mask, 1.0, null_emb, null_mask)
    np.testing.assert_array_equal(emb, jnp.full((3, 5, 2), 7.0))
    np.testing.assert_array_equal(mask, jnp.tile(null_mask, (3, 1)))
    emb, mask = drop_text(jax.random.key(0), text_emb, text_mask, 0.0, null_emb, null_mask)
    np.testing.assert_array_equal(emb, text_emb)
    np.testing.assert_array_equal(mask, text_mask)


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan")])
def test_levels_and_rates_outside_the_unit_interval_are_refused(value):
    with pytest.raises(UserError, match="0 to 1"):
        augment_lowres(jax.random.key(0), LOWRES, COSINE, value)
    with pytest.raises(UserError, match="0 to 1"):
        drop_text(jax.random.key(0), jnp.ones((1, 1, 1)), jnp.ones((1, 1), bool), value)


@pytest.mark.parametrize(("size", "grown"), [((4, 5), (9, 16)), ((1, 3), (4, 3)), ((6, 2), (6, 7))])
def test_upsampling_keeps_corners_and_is_linear_between(size, grown):
    lowres = np.random.default_rng(1).normal(size=(2, *size, 3)).astype(np.float32)
    rows, columns = (np.linspace(0, a - 1, b) for a, b in zip(size, grown, strict=True))

    def along(axis, at):
        return lambda x: np.apply_along_axis(
            lambda line: np.interp(at, np.arange(len(line)), line), axis, x
        )

    expected = along(2, columns)(along(1, rows)(lowres))
    np.testing.assert_allclose(upsample_lowres(jnp.asarray(lowres), grown), expected, atol=1e-5)
