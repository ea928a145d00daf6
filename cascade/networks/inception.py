"""Inception-v3 (Szegedy et al. 2016) as the Fréchet inception distance uses it.

FID's network (Heusel et al. 2017) is the TensorFlow graph of 5 December 2015, which differs from
the usual Inception-v3: average pools leave padding out, the last block pools by the maximum, and
it has 1008 classes, which play no part here. Names are those of its port to PyTorch
(github.com/mseitzer/pytorch-fid).
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from cascade.networks.convolutions import joined

SIDE = 299
EPS = 1e-3  # of its batch normalisation


def fid_inception(unit: Callable, x: jax.Array) -> jax.Array:
    """The 2048 pooled features that FID is defined on.

    Args:
      unit: see `cascade.networks.convolutions`.
      x: [B, 299, 299, 3] RGB in [-1, 1].

    Returns:
      [B, 2048], means over the 8×8 places of the last block.
    """

    def conv(x, name, width, size=(1, 1), **options):
        return jax.nn.relu(unit(x, f"{name}.conv", f"{name}.bn", width, size, **options))

    x = conv(x, "Conv2d_1a_3x3", 32, (3, 3), stride=2, padding="VALID")
    x = conv(x, "Conv2d_2a_3x3", 32, (3, 3), padding="VALID")
    x = shrink(conv(x, "Conv2d_2b_3x3", 64, (3, 3)))
    x = conv(x, "Conv2d_3b_1x1", 80)
    x = shrink(conv(x, "Conv2d_4a_3x3", 192, (3, 3), padding="VALID"))
    for name, pooled in (("Mixed_5b", 32), ("Mixed_5c", 64), ("Mixed_5d", 64)):
        x = block_35(partial(_within, conv, name), x, pooled)
    x = block_35_to_17(partial(_within, conv, "Mixed_6a"), x)
    widths = {"Mixed_6b": 128, "Mixed_6c": 160, "Mixed_6d": 160, "Mixed_6e": 192}
    for name, width in widths.items():
        x = block_17(partial(_within, conv, name), x, width)
    x = block_17_to_8(partial(_within, conv, "Mixed_7a"), x)
    x = block_8(partial(_within, conv, "Mixed_7b"), x, mean_around)
    x = block_8(partial(_within, conv, "Mixed_7c"), x, most_around)
    return x.mean((1, 2))


def _within(conv, block, x, name, *arguments, **options):
    return conv(x, f"{block}.{name}", *arguments, **options)


def block_35(conv: Callable, x: jax.Array, pooled: int) -> jax.Array:
    """1×1, 5×5, two 3×3, and pooled branches at 35×35 places."""
    wide = conv(conv(x, "branch5x5_1", 48), "branch5x5_2", 64, (5, 5))
    double = conv(conv(x, "branch3x3dbl_1", 64), "branch3x3dbl_2", 96, (3, 3))
    double = conv(double, "branch3x3dbl_3", 96, (3, 3))
    pool = conv(mean_around(x), "branch_pool", pooled)
    return joined([conv(x, "branch1x1", 64), wide, double, pool])


def block_35_to_17(conv: Callable, x: jax.Array) -> jax.Array:
    """3×3 and two 3×3, both of stride 2, beside the maximum."""
    half = {"stride": 2, "padding": "VALID"}
    double = conv(conv(x, "branch3x3dbl_1", 64), "branch3x3dbl_2", 96, (3, 3))
    double = conv(double, "branch3x3dbl_3", 96, (3, 3), **half)
    return joined([conv(x, "branch3x3", 384, (3, 3), **half), double, shrink(x)])


def block_17(conv: Callable, x: jax.Array, width: int) -> jax.Array:
    """1×1, 7×7 once and twice as 1×7 and 7×1, and pooled branches at 17×17 places."""
    once = conv(conv(x, "branch7x7_1", width), "branch7x7_2", width, (1, 7))
    once = conv(once, "branch7x7_3", 192, (7, 1))
    twice = conv(conv(x, "branch7x7dbl_1", width), "branch7x7dbl_2", width, (7, 1))
    twice = conv(twice, "branch7x7dbl_3", width, (1, 7))
    twice = conv(twice, "branch7x7dbl_4", width, (7, 1))
    twice = conv(twice, "branch7x7dbl_5", 192, (1, 7))
    pool = conv(mean_around(x), "branch_pool", 192)
    return joined([conv(x, "branch1x1", 192), once, twice, pool])


def block_17_to_8(conv: Callable, x: jax.Array) -> jax.Array:
    """3×3, and 1×7, 7×1 and 3×3, both of stride 2, beside the maximum."""
    half = {"stride": 2, "padding": "VALID"}
    small = conv(conv(x, "branch3x3_1", 192), "branch3x3_2", 320, (3, 3), **half)
    large = conv(conv(x, "branch7x7x3_1", 192), "branch7x7x3_2", 192, (1, 7))
    large = conv(large, "branch7x7x3_3", 192, (7, 1))
    large = conv(large, "branch7x7x3_4", 192, (3, 3), **half)
    return joined([small, large, shrink(x)])


def block_8(conv: Callable, x: jax.Array, pool: Callable) -> jax.Array:
    """1×1, split 3×3, 3×3 and split 3×3, and pooled branches at 8×8 places."""

    def split(x, name):
        return [conv(x, f"{name}a", 384, (1, 3)), conv(x, f"{name}b", 384, (3, 1))]

    once = split(conv(x, "branch3x3_1", 384), "branch3x3_2")
    twice = conv(conv(x, "branch3x3dbl_1", 448), "branch3x3dbl_2", 384, (3, 3))
    twice = split(twice, "branch3x3dbl_3")
    pooled = conv(pool(x), "branch_pool", 192)
    return joined([conv(x, "branch1x1", 320), *once, *twice, pooled])


def shrink(x: jax.Array) -> jax.Array:
    """The maximum of every other 3×3 places."""
    return _windows(x, -jnp.inf, jax.lax.max, 2, "VALID")


def most_around(x: jax.Array) -> jax.Array:
    """The maximum of each place's 3×3 neighbours."""
    return _windows(x, -jnp.inf, jax.lax.max, 1, "SAME")


def mean_around(x: jax.Array) -> jax.Array:
    """The mean of those of each place's 3×3 neighbours that there are."""
    there = _windows(jnp.ones((1, *x.shape[1:3], 1), x.dtype), 0.0, jax.lax.add, 1, "SAME")
    return _windows(x, 0.0, jax.lax.add, 1, "SAME") / there


def _windows(x, start, reduce, stride, padding):
    return jax.lax.reduce_window(x, start, reduce, (1, 3, 3, 1), (1, stride, stride, 1), padding)
