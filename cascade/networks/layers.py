"""The U-Net's pieces that convolve: norms, resampling, embeddings, residual blocks.

Pictures are [B, H, W, C]. Parameters are float32; `Style.dtype` is what activations are kept in.
Norms, their statistics and the embedding of logsnr are float32 whatever it says.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from cascade.diffusion.schedules import timestep_logsnrs
from cascade.parallel.layout import Layout

TIMESTEPS = 1000  # of the schedules whose timesteps can be embedded
# GELU by erf, as published U-Nets have it; the tanh approximation is 5e-4 off.
ACTIVATIONS: dict[str, Callable] = {
    "silu": nn.silu,
    "gelu": functools.partial(nn.gelu, approximate=False),
}
EPSILON = 1e-5  # added to every norm's variance


class Style(NamedTuple):
    """What all layers of one network share.

    Attributes:
      norm_groups: groups of every group norm; divides every level's channels.
      activation: a key of `ACTIVATIONS`.
      dropout: rate inside residual blocks.
      head_channels: channels of an attention head; divides the channels of levels that attend.
      attention_implementation: "auto", or as `jax.nn.dot_product_attention`: "xla", "cudnn".
      text_norm: what text passes before it becomes keys and values: "layer", "group" or "none".
      skip_scale: factor on a skip connection before it is concatenated.
      residual_scale: factor on the result of each residual block.
      dtype: of activations.
      deterministic: no dropout.
      layout: how activations and weights lie on a mesh of devices; None leaves it to XLA.
    """

    norm_groups: int
    activation: str
    dropout: float
    head_channels: int
    attention_implementation: str
    text_norm: str
    skip_scale: float
    residual_scale: float
    dtype: jnp.dtype
    deterministic: bool
    layout: Layout | None

    def by_picture(self, x: jax.Array) -> jax.Array:
        """Keeps an activation [B, …] split by picture, where there is a layout."""
        return x if self.layout is None else self.layout.by_picture(x)

    def gathering(
        self, module: type[nn.Module], path: str, stacked: int = 0, dtype=None
    ) -> type[nn.Module]:
        """A module's class that gathers its weights, where there is a layout, before it uses them.

        Args:
          path: of its parameters in the network's.
          stacked: of how many equal ones it is one, run by a scan; 0 where it is alone.
          dtype: what it multiplies its kernels as; None is the activations'.
        """
        if self.layout is None:
            return module
        gather = functools.partial(
            self.layout.gathered, path=path, dtype=dtype or self.dtype, stacked=stacked
        )
        return nn.map_variables(module, "params", lambda split: {"params": gather(split["params"])})

    def act(self, x: jax.Array) -> jax.Array:
        """Applies the activation."""
        return ACTIVATIONS[self.activation](x)


def conv3x3(features: int, dtype, name: str, stride: int = 1, zero: bool = False) -> nn.Conv:
    """A 3×3 convolution whose output is `stride` times smaller; `zero` starts it at zero."""
    init = nn.initializers.zeros if zero else nn.initializers.lecun_normal()
    return nn.Conv(
        features, (3, 3), (stride, stride), padding=1, kernel_init=init, dtype=dtype, name=name
    )


def shrink(x: jax.Array, stride: int) -> jax.Array:
    """Averages squares of `stride`² pixels: [B, H, W, C] -> [B, H/stride, W/stride, C]."""
    b, h, w, c = x.shape
    return x.reshape(b, h // stride, stride, w // stride, stride, c).mean((2, 4))


def enlarge(x: jax.Array, stride: int) -> jax.Array:
    """Repeats each pixel `stride`² times: [B, H, W, C] -> [B, H·stride, W·stride, C]."""
    b, h, w, c = x.shape
    x = jnp.broadcast_to(x[:, :, None, :, None], (b, h, stride, w, stride, c))
    return x.reshape(b, h * stride, w * stride, c)


def pixel_shuffle(x: jax.Array, stride: int) -> jax.Array:
    """Turns channels into pixels: [B, H, W, stride²·C] -> [B, H·stride, W·stride, C]."""
    b, h, w, c = x.shape
    x = x.reshape(b, h, w, stride, stride, c // stride**2)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, h * stride, w * stride, -1)


def pixel_unshuffle(x: jax.Array, stride: int) -> jax.Array:
    """`pixel_shuffle`'s inverse: [B, H·stride, W·stride, C] -> [B, H, W, stride²·C]."""
    b, h, w, c = x.shape
    x = x.reshape(b, h // stride, stride, w // stride, stride, c)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, h // stride, w // stride, -1)


class GroupNorm(nn.Module):
    """Group normalisation (Wu & He 2018), with an optional scale and shift an example.

    `y = ((x − mean) / sqrt(var + 1e-5) · gamma + beta) · (1 + scale) + shift`, folded into one
    multiply and one add an element, so that the picture is read twice and written once.
    """

    groups: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        modulation: tuple[jax.Array, jax.Array] | None = None,
        counted: jax.Array | None = None,
    ):
        """Normalises x [B, H, W, C].

        Args:
          modulation: (scale, shift), each [B, C].
          counted: [B, H, W] bool, where mean and var are taken; everywhere if None. Where none is
            True they are 0.
        """
        b, _, _, c = x.shape
        gamma = self.param("scale", nn.initializers.ones, (c,))
        beta = self.param("bias", nn.initializers.zeros, (c,))
        wide = x.astype(jnp.float32)
        if counted is None:
            moments = jnp.stack([wide.mean((1, 2)), jnp.square(wide).mean((1, 2))])
        else:
            kept = jnp.where(counted[..., None], wide, 0)
            number = jnp.maximum(counted.sum((1, 2)), 1)[:, None]
            moments = jnp.stack([kept.sum((1, 2)), jnp.square(kept).sum((1, 2))]) / number
        moments = moments.reshape(2, b, self.groups, -1).mean(-1, keepdims=True)
        mean, square = jnp.broadcast_to(moments, (2, b, self.groups, c // self.groups))
        rstd = jax.lax.rsqrt(jnp.maximum(square - mean**2, 0) + EPSILON).reshape(b, c)
        factor = rstd * gamma
        offset = beta - mean.reshape(b, c) * factor
        if modulation is not None:
            scale, shift = (m.astype(jnp.float32) for m in modulation)
            factor, offset = factor * (1 + scale), offset * (1 + scale) + shift
        y = wide * factor[:, None, None] + offset[:, None, None]
        return y.astype(self.dtype)


def waves(value: jax.Array, features: int) -> jax.Array:
    """Sines and cosines of numbers [B], [B, features], of wavelengths from 80 down to 1."""
    half = features // 2
    frequencies = 2 * math.pi / jnp.geomspace(80.0, 1.0, half, dtype=jnp.float32)
    angles = value.astype(jnp.float32)[:, None] * frequencies
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)


class NoiseEmbedding(nn.Module):
    """Embeds noise levels [B] -> [B, channels]: sinusoids, then a two-layer perceptron, in float32.

    `scale` "logsnr": the angles are `logsnr · f` with f geometric from 2π/80 (half a turn over
    [-20, 20], so no two values look alike) to 2π (a turn a unit, about forty steps of a
    thousand-step schedule).

    Else `scale` names the betas of a thousand-step DDPM schedule, and the angles are `i · 10000^-u`
    with i the timestep, 0 … 999, of that logsnr and u from 0 to 1 (Vaswani et al. 2017; Ho et al.
    2020). Between timesteps i is interpolated; a logsnr beyond the schedule's counts as its end, so
    that a stage whose own schedule goes further doesn't tell such levels apart.
    """

    scale: str
    features: int
    channels: int
    activation: str

    @nn.compact
    def __call__(self, logsnr: jax.Array) -> jax.Array:
        if self.scale == "logsnr":
            x = waves(logsnr, self.features)
        else:
            logsnr, half = logsnr.astype(jnp.float32)[:, None], self.features // 2
            table = timestep_logsnrs(self.scale, TIMESTEPS)[::-1]
            i = jnp.interp(logsnr, table, jnp.arange(TIMESTEPS - 1.0, -1.0, -1.0))
            angles = i * jnp.exp(-math.log(10_000) * jnp.arange(half) / half)
            x = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], -1)
        x = nn.Dense(self.channels, name="dense_in")(x)
        return nn.Dense(self.channels, name="dense_out")(ACTIVATIONS[self.activation](x))


