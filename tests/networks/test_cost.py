"""The analytic counts against hand counts."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from test_unet import BASE, EFFICIENT, inputs

from cascade.networks import UNet
from cascade.networks.cost import count, describe

S = jax.ShapeDtypeStruct
MATRIX = S((8, 8), jnp.float32)
PRODUCT = 2 * 8**3


def test_products_and_convolutions():
    def convolve(x, w):
        return lax.conv_general_dilated(
            x, w, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=2
        )

    x, w = S((3, 8, 6, 4), jnp.float32), S((3, 3, 2, 10), jnp.float32)
    assert count(convolve, x, w).total() == 2 * (3 * 4 * 3 * 10) * (3 * 3 * 2)
    a, b = S((5, 2, 3), "f4"), S((5, 4, 3), "f4")
    assert count(lambda a, b: jnp.einsum("bij,bkj->bik", a, b), a, b).total() == 2 * 5 * 2 * 4 * 3


def test_nested_programs():
    def scanned(x):
        return lax.scan(lambda c, _: (jax.jit(lambda y: y @ x)(c), None), x, length=7)[0]

    assert count(scanned, MATRIX).total() == 7 * PRODUCT
    assert count(jax.checkpoint(lambda x: x @ x), MATRIX).total() == PRODUCT
    assert count(jax.vmap(lambda x: x @ x), S((4, 8, 8), "f4")).total() == 4 * PRODUCT
    choice = count(lambda x: lax.cond(x[0, 0] > 0, lambda: x @ x @ x, lambda: x @ x), MATRIX)
    assert choice.total() == 2 * PRODUCT
    with pytest.raises(ValueError, match="unknown length"):
        count(lambda x: lax.while_loop(lambda y: y[0, 0] > 0, lambda y: y @ y, x), MATRIX)


def test_custom_gradients():
    @jax.custom_vjp
    def product(a, b):
        return a @ b

    product.defvjp(lambda a, b: (a @ b, (a, b)), lambda r, g: (g @ r[1].T, r[0].T @ g))
    assert count(product, MATRIX, MATRIX).total() == PRODUCT
    gradient = jax.grad(lambda a, b: jnp.sum(product(a, b)), (0, 1))
    assert count(gradient, MATRIX, MATRIX).total() == 3 * PRODUCT


def hand_count(height, width):
    """A convolution-only network of 8 and 16 channels: rows of (name, parameters, operations)."""

    def conv(pixels, c_in, c_out):
        return 9 * c_in * c_out + c_out, 2 * pixels * 9 * c_in * c_out

    def dense(rows, c_in, c_out):
        return c_in * c_out + c_out, 2 * rows * c_in * c_out

    def norm(c):
        return 2 * c, 0

    def block(pixels, c_in, c_out):
        parts = [norm(c_in), conv(pixels, c_in, c_out), dense(1, 32, 2 * c_out)]
        parts += [norm(c_out), conv(pixels, c_out, c_out)]
        parts += [dense(pixels, c_in, c_out)] if c_in != c_out else []
        return parts

    fine, coarse = height * width, height * width // 4
    rows = {
        "ends": [conv(fine, 3, 8), dense(1, 8, 32), dense(1, 32, 32), norm(8), conv(fine, 8, 3)],
        "down_0": block(fine, 8, 8),
        "down_1": [conv(coarse, 8, 16), *block(coarse, 16, 16)],
        "up_1": [*block(coarse, 32, 16), conv(fine, 16, 8)],
        "up_0": block(fine, 16, 8),
    }
    return {name: tuple(map(sum, zip(*parts, strict=True))) for name, parts in rows.items()}


def test_network_by_hand():
    network = UNet(
        **BASE
        | {
            "num_blocks": (1, 1),
            "resampling": "nearest",
            "entry_skips": False,
            "middle": False,
            "self_attention": (False, False),
            "text_attention": (False, False),
            "pool_heads": 0,
        }
    )
    rows = describe(network, *inputs(8, 12, batch=1))
    assert {row.level: (row.parameters, row.flops) for row in rows} == hand_count(8, 12)
    assert [row[:4] for row in rows[1:3]] == [("down_0", 8, 12, 8), ("down_1", 4, 6, 16)]


@pytest.mark.parametrize("fields", [BASE, EFFICIENT])
def test_levels_add_up_whatever_the_spelling(fields):
    """Rows sum to the whole, and scanned or rematerialised blocks cost what plain ones do."""
    args = inputs()
    network = UNet(**fields)
    rows = describe(network, *args)
    variables = jax.eval_shape(network.init, jax.random.key(0), *args)
    assert sum(row.parameters for row in rows) == sum(a.size for a in jax.tree.leaves(variables))
    assert sum(row.flops for row in rows) == count(network.apply, variables, *args).total()
    assert rows == describe(UNet(**fields | {"scan_blocks": True, "remat": "blocks"}), *args)
    assert all(row.parameters > 0 and row.flops > 0 for row in rows)


def test_padding_is_counted():
    network = UNet(**BASE | {"strides": (2, 2)})
    assert describe(network, *inputs(6, 10)) == describe(network, *inputs(8, 12))


def test_a_training_step_is_three_forwards():
    """Each product is done again for either input's gradient; text and pictures have none."""
    args = inputs()
    network = UNet(**BASE)
    variables = jax.eval_shape(network.init, jax.random.key(0), *args)
    forward = count(network.apply, variables, *args).total()
    step = count(jax.grad(lambda v: network.apply(v, *args).sum()), variables).total()
    assert 2.7 < step / forward <= 3
