"""What the way up is given of the way down: one skip a block, or one a level."""

import jax
import numpy as np
import pytest
from test_unet import BASE, EFFICIENT, drawn, inputs

from cascade.errors import UserError
from cascade.networks import UNet


def kernel_inputs(fields) -> dict[str, list[int]]:
    """Channels that each block of a level on the way up reads."""
    network, args = UNet(**fields), inputs()
    shapes = jax.eval_shape(network.init, jax.random.key(0), *args)["params"]
    return {
        f"up_{i}": [
            shapes[f"up_{i}"][f"block_{j}"]["residual"]["conv_in"]["kernel"].shape[2]
            for j in range(fields["num_blocks"][i] + fields["entry_skips"])
        ]
        for i in range(2)
    }


def test_channels_that_blocks_read():
    """8 and 16 channels, one and three blocks; skips are joined to what comes from below."""
    assert kernel_inputs(EFFICIENT | {"skips": "block"}) == {"up_1": [32, 32, 32], "up_0": [16]}
    assert kernel_inputs(EFFICIENT | {"skips": "level"}) == {"up_1": [32, 16, 16], "up_0": [16]}


def test_a_level_of_one_block_has_one_skip_either_way():
    fields = EFFICIENT | {"num_blocks": (1, 1)}
    args = inputs()
    block, level = (UNet(**fields | {"skips": skips}) for skips in ("block", "level"))
    variables = drawn(block, *args)
    np.testing.assert_array_equal(
        jax.jit(block.apply)(variables, *args), jax.jit(level.apply)(variables, *args)
    )


def test_scanned_blocks_may_lack_skips():
    """Of up_1's four blocks the first takes the skip and the last attends: two are equal."""
    args = inputs()
    fields = EFFICIENT | {"skips": "level", "num_blocks": (1, 4)}
    plain, scanned = UNet(**fields), UNet(**fields | {"scan_blocks": True})
    variables = drawn(plain, *args)
    params = dict(variables["params"])
    for level, first, last in (("down_1", 0, 2), ("up_1", 1, 2)):
        blocks = dict(params[level])
        run = [blocks.pop(f"block_{j}") for j in range(first, last + 1)]
        blocks[f"blocks_{first}_{last}"] = jax.tree.map(lambda *each: np.stack(each), *run)
        params[level] = blocks
    np.testing.assert_allclose(
        jax.jit(scanned.apply)({"params": params}, *args),
        jax.jit(plain.apply)(variables, *args),
        rtol=1e-5,
        atol=1e-5,
    )


def test_entry_skips_need_a_skip_a_block():
    with pytest.raises(UserError, match="entry_skips"):
        UNet(**BASE | {"skips": "level"}).init(jax.random.key(0), *inputs())
