"""One U-Net that spells Imagen's base network and the Efficient U-Net of its super-resolution.

Parameter paths, which sharding rules and importers rely on (i counts levels from the finest):

    conv_in   logsnr_embedding  aug_embedding  guidance_embedding  text_in  text_pool
    norm_out  conv_out
    down_<i>/resample           from level i − 1, where strides[i] > 1
    down_<i>/block_<j>/{residual,attention}
    middle/block_<j>/{residual,attention}
    up_<i>/block_<j>/{residual,attention}
    up_<i>/resample             towards level i − 1, where strides[i] > 1

With `scan_blocks`, equal neighbours block_<j> … block_<k> are one `blocks_<j>_<k>`, each parameter
stacked along a new first axis.
"""

import math

import jax
import jax.numpy as jnp
from flax import linen as nn

from cascade.networks.attention import TextPool
from cascade.networks.fields import check_fields, check_inputs
from cascade.networks.layers import (
    ACTIVATIONS,
    GroupNorm,
    GuidanceEmbedding,
    NoiseEmbedding,
    Style,
    conv3x3,
    pixel_shuffle,
    pixel_unshuffle,
)
from cascade.networks.levels import Level
from cascade.parallel.layout import Layout


class UNet(nn.Module):
    """Predicts from a noisy picture, its logsnr and its conditions (Saharia et al. 2022).

    Imagen's base: `strides=(1, 2, 2, 2)`, `resampling="block"`, `skips="block"`, `entry_skips`,
    `middle`, `attention_per_block`. The Efficient U-Net: `strides=(2, 2, 2, 2)`,
    `resampling="shuffle"` or "nearest", `skips="level"`, and none of these three. DeepFloyd IF
    differs in what docs/deepfloyd.md lists. Tuples have one item a level, the finest first.

    Attributes:
      out_channels: of the output; twice the picture's where variance is learned.
      super_resolution: takes `lowres` and `aug_logsnr` as conditions.
      channels: width that `channel_mults` multiply.
      channel_mults: width of each level in units of `channels`.
      num_blocks: residual blocks of each level, on the way down and again on the way up.
      patch: side of the squares of pixels that are folded into channels before the network (ViT,
        Dosovitskiy et al. 2021) and out of them after it; 1 folds none.
      strides: how many times smaller each level is than the one before; the first, than the input.
      resampling: "block" (BigGAN's up and down blocks), or strided convolution down and "nearest"
        (repeat and convolve) or "shuffle" (convolve to more channels, turned into pixels) up.
      skips: what the way up is given of each level: every "block"'s result, one for each block, or
        the "level"'s result alone, for its first block.
      entry_skips: one more block a level on the way up, for the skip from what entered the level.
      skip_scale: factor on each skip connection.
      residual_scale: factor on the result of each residual block.
      middle: block, attention, block, between the ways down and up.
      middle_attention: the middle's: over pixels, over text.
      self_attention: levels whose pixels attend to each other.
      text_attention: levels whose pixels attend to text; with self-attention, in one softmax.
      attention_per_block: attention after each block of its level, or only after the last.
      head_channels: channels of an attention head.
      attention_implementation: "auto", "xla" or "cudnn", for `jax.nn.dot_product_attention`.
      text_channels: width text is first projected to; 0 takes it as it comes.
      text_norm: what text passes in each attention: "layer", "group" (over all tokens, in 32
        groups of channels) or "none".
      pool_heads: heads of the attention that pools text for the embedding; 0 pools none.
      pool_projected: it pools text after the projection to `text_channels`, not before.
      noise_embedding: what is embedded of z_t's noise level, and of lowres': "logsnr", or its
        timestep in a thousand-step DDPM schedule with the betas "squaredcos_cap_v2" or "linear".
      embed_aug: super-resolution networks know the noise level of `lowres`.
      embed_guidance: it knows the guidance weight that it draws with, `cond["guidance_weight"]`, as
        students of guided distillation do; at first that changes nothing.
      embedding_channels: width of the embedding; 0 is 4 times the finest level's width.
      embedding_activations: what the summed embedding passes, in order, on its way to the blocks.
      norm_groups: groups of every group norm.
      activation: "silu" or "gelu".
      dropout: rate inside residual blocks; its rng is named "dropout".
      dtype: of activations, "float32" or "bfloat16"; parameters and output are float32.
      remat: what the backward pass recomputes instead of storing it; see `levels.REMAT`.
      scan_blocks: one `lax.scan` over equal blocks: quicker to compile, one stacked parameter set.
        On a CPU its kernel gradients are many times slower; leave it off there.
      layout: how activations and weights lie on a mesh of devices; None leaves it to XLA.
    """

    out_channels: int
    super_resolution: bool
    patch: int
    channels: int
    channel_mults: tuple[int, ...]
    num_blocks: tuple[int, ...]
    strides: tuple[int, ...]
    resampling: str
    skips: str
    entry_skips: bool
    skip_scale: float
    residual_scale: float
    middle: bool
    middle_attention: tuple[bool, ...]
    self_attention: tuple[bool, ...]
    text_attention: tuple[bool, ...]
    attention_per_block: bool
    head_channels: int
    attention_implementation: str
    text_channels: int
    text_norm: str
    pool_heads: int
    pool_projected: bool
    noise_embedding: str
    embed_aug: bool
    embed_guidance: bool
    embedding_channels: int
    embedding_activations: tuple[str, ...]
    norm_groups: int
    activation: str
    dropout: float
    dtype: str
    remat: str
    scan_blocks: bool
    layout: Layout | None = None

    @property
    def divisor(self) -> int:
        """What a picture's height and width must be multiples of: any even size can be drawn."""
        return 2

    def padded(self, height: int, width: int) -> tuple[int, int]:
        """The size worked at: the next multiples of what the strides make of one pixel."""
        whole = self.patch * math.prod(self.strides)
        return -(-height // whole) * whole, -(-width // whole) * whole

    def levels(self, height: int, width: int) -> dict[str, tuple[int, int, int]]:
        """Parameter group of each level, in order -> (height, width, channels) of its blocks."""
        height, width = (side // self.patch for side in self.padded(height, width))
        down = {}
        for i, (stride, mult) in enumerate(zip(self.strides, self.channel_mults, strict=True)):
            height, width = height // stride, width // stride
            down[f"down_{i}"] = (height, width, self.channels * mult)
        middle = {"middle": down[f"down_{i}"]} if self.middle else {}
        up = {name.replace("down", "up"): down[name] for name in reversed(down)}
        return down | middle | up

    @nn.compact
    def __call__(self, z_t, logsnr, cond, deterministic: bool = True) -> jax.Array:
        """Maps z_t [B, H, W, C] at logsnr [B] to [B, H, W, out_channels], float32.

        A size that the strides don't divide is padded below and on the right, by repeating the last
        row and column, and the result is cropped; other sizes cost nothing for that.

        Args:
          cond: text_emb [B, L, D], text_mask [B, L] bool, and for super-resolution lowres
            [B, h, w, 3] in [-1, 1] and aug_logsnr [B]; guidance_weight [B] where it is embedded.
          deterministic: no dropout.

        Raises:
          UserError: fields contradict each other, a size isn't a multiple of `divisor`, or a
            condition is missing.
        """
        self.check()
        check_inputs(self, z_t, cond)
        style = Style(
            self.norm_groups,
            self.activation,
            self.dropout,
            self.head_channels,
            self.attention_implementation,
            self.text_norm,
            self.skip_scale,
            self.residual_scale,
            jnp.dtype(self.dtype),
            deterministic,
            self.layout,
        )
        states, text = self._text(cond, style)
        emb = self._embedding(logsnr, cond, text if self.pool_projected else states, style)
        x = z_t
        if self.super_resolution:
            shape = (*z_t.shape[:3], cond["lowres"].shape[-1])
            x = jnp.concatenate([x, jax.image.resize(cond["lowres"], shape, "bilinear")], -1)
        _, height, width, _ = z_t.shape
        below, right = (
            more - side
            for side, more in zip((height, width), self.padded(height, width), strict=True)
        )
        if below or right:
            x = jnp.pad(x, ((0, 0), (0, below), (0, right), (0, 0)), "edge")
        x = conv3x3(self._width, style.dtype, "conv_in")(pixel_unshuffle(x, self.patch))
        skips, levels = [], range(len(self.strides))
        for i in levels:
            x, made = self._level(i, style, "down")(x, (), emb, text)
            skips.append([x] if self.skips == "level" else made[not self.entry_skips :])
        if self.middle:
            x, _ = self._level(levels[-1], style, "middle")(x, (), emb, text)
        for i in reversed(levels):
            x, _ = self._level(i, style, "up")(x, skips[i][::-1], emb, text)
        x = style.act(GroupNorm(self.norm_groups, jnp.float32, name="norm_out")(x))
        x = conv3x3(self.patch**2 * self.out_channels, jnp.float32, "conv_out", zero=True)(x)
        return pixel_shuffle(x, self.patch)[:, :height, :width]

    @property
    def _width(self) -> int:
        """Channels of the finest level."""
        return self.channels * self.channel_mults[0]

    def _text(
        self, cond, style: Style
    ) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
        """Text, padding zeroed, as it came and at width `text_channels`, each with its mask."""
        states, text_mask = cond["text_emb"], cond["text_mask"].astype(bool)
        states = text_emb = jnp.where(text_mask[..., None], states, 0)
        if self.text_channels:
            dense = style.gathering(nn.Dense, "text_in")
            text_emb = dense(self.text_channels, dtype=self.dtype, name="text_in")(states)
        return (states, text_mask), (text_emb, text_mask)

    def _embedding(self, logsnr, cond, text, style: Style) -> jax.Array:
        """The activated sum of what is known of the whole picture: [B, embedding's width]."""
        width = self.embedding_channels or 4 * self._width

        def embed(name, value):
            embedding = style.gathering(NoiseEmbedding, name, dtype=jnp.float32)(
                self.noise_embedding, self._width, width, self.activation, name=name
            )
            return embedding(value)

        emb = embed("logsnr_embedding", logsnr)
        if self.super_resolution and self.embed_aug:
            emb += embed("aug_embedding", cond["aug_logsnr"])
        if self.embed_guidance:
            embedding = style.gathering(GuidanceEmbedding, "guidance_embedding", dtype=jnp.float32)
            weight = cond["guidance_weight"]
            emb += embedding(self._width, width, name="guidance_embedding")(weight)
        if self.pool_heads:
            pool = style.gathering(TextPool, "text_pool", dtype=jnp.float32)
            emb += pool(width, self.pool_heads, name="text_pool")(text)
        for activation in self.embedding_activations:
            emb = ACTIVATIONS[activation](emb)
        return style.by_picture(emb.astype(self.dtype))

    def _level(self, i: int, style: Style, way: str) -> Level:
        """Level i on the way "down" or "up", or the "middle", which works at the last level."""
        attention = (self.self_attention[i], self.text_attention[i])
        none = (False, False)
        if way == "middle":
            attends = (self.middle_attention, none)
        else:
            count = self.num_blocks[i] + (way == "up" and self.entry_skips)
            before = attention if self.attention_per_block else none
            attends = (*[before] * (count - 1), attention)
        return Level(
            channels=self.channels * self.channel_mults[i],
            attention=attends,
            up=way == "up",
            stride=1 if way == "middle" else self.strides[i],
            outer_channels=self.channels * self.channel_mults[max(i - 1, 0)],
            resampling=self.resampling,
            remat=self.remat,
            scan_blocks=self.scan_blocks,
            style=style,
            name=way if way == "middle" else f"{way}_{i}",
        )

    def check(self) -> None:
        """Raises a UserError where a field has no such value, or fields contradict each other."""
        check_fields(self)
