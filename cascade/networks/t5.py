"""T5's encoder, version 1.1 (Raffel et al. 2020; gated GELU: Shazeer 2020), which Flan-T5 shares.

Parameters keep the layout of published files, [out, in], so that a shard of one is a slice of a
tensor in a file (`PUBLISHED`). Layers are stacked along a leading axis [N, …].
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import PartitionSpec as P

from cascade.errors import UserError
from cascade.parallel.layout import Layout
from cascade.parallel.mesh import batch_shares

# Our parameter's path → the published tensor's name, {} the layer's number.
PUBLISHED = {
    "embedding": "shared.weight",
    "relative_bias": "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
    "layers/norm_attention": "encoder.block.{}.layer.0.layer_norm.weight",
    "layers/query": "encoder.block.{}.layer.0.SelfAttention.q.weight",
    "layers/key": "encoder.block.{}.layer.0.SelfAttention.k.weight",
    "layers/value": "encoder.block.{}.layer.0.SelfAttention.v.weight",
    "layers/out": "encoder.block.{}.layer.0.SelfAttention.o.weight",
    "layers/norm_mlp": "encoder.block.{}.layer.1.layer_norm.weight",
    "layers/gate": "encoder.block.{}.layer.1.DenseReluDense.wi_0.weight",
    "layers/up": "encoder.block.{}.layer.1.DenseReluDense.wi_1.weight",
    "layers/down": "encoder.block.{}.layer.1.DenseReluDense.wo.weight",
    "norm_out": "encoder.final_layer_norm.weight",
}

# What `cascade.parallel.rules` lays over a mesh: heads and the MLP's width over `tensor`, so that a
# layer needs two sums between devices; the other axis over `fsdp`. The embedding is split along
# its width, since rows are what is looked up.
RULES = (
    (r"layers/(query|key|value|gate|up)$", P(None, "tensor", "fsdp")),
    (r"layers/(out|down)$", P(None, "fsdp", "tensor")),
    (r"embedding$", P(None, ("fsdp", "tensor"))),
    (r"norm|relative_bias", P()),
)


class T5(nn.Module):
    """Token states of T5's encoder, without dropout.

    h = E[ids]; for every layer, pre-norm and without biases,
    n = RMS(h),  h ← h + O·softmax(Q n (K n)ᵀ + b + mask) V n,
    n = RMS(h),  h ← h + W₂ (gelu(W₀ n) ⊙ W₁ n);  states = RMS(h),
    with RMS(h) = g ⊙ h / √(mean h² + ε), the tanh GELU, no 1/√d, and one table b of biases by
    head and bucketed distance (`distance_buckets`), which all layers share.

    Attributes:
      dtype: of matrices, and of what they multiply. The sum h, norms and softmax are float32.
      unroll: no loop over layers: larger to compile, but a CPU multiplies faster outside of loops.
      layout: how activations and weights lie on a mesh of devices; None leaves it to XLA, as do
        fewer tokens than `width` (weights then have more to send than activations) and a batch
        that the mesh doesn't divide.
    """

    vocab_size: int
    width: int
    layers: int
    heads: int
    head_width: int
    mlp_width: int
    buckets: int
    max_distance: int
    norm_eps: float
    dtype: jnp.dtype
    unroll: bool
    layout: Layout | None = None

    @nn.compact
    def __call__(self, ids: jax.Array, mask: jax.Array) -> jax.Array:
        """Encodes tokens.

        Args:
          ids: [B, L] int32.
          mask: [B, L] bool, True at tokens; nothing attends to the rest.

        Returns:
          [B, L, width] float32. Padding has states too: those of its ids attending to the tokens.
        """
        layout = self.layout
        if layout is not None and (
            ids.size < self.width or ids.shape[0] % batch_shares(layout.mesh)
        ):
            layout = None
        with jax.default_matmul_precision("float32"):
            embedding = _matrix(self, "embedding", (self.vocab_size, self.width), 1.0)
            h = _by_picture(layout, embedding[ids]).astype(jnp.float32)
            table = self.param(
                "relative_bias",
                nn.initializers.normal(self.width**-0.5),
                (self.buckets, self.heads),
                jnp.float32,
            )
            buckets = distance_buckets(ids.shape[1], self.buckets, self.max_distance)
            bias = table[buckets].transpose(2, 0, 1)[None]
            layers = nn.scan(
                Layer,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=nn.broadcast,
                length=self.layers,
                unroll=self.layers if self.unroll else 1,
            )
            sizes = (self.heads, self.head_width, self.mlp_width, self.norm_eps, self.dtype)
            h, _ = layers(*sizes, layout, self.layers, name="layers")(h, bias, mask)
            return _rms(self, "norm_out", h, self.norm_eps)


class Layer(nn.Module):
    """Self-attention and a gated MLP, each added to what it read; equations in `T5`.

    Attributes:
      layout: as `T5`'s.
      stacked: of how many layers it is one.
    """

    heads: int
    head_width: int
    mlp_width: int
    norm_eps: float
    dtype: jnp.dtype
    layout: Layout | None
    stacked: int

    @nn.compact
    def __call__(self, h: jax.Array, bias: jax.Array, mask: jax.Array) -> tuple[jax.Array, None]:
        """Maps h [B, L, D] float32, given bias [1, heads, L, L] and mask [B, L], to its like."""
        inner, width = self.heads * self.head_width, h.shape[-1]
        head_shape = (*h.shape[:2], self.heads, self.head_width)

        def times(n, name, features, std):
            """[B, L, in] → [B, L, features] in float32, by a matrix [features, in]."""
            matrix = _matrix(self, name, (features, n.shape[-1]), std)
            if self.layout is not None:
                whole = self.layout.gathered({name: matrix}, "layers", self.dtype, self.stacked)
                matrix = whole[name]
            n = n.astype(self.dtype)
            return jnp.einsum("bli,oi->blo", n, matrix, preferred_element_type=jnp.float32)

        n = _rms(self, "norm_attention", h, self.norm_eps)
        q = times(n, "query", inner, (width * self.head_width) ** -0.5)
        k = times(n, "key", inner, width**-0.5)
        v = times(n, "value", inner, width**-0.5)
        q, k, v = (a.astype(self.dtype).reshape(head_shape) for a in (q, k, v))
        # The softmax is float32 inside. A row without tokens attends evenly, to nothing of use.
        a = jax.nn.dot_product_attention(
            q, k, v, bias, mask[:, None, None, :], scale=1.0, implementation="xla"
        )
        h = h + times(a.reshape(*h.shape[:2], inner), "out", width, inner**-0.5)
        h = _by_picture(self.layout, h)

        n = _rms(self, "norm_mlp", h, self.norm_eps)
        gate = nn.gelu(times(n, "gate", self.mlp_width, width**-0.5), approximate=True)
        m = gate * times(n, "up", self.mlp_width, width**-0.5)
        h = h + times(m, "down", width, self.mlp_width**-0.5)
        return _by_picture(self.layout, h), None


def _by_picture(layout: Layout | None, h: jax.Array) -> jax.Array:
    return h if layout is None else layout.by_picture(h)


def _matrix(module: nn.Module, name: str, shape: tuple[int, int], std: float) -> jax.Array:
    return module.param(name, nn.initializers.normal(std), shape, module.dtype)


def _rms(module: nn.Module, name: str, h: jax.Array, eps: float) -> jax.Array:
    """g ⊙ h / √(mean h² + ε) over the last axis, in float32."""
    g = module.param(name, nn.initializers.ones, h.shape[-1:], jnp.float32)
    return g * h * jax.lax.rsqrt(jnp.mean(h * h, -1, keepdims=True) + eps)


def distance_buckets(length: int, buckets: int, max_distance: int) -> np.ndarray:
    """The bucket of every distance key − query in a sequence: [L, L] int32.

    With B = buckets/2 for each direction, keys behind the query (or at it) have 0 … B−1, those
    ahead B … 2B−1. Distances below e = B/2 have a bucket each; beyond, n has
    e + ⌊(B−e)·log(n/e) / log(max_distance/e)⌋, at most B−1 (Raffel et al. 2020, section 2.1).
    """
    half = buckets // 2
    exact = half // 2
    rest = half - exact

    def bucket(n: int) -> int:
        # n/e ≥ (d/e)^(k/rest), multiplied out: whole numbers don't round at a bucket's edge.
        passed = (n**rest * exact**k >= exact**rest * max_distance**k for k in range(1, rest))
        return n if n < exact else exact + sum(passed)

    by_distance = np.array([bucket(n) for n in range(length)], np.int32)
    relative = np.arange(length)[None, :] - np.arange(length)[:, None]
    return by_distance[np.abs(relative)] + np.where(relative > 0, half, 0).astype(np.int32)


# A published config.json's fields that name the module's.
_FIELDS = {
    "vocab_size": "vocab_size",
    "d_model": "width",
    "num_layers": "layers",
    "num_heads": "heads",
    "d_kv": "head_width",
    "d_ff": "mlp_width",
    "relative_attention_num_buckets": "buckets",
    "relative_attention_max_distance": "max_distance",
    "layer_norm_epsilon": "norm_eps",
}
# What takes time or memory in its own right, before any weight is looked at: XXL has 24, 64 and 32.
_MOST = {"layers": 1000, "heads": 1000, "buckets": 1000}
_ADDED_LATER = {"relative_attention_max_distance": 128}  # what files mean that are older than it
# Fields that must have one value, where a file has them.
_BUILT = {
    "model_type": "t5",
    "feed_forward_proj": "gated-gelu",
    "dense_act_fn": "gelu_new",
    "is_gated_act": True,
    "is_decoder": False,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
# Fields that change nothing in a frozen encoder: of the decoder, of training, of bookkeeping.
_WITHOUT_EFFECT = frozenset(
    """
    _name_or_path architectures transformers_version tokenizer_class dtype torch_dtype n_positions
    output_past task_specific_params dropout_rate classifier_dropout initializer_factor
    gradient_checkpointing num_decoder_layers decoder_start_token_id is_encoder_decoder use_cache
    tie_word_embeddings scale_decoder_outputs chunk_size_feed_forward return_dict
    output_hidden_states output_attentions id2label label2id problem_type
    """.split()  # noqa: SIM905
)


def from_published(description: Mapping[str, Any], dtype: str, unroll: bool) -> T5:
    """The module that a published `config.json` describes.

    Args:
      description: the file's object.
      dtype, unroll: as `T5`'s.

    Raises:
      UserError: a field is missing, unknown, of the wrong kind, or asks for a variant that isn't
        built here, such as the first T5 (`feed_forward_proj` "relu").
    """
    description = {**_ADDED_LATER, **description}
    for key in (*_FIELDS, "model_type", "feed_forward_proj"):
        if key not in description:
            raise UserError(f"The text encoder's config.json lacks {key!r}; give a T5's own file.")
    for key, value in description.items():
        if key in _BUILT and value != _BUILT[key]:
            raise UserError(
                f"The text encoder's {key} is {str(value)[:40]!r}, but only {_BUILT[key]!r} is"
                " built here; choose a T5 of version 1.1 or a Flan-T5."
            )
        if key not in _FIELDS and key not in _BUILT and key not in _WITHOUT_EFFECT:
            raise UserError(
                f"The text encoder's config.json has the option {key[:40]!r}, which isn't known"
                " here; choose a T5 of version 1.1 or a Flan-T5 as it was published."
            )
    for key, field in _FIELDS.items():
        value = description[key]
        kind = float if field == "norm_eps" else int
        most = _MOST.get(field, 2**31 - 1)
        if type(value) is not kind or not 0 < value <= most:
            raise UserError(
                f"The text encoder's {key} is {str(value)[:40]!r}; a positive {kind.__name__}, at"
                f" most {most}, is needed, so give a T5's own config.json."
            )
    if description["relative_attention_num_buckets"] % 4:
        raise UserError(
            "The text encoder's relative_attention_num_buckets is"
            f" {description['relative_attention_num_buckets']}; a multiple of 4 is needed, so give"
            " a T5's own config.json."
        )
    fields = {field: description[key] for key, field in _FIELDS.items()}
    return T5(**fields, dtype=jnp.dtype(dtype), unroll=unroll)


def published(t5: T5) -> dict[str, Any]:
    """The config.json that describes a module; `from_published` reads it, and so do others."""
    fields = {key: getattr(t5, field) for key, field in _FIELDS.items()}
    return {"architectures": ["T5EncoderModel"], **_BUILT, **fields}
