"""Squares of pixels folded into channels: another network of fewer, wider pixels."""

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_unet import BASE, EFFICIENT, drawn, inputs

from cascade.errors import UserError
from cascade.networks import UNet
from cascade.networks.layers import pixel_shuffle, pixel_unshuffle


@given(st.tuples(*[st.integers(1, 3)] * 4), st.integers(1, 3))
def test_unshuffling_undoes_shuffling(shape, stride):
    batch, height, width, channels = shape
    x = np.arange(batch * height * width * channels * stride**2, dtype=np.float32)
    x = x.reshape(batch, height, width, -1)
    shuffled = pixel_shuffle(x, stride)
    assert shuffled.shape == (batch, height * stride, width * stride, channels)
    np.testing.assert_array_equal(pixel_unshuffle(shuffled, stride), x)
    # A square of pixels becomes one, and stays where it was.
    np.testing.assert_array_equal(np.unique(shuffled[0, :stride, :stride]), np.sort(x[0, 0, 0]))


def test_a_patched_network_is_one_of_folded_pictures():
    z_t, logsnr, cond = inputs(8, 12)
    patched = UNet(**BASE | {"patch": 2})
    folded = UNet(**BASE | {"out_channels": 4 * BASE["out_channels"]})
    variables = drawn(patched, z_t, logsnr, cond)
    out = jax.jit(patched.apply)(variables, z_t, logsnr, cond)
    other = jax.jit(folded.apply)(variables, pixel_unshuffle(z_t, 2), logsnr, cond)
    np.testing.assert_allclose(out, pixel_shuffle(other, 2), atol=1e-5)


@pytest.mark.parametrize("size", [(8, 12), (6, 10)])
def test_any_even_size_can_be_drawn(size):
    network, args = UNet(**EFFICIENT | {"patch": 4}), inputs(*size)
    assert network.padded(*size) == (16, 16)
    assert network.levels(*size)["down_0"][:2] == (2, 2)
    out = jax.eval_shape(lambda: network.init_with_output(jax.random.key(0), *args)[0])
    assert out.shape == args[0].shape


def test_a_patch_has_a_side():
    with pytest.raises(UserError, match="patch is 0"):
        UNet(**BASE | {"patch": 0}).check()
