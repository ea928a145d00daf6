"""Laws of tiles: weights sum to one, pointwise networks can't tell, memory is one tile's."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cascade.diffusion.tiling import starts, tiled, windows
from cascade.errors import UserError

tilings = st.tuples(st.integers(1, 40), st.integers(1, 100)).flatmap(
    lambda drawn: st.tuples(st.just(drawn[1]), st.just(drawn[0]), st.integers(0, drawn[0] - 1))
)


@given(tilings)
def test_tiles_cover_the_side_and_overlap(tiling):
    side, tile, overlap = tiling
    begins = starts(side, tile, overlap)
    assert begins[0] == 0 and begins[-1] + tile >= side
    assert all(begin + tile <= side for begin in begins) or begins == (0,)
    assert all(0 < b - a <= tile - overlap for a, b in itertools.pairwise(begins))


@given(tilings)
def test_windows_sum_to_one(tiling):
    total = np.zeros(tiling[0])
    for begin, weights in zip(starts(*tiling), np.asarray(windows(*tiling)), strict=True):
        assert (weights > 0).all()
        total[begin : begin + len(weights)] += weights
    np.testing.assert_allclose(total, 1.0, rtol=1e-6)


@given(st.integers(4, 40), st.integers(41, 100))
def test_windows_are_smooth(tile, side):
    """No step from pixel to pixel beyond a sin² ramp's steepest, π / 2 overlap, doubled."""
    overlap = tile // 2
    begins = starts(side, tile, overlap)
    canvas = np.zeros((len(begins), side))
    for i, weights in enumerate(np.asarray(windows(side, tile, overlap))):
        canvas[i, begins[i] : begins[i] + tile] = weights
    assert np.abs(np.diff(canvas, axis=1)).max() <= np.pi / overlap


def pointwise(z_t, logsnr, cond):
    """A network without a receptive field: a pixel's output follows from its own inputs."""
    factor = z_t.shape[1] // cond["lowres"].shape[1]
    low = jnp.repeat(jnp.repeat(cond["lowres"], factor, 1), factor, 2)
    return jnp.concatenate([jnp.sin(z_t) * low, z_t * logsnr[:, None, None, None]], -1)


@settings(max_examples=12)
@given(
    st.integers(1, 30), st.integers(1, 30), st.integers(2, 8), st.integers(0, 7), st.integers(1, 3)
)
def test_a_pointwise_network_cant_tell(height, width, tile, overlap, factor):
    overlap = min(overlap, tile - 1)
    rng = np.random.default_rng(0)
    z_t = rng.normal(size=(2, height * factor, width * factor, 3)).astype(np.float32)
    cond = {"lowres": rng.normal(size=(2, height, width, 3)).astype(np.float32)}
    logsnr = np.array([1.0, -2.0], np.float32)
    whole = pointwise(z_t, logsnr, cond)
    parts = jax.jit(tiled(pointwise, tile * factor, overlap * factor))(z_t, logsnr, cond)
    np.testing.assert_allclose(parts, whole, rtol=1e-5, atol=1e-6)


def test_each_tile_is_predicted_alone():
    """A network that answers with its input's mean gives each tile's own mean."""

    def mean(z_t, logsnr, cond):
        return jnp.broadcast_to(z_t.mean((1, 2), keepdims=True), z_t.shape)

    z_t = jnp.zeros((1, 8, 16, 1)).at[:, :, 8:].set(1.0)
    out = tiled(mean, 8, 0)(z_t, jnp.zeros(1), {})
    np.testing.assert_array_equal(out, z_t)


def test_a_picture_no_larger_than_a_tile_is_one_call():
    calls = []

    def spy(z_t, logsnr, cond):
        calls.append(z_t.shape)
        return z_t

    tiled(spy, 16, 4)(jnp.zeros((1, 8, 16, 3)), jnp.zeros(1), {})
    assert calls == [(1, 8, 16, 3)]


def test_memory_is_one_tiles():
    def wide(z_t, logsnr, cond):
        kernel = jnp.ones((3, 3, 3, 64))
        for _ in range(3):
            x = jax.lax.conv_general_dilated(
                z_t, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            z_t = jnp.tanh(x).reshape(*z_t.shape[:3], 16, 4)[..., 0][..., :3]
        return z_t

    def peak(predict):
        arguments = jax.ShapeDtypeStruct((1, 256, 256, 3), "f4"), jax.ShapeDtypeStruct((1,), "f4")
        compiled = jax.jit(lambda *both: predict(*both, {})).lower(*arguments).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert peak(tiled(wide, 64, 16)) < peak(wide) / 4


@pytest.mark.parametrize(
    ("tile", "overlap", "low", "said"),
    [
        (8, 8, 4, "can't overlap by 8"),
        (8, -4, 4, "can't overlap by -4"),
        (6, 4, 4, "tile is 6, not a multiple of 4"),
        (8, 2, 4, "tile_overlap is 2, not a multiple of 4"),
        (8, 4, 5, "isn't smaller by a whole factor"),
    ],
)
def test_tiles_that_dont_fit_are_one_sentence(tile, overlap, low, said):
    z_t, cond = jnp.zeros((1, 16, 16, 3)), {"lowres": jnp.zeros((1, low, low, 3))}
    with pytest.raises(UserError, match=said):
        tiled(pointwise, tile, overlap)(z_t, jnp.zeros(1), cond)