class GuidanceEmbedding(nn.Module):
    """Embeds guidance weights [B] -> [B, channels]: sinusoids, then a dense layer, in float32.

    The layer starts at zero: a student that is told the weight begins as the teacher, which isn't
    (Meng et al. 2023, §3.1). Weights from 0 to 80 all look different, as `waves` has it.
    """

    features: int
    channels: int

    @nn.compact
    def __call__(self, weight: jax.Array) -> jax.Array:
        zero = nn.initializers.zeros
        dense = nn.Dense(self.channels, use_bias=False, kernel_init=zero, name="dense")
        return dense(waves(weight, self.features))


class ResidualBlock(nn.Module):
    """BigGAN's residual block with scale-shift norm (Brock et al. 2019; Dhariwal & Nichol 2021).

    `x + conv(dropout(act(norm(h) · (1 + scale) + shift)))`, times `residual_scale`, with
    `h = conv(act(norm(x)))` and scale, shift a linear function of the embedding. `resize` acts
    before h's convolution and on x. The last convolution starts at zero, so a new block passes on
    its input.
    """

    channels: int
    style: Style
    resize: Callable[[jax.Array], jax.Array] = lambda x: x

    @nn.compact
    def __call__(self, x: jax.Array, emb: jax.Array) -> jax.Array:
        """Maps x [B, H, W, C] and the activated embedding emb [B, E] to [B, H', W', channels]."""
        style = self.style
        h = style.act(GroupNorm(style.norm_groups, style.dtype, name="norm_in")(x))
        h = conv3x3(self.channels, style.dtype, "conv_in")(self.resize(h))
        modulation = nn.Dense(2 * self.channels, dtype=style.dtype, name="modulation")(emb)
        norm_out = GroupNorm(style.norm_groups, style.dtype, name="norm_out")
        h = style.act(norm_out(h, tuple(jnp.split(modulation, 2, -1))))
        h = nn.Dropout(style.dropout, deterministic=style.deterministic)(h)
        h = conv3x3(self.channels, style.dtype, "conv_out", zero=True)(h)
        x = self.resize(x)
        if x.shape[-1] != self.channels:
            x = nn.Dense(self.channels, dtype=style.dtype, name="shortcut")(x)
        return (x + h) * style.residual_scale


