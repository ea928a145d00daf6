"""A T5 small enough to build in a test: random weights in a published folder's layout."""

import json
import math
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from cascade.interop.folders import write_weights
from cascade.interop.t5 import published_specs
from cascade.networks.t5 import T5, from_published

VOCABULARY = Path(__file__).parent / "text" / "t5_vocab" / "spiece.model"
DESCRIPTION = {
    "model_type": "t5",
    "feed_forward_proj": "gated-gelu",
    "vocab_size": 32128,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 32,
    "num_layers": 2,
    "num_heads": 2,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "layer_norm_epsilon": 1e-6,
}


def module(dtype: str = "float32", unroll: bool = True, **changes) -> T5:
    """The module of `DESCRIPTION`, some of its entries replaced."""
    return from_published(DESCRIPTION | changes, dtype, unroll)


def random_tensors(t5: T5, seed: int = 0) -> dict[str, np.ndarray]:
    """Float32 tensors under published names, large enough that each changes the states."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, spec in published_specs(t5).items():
        value = rng.normal(size=spec.shape).astype(np.float32)
        if "norm" in name:
            tensors[name] = 1 + 0.3 * value
        elif "relative" in name:
            tensors[name] = value
        else:
            tensors[name] = value / math.sqrt(spec.shape[1])
        if name.endswith("SelfAttention.q.weight"):
            tensors[name] /= math.sqrt(t5.head_width)  # T5 does not divide by it while attending
    return tensors


def as_params(t5: T5, tensors: dict[str, np.ndarray]) -> dict:
    """The module's parameters, put together without the code that loads them."""
    params = {"layers": {}}
    for path, names in t5_names(t5).items():
        values = [tensors[name] for name in names]
        *up, leaf = path.split("/")
        small = leaf.startswith("norm") or leaf == "relative_bias"
        dtype = jnp.float32 if small else t5.dtype
        value = np.stack(values) if up else values[0]
        (params["layers"] if up else params)[leaf] = jnp.asarray(value, dtype)
    return params


def t5_names(t5: T5) -> dict[str, list[str]]:
    """Our parameter's path → the tensors that make it, written out from the published layout."""
    block = "encoder.block.{}.layer."
    inside = {
        "norm_attention": "0.layer_norm",
        "query": "0.SelfAttention.q",
        "key": "0.SelfAttention.k",
        "value": "0.SelfAttention.v",
        "out": "0.SelfAttention.o",
        "norm_mlp": "1.layer_norm",
        "gate": "1.DenseReluDense.wi_0",
        "up": "1.DenseReluDense.wi_1",
        "down": "1.DenseReluDense.wo",
    }
    names = {
        "embedding": ["shared.weight"],
        "relative_bias": [block.format(0) + "0.SelfAttention.relative_attention_bias.weight"],
        "norm_out": ["encoder.final_layer_norm.weight"],
    }
    for ours, theirs in inside.items():
        names[f"layers/{ours}"] = [f"{block.format(i)}{theirs}.weight" for i in range(t5.layers)]
    return names


def write_folder(
    folder: Path, tensors=None, *, stored: str = "float32", shard_bytes: int = 10**9, **changes
) -> Path:
    """A published T5's folder: config.json, weights, spiece.model.

    Args:
      tensors: the weights; random ones by default.
      stored: their dtype in the files.
      shard_bytes: small for shards and an index.
      **changes: entries of config.json in place of `DESCRIPTION`'s.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = random_tensors(module(**changes)) if tensors is None else tensors
    values = {name: np.asarray(value, jnp.dtype(stored)) for name, value in tensors.items()}
    write_weights(folder, "model", values, lambda name, part: values[name][part], shard_bytes)
    (folder / "config.json").write_text(json.dumps(DESCRIPTION | changes))
    shutil.copyfile(VOCABULARY, folder / "spiece.model")
    return folder


def random_tokens(seed: int, batch: int, length: int, keep: float, vocab_size: int = 32128):
    """Random ids [B, L] and a mask that keeps at least the first token of each row."""
    rng = np.random.default_rng(seed)
    mask = rng.random((batch, length)) < keep
    mask[:, 0] = True
    return rng.integers(0, vocab_size, (batch, length), dtype=np.int32), mask


def relative_error(value, exact) -> float:
    """‖value − exact‖ / ‖exact‖."""
    value, exact = np.float64(value), np.float64(exact)
    return float(np.linalg.norm(value - exact) / np.linalg.norm(exact))
