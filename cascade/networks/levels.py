"""A level of the U-Net: its blocks, run one by one or as a scan, and its resampling."""

from itertools import groupby

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from cascade.networks.attention import Attention
from cascade.networks.layers import Downsample, ResidualBlock, Style, Upsample

BLOCK_INPUT = "block_input"
PRODUCTS = (jax.lax.dot_general_p, jax.lax.conv_general_dilated_p)


def products_saveable(primitive, *_, **__) -> bool:
    """Saves what matrix products and convolutions give, and recomputes what is cheap."""
    return primitive in PRODUCTS


# What the backward pass finds stored of each block, least time and most memory first: everything;
# its input and the results of its products; its input; its input, in the host's memory.
REMAT = {
    "none": None,
    "dots": products_saveable,
    "blocks": jax.checkpoint_policies.nothing_saveable,
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[BLOCK_INPUT],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}
BEFORE_POLICIES = {"False": "none", "True": "blocks"}  # what overrides of `remat` once were


class Block(nn.Module):
    """A residual block and, where asked, attention after it."""

    channels: int
    self_attention: bool
    text_attention: bool
    style: Style

    @nn.compact
    def __call__(self, x, skip, emb, text) -> jax.Array:
        """Maps x [B, H, W, C], joined by `skip` unless that is None, to [B, H, W, channels]."""
        x = checkpoint_name(self.style.by_picture(x), BLOCK_INPUT)
        if skip is not None:
            x = jnp.concatenate([x, skip * self.style.skip_scale], -1)
        x = ResidualBlock(self.channels, self.style, name="residual")(x, emb)
        if self.self_attention or self.text_attention:
            attention = Attention(
                self.self_attention, self.text_attention, self.style, name="attention"
            )
            x = attention(x, text)
        return self.style.by_picture(x)


class Level(nn.Module):
    """A level's blocks, with its resampling before them (way down) or after them (way up).

    Attributes:
      channels: of every block.
      attention: for each block, (over pixels, over text).
      up: the way: up takes skips, for its first blocks, and resamples last; down resamples first.
      stride: between this level and the next finer one; 1 resamples nothing.
      outer_channels: of the next finer level.
      resampling, remat, scan_blocks: as `UNet`'s.
    """

    channels: int
    attention: tuple[tuple[bool, bool], ...]
    up: bool
    stride: int
    outer_channels: int
    resampling: str
    remat: str
    scan_blocks: bool
    style: Style

    @nn.compact
    def __call__(self, x, skips, emb, text) -> tuple[jax.Array, list[jax.Array]]:
        """Returns the level's result and, for the way up to take, [entry, block 0, …]."""
        if not self.up and self.stride > 1:
            down = self._placed(Downsample, "resample")(
                self.channels, self.stride, self.resampling, self.style, name="resample"
            )
            x = down(x, emb)
        outputs = [x]
        for run in self._runs(x, skips):
            x, made = self._run(run, x, skips[run.start : run.stop], emb, text)
            outputs += made
        if self.up and self.stride > 1:
            up = self._placed(Upsample, "resample")(
                self.outer_channels, self.stride, self.resampling, self.style, name="resample"
            )
            x = up(x, emb)
        return x, outputs

    def _runs(self, x, skips) -> list[range]:
        """Splits the blocks into runs of equals, which one scan can do; else into single ones."""
        count = len(self.attention)
        if not self.scan_blocks:
            return [range(j, j + 1) for j in range(count)]

        def shape(j: int):
            skip = skips[j].shape[-1] if j < len(skips) else 0
            return x.shape[-1] if j == 0 else self.channels, skip, self.attention[j]

        runs = [list(run) for _, run in groupby(range(count), shape)]
        return [range(run[0], run[-1] + 1) for run in runs]

    def _run(self, run: range, x, skips, emb, text) -> tuple[jax.Array, list[jax.Array]]:
        """Applies the blocks of one run; returns the last result and all results."""
        single = len(run) == 1
        name = f"block_{run[0]}" if single else f"blocks_{run[0]}_{run[-1]}"
        block_class = self._placed(Block, name, stacked=0 if single else len(run))
        block = block_class(self.channels, *self.attention[run[0]], self.style, name=name)
        if single:
            x = block(x, skips[0] if skips else None, emb, text)
            return x, [x]

        def body(block, x, skip):
            x = block(x, skip, emb, text)
            return x, x

        scan = nn.scan(
            body,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            length=len(run),
        )
        x, stacked = scan(block, x, jnp.stack(skips) if skips else None)
        return x, list(stacked)

    def _placed(self, module: type[nn.Module], name: str, stacked: int = 0) -> type[nn.Module]:
        """A part of this level as a class that recomputes, and gathers weights, as it should.

        Gathering lies inside of what is recomputed: weights are gathered once more on the way back
        rather than kept.

        Args:
          name: the part's.
          stacked: of how many it is one, run by a scan.
        """
        module = self.style.gathering(module, "/".join((*self.path, name)), stacked)
        return module if self.remat == "none" else nn.remat(module, policy=REMAT[self.remat])