class Downsample(nn.Module):
    """Makes a picture `stride` times smaller on the way down.

    `kind` "block" is a residual block that averages pixels and keeps the channels (BigGAN); else
    a strided convolution to `channels` (Efficient U-Net).
    """

    channels: int
    stride: int
    kind: str
    style: Style

    @nn.compact
    def __call__(self, x: jax.Array, emb: jax.Array) -> jax.Array:
        if self.kind == "block":
            block = ResidualBlock(
                x.shape[-1], self.style, lambda y: shrink(y, self.stride), name="residual"
            )
            return block(x, emb)
        return conv3x3(self.channels, self.style.dtype, "conv", self.stride)(x)


class Upsample(nn.Module):
    """Makes a picture `stride` times larger on the way up, never by transposed convolution.

    `kind` "block" is a residual block that repeats pixels and keeps the channels (BigGAN);
    "nearest" repeats pixels and convolves to `channels`; "shuffle" convolves to `stride²·channels`
    and turns channels into pixels (Shi et al. 2016), at a quarter of nearest's work an input.
    """

    channels: int
    stride: int
    kind: str
    style: Style

    @nn.compact
    def __call__(self, x: jax.Array, emb: jax.Array) -> jax.Array:
        if self.kind == "block":
            block = ResidualBlock(
                x.shape[-1], self.style, lambda y: enlarge(y, self.stride), name="residual"
            )
            return block(x, emb)
        if self.kind == "nearest":
            return conv3x3(self.channels, self.style.dtype, "conv")(enlarge(x, self.stride))
        features = self.stride**2 * self.channels
        return pixel_shuffle(conv3x3(features, self.style.dtype, "conv")(x), self.stride)
