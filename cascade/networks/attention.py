"""Attention over pixels and text, and text pooled by attention.

Text is `(text_emb [B, L, D], text_mask [B, L])`; positions outside the mask change nothing.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from cascade.networks.layers import EPSILON, GroupNorm, Style

TEXT_GROUPS = 32  # of a group norm over text


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None, implementation: str
) -> jax.Array:
    """`softmax(q kᵀ / √d) v` over the keys inside the mask; zeros where the mask is empty.

    Args:
      q: [B, T, heads, d]. k, v: [B, S, heads, d].
      mask: [B, S] bool, or None for all keys.
      implementation: "auto" leaves it to the platform; else as `jax.nn.dot_product_attention`.
    """
    some = None
    if mask is not None:
        # No softmax over nothing: an empty row attends everywhere and its result is dropped.
        some = mask.any(-1, keepdims=True)
        mask = (mask | ~some)[:, None, None, :]
    if implementation == "auto":
        out = jax.lax.platform_dependent(q, k, v, mask, cpu=_heads_in_batch, default=_plain)
    else:
        out = jax.nn.dot_product_attention(q, k, v, mask=mask, implementation=implementation)
    return out if some is None else jnp.where(some[:, :, None, None], out, 0)


def _plain(q, k, v, mask):
    return jax.nn.dot_product_attention(q, k, v, mask=mask)


def _heads_in_batch(q, k, v, mask):
    """The same with heads as examples: XLA's CPU matrix products are 1.6 times faster so."""
    b, t, heads, d = q.shape
    q, k, v = (a.swapaxes(1, 2).reshape(b * heads, -1, 1, d) for a in (q, k, v))
    mask = None if mask is None else jnp.repeat(mask, heads, 0)
    out = jax.nn.dot_product_attention(q, k, v, mask=mask)
    return out.reshape(b, heads, t, d).swapaxes(1, 2)


class Attention(nn.Module):
    """Residual attention of pixels: over pixels, over text, or over both at once.

    With both, text joins as extra keys and values of self-attention (Imagen); with text alone it
    is cross-attention. Pixels pass a group norm, text what `style.text_norm` says. The output
    projection starts at zero, so a new layer passes on its input.
    """

    self_attention: bool
    text_attention: bool
    style: Style

    @nn.compact
    def __call__(self, x: jax.Array, text: tuple[jax.Array, jax.Array]) -> jax.Array:
        """Maps x [B, H, W, C] to the same shape."""
        b, h, w, c = x.shape
        style, dtype = self.style, self.style.dtype
        heads = (c // style.head_channels, style.head_channels)
        pixels = GroupNorm(style.norm_groups, dtype, name="norm")(x).reshape(b, h * w, c)
        mask = None
        if self.self_attention:
            qkv = nn.DenseGeneral((3, *heads), dtype=dtype, name="qkv")(pixels)
            q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        else:
            q = nn.DenseGeneral(heads, dtype=dtype, name="q")(pixels)
        if self.text_attention:
            text_emb, mask = text
            words = self._normed(text_emb, mask)
            text_kv = nn.DenseGeneral((2, *heads), dtype=dtype, name="text_kv")(words)
            text_k, text_v = text_kv[:, :, 0], text_kv[:, :, 1]
            if self.self_attention:
                k = jnp.concatenate([text_k, k], 1)
                v = jnp.concatenate([text_v, v], 1)
                mask = jnp.concatenate([mask, jnp.ones((b, h * w), bool)], 1)
            else:
                k, v = text_k, text_v
        out = attend(q, k, v, mask, style.attention_implementation)
        zeros = nn.initializers.zeros
        out = nn.DenseGeneral(c, (-2, -1), kernel_init=zeros, dtype=dtype, name="out")(out)
        return x + out.reshape(x.shape)

    def _normed(self, text_emb: jax.Array, mask: jax.Array) -> jax.Array:
        """Text after its norm: over each token's channels, or over groups of channels of all.

        "All" are the tokens inside the mask; of text without any, the result doesn't matter.
        """
        if self.style.text_norm == "layer":
            return nn.LayerNorm(EPSILON, name="text_norm")(text_emb)
        if self.style.text_norm == "group":
            norm = GroupNorm(TEXT_GROUPS, jnp.float32, name="text_norm")
            return norm(text_emb[:, :, None], counted=mask[:, :, None])[:, :, 0]
        return text_emb


class TextPool(nn.Module):
    """Pools text into one vector by attention: [B, L, D] -> [B, channels], in float32.

    The query is the mean token plus a learned vector, and it is a key beside the tokens, as in
    CLIP's attention pooling (Radford et al. 2021). So an empty text has a learned embedding.
    """

    channels: int
    heads: int

    @nn.compact
    def __call__(self, text: tuple[jax.Array, jax.Array]) -> jax.Array:
        text_emb, mask = text
        width = text_emb.shape[-1]
        words = nn.LayerNorm(EPSILON, name="norm_in")(text_emb)
        kept = mask[..., None]
        mean = (words * kept).sum(1, keepdims=True) / jnp.maximum(kept.sum(1, keepdims=True), 1)
        query = mean + self.param("query", nn.initializers.normal(width**-0.5), (width,))
        tokens = jnp.concatenate([query, words], 1)
        mask = jnp.concatenate([jnp.ones_like(mask[:, :1]), mask], 1)
        heads = (self.heads, width // self.heads)
        q = nn.DenseGeneral(heads, name="q")(query)
        kv = nn.DenseGeneral((2, *heads), name="kv")(tokens)
        pooled = attend(q, kv[:, :, 0], kv[:, :, 1], mask, "xla").reshape(-1, width)
        return nn.LayerNorm(EPSILON, name="norm_out")(nn.Dense(self.channels, name="out")(pooled))
