"""BERT's encoder: per-token states of a bidirectional transformer (Devlin et al. 2019)."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from cascade.errors import UserError


class Bert(nn.Module):
    """Token states of BERT, without the pooling layer.

    h_0 = LN(word[ids] + position[0..L-1] + type[0]); for every layer
    a = LN(h + O·softmax(Q h (K h)ᵀ / √d + mask) V h),  h' = LN(a + W₂ gelu(W₁ a)),
    with post-norm, biases everywhere and the exact (erf) GELU.

    Submodules carry the names of the original parameters, dots included, so that a weight file
    maps by one rule (`params_from_tensors`).
    """

    vocab_size: int
    positions: int
    types: int
    width: int
    layers: int
    heads: int
    mlp_width: int
    norm_eps: float

    @nn.compact
    def __call__(self, ids: jax.Array, mask: jax.Array) -> jax.Array:
        """Encodes tokens in float32, at full matrix precision on every device.

        Args:
          ids: [B, L] int32.
          mask: [B, L] bool, True at tokens. Padding is neither attended to nor returned.

        Returns:
          [B, L, width] float32, zero wherever the mask is False.
        """
        with jax.default_matmul_precision("float32"):
            return self._states(ids, mask)

    def _states(self, ids, mask):
        batch, length = ids.shape
        head_shape = (batch, length, self.heads, self.width // self.heads)

        def embedding(name, rows):
            return nn.Embed(rows, self.width, name=f"embeddings.{name}")

        def norm(name):
            return nn.LayerNorm(epsilon=self.norm_eps, name=f"{name}.LayerNorm")

        h = embedding("word_embeddings", self.vocab_size)(ids)
        h += embedding("position_embeddings", self.positions)(jnp.arange(length))
        h += embedding("token_type_embeddings", self.types)(jnp.zeros((), jnp.int32))
        h = norm("embeddings")(h)

        for i in range(self.layers):
            at = f"encoder.layer.{i}"
            q, k, v = (
                nn.Dense(self.width, name=f"{at}.attention.self.{name}")(h).reshape(head_shape)
                for name in ("query", "key", "value")
            )
            # A row without tokens attends evenly to padding; its states are zeroed below.
            a = jax.nn.dot_product_attention(q, k, v, mask=mask[:, None, None, :])
            a = nn.Dense(self.width, name=f"{at}.attention.output.dense")(a.reshape(h.shape))
            h = norm(f"{at}.attention.output")(h + a)
            m = nn.Dense(self.mlp_width, name=f"{at}.intermediate.dense")(h)
            m = nn.Dense(self.width, name=f"{at}.output.dense")(nn.gelu(m, approximate=False))
            h = norm(f"{at}.output")(h + m)
        return jnp.where(mask[..., None], h, 0.0)


# A weight file's fields that name the module's; the rest is checked against what is built here.
_FIELDS = {
    "vocab_size": "vocab_size",
    "max_position_embeddings": "positions",
    "type_vocab_size": "types",
    "hidden_size": "width",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "intermediate_size": "mlp_width",
    "layer_norm_eps": "norm_eps",
}
_BUILT = {
    "model_type": "bert",
    "hidden_act": "gelu",
    "position_embedding_type": "absolute",
}


def from_published(description: Mapping) -> Bert:
    """The module that a published `config.json` describes.

    Raises:
      UserError: a field is missing, or asks for a variant of BERT that is not built here.
    """
    for key in (*_FIELDS, *_BUILT):
        if key not in description:
            raise UserError(
                f"The text encoder's config.json lacks {key!r}; give a BERT's own file."
            )
    for key, built in _BUILT.items():
        if description[key] != built:
            raise UserError(
                f"The text encoder's {key} is {description[key]!r}, but only {built!r} is built"
                " here; choose another encoder."
            )
    return Bert(**{field: description[key] for key, field in _FIELDS.items()})


def params_from_tensors(bert: Bert, tensors: Mapping[str, np.ndarray]) -> dict:
    """Flax parameters, in float32, from tensors under their original names.

    `<module>.bias` stays; `<module>.weight` becomes an `embedding`, a norm's `scale`, or the
    transpose of a dense `kernel`. Tensors that the encoder has no use for (a pooler) are ignored.

    Raises:
      UserError: a tensor is missing, has another shape, or holds NaN or infinity.
    """
    ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    mask = jax.ShapeDtypeStruct((1, 1), jnp.bool)
    wanted = jax.eval_shape(bert.init, jax.random.key(0), ids, mask)["params"]
    return {
        module: {
            leaf: _tensor(tensors, f"{module}.{'bias' if leaf == 'bias' else 'weight'}", leaf, spec)
            for leaf, spec in leaves.items()
        }
        for module, leaves in wanted.items()
    }


def _tensor(tensors: Mapping[str, np.ndarray], name: str, leaf: str, spec) -> np.ndarray:
    """One tensor as the leaf that `spec` describes."""
    if name not in tensors:
        raise UserError(f"The text encoder's weights lack {name!r}; give the whole file.")
    value = np.asarray(tensors[name], np.float32)
    value = value.T if leaf == "kernel" else value
    if value.shape != spec.shape:
        raise UserError(
            f"The text encoder's weight {name!r} has the shape {tensors[name].shape}, which does"
            " not fit its config.json; take both from one source."
        )
    if not np.isfinite(value).all():
        raise UserError(
            f"The text encoder's weight {name!r} holds NaN or infinity; fetch it again."
        )
    return value
