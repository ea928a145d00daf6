"""The BERT encoder against its architecture, written again in NumPy, and against torch's."""

import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import cascade.text
from cascade.errors import UserError
from cascade.networks.bert import Bert, from_published, params_from_tensors

MINILM = Path(cascade.text.__file__).parent / "minilm"
DESCRIPTION = json.loads((MINILM / "config.json").read_text("utf-8"))
SMALL = Bert(
    vocab_size=11, positions=9, types=2, width=8, layers=2, heads=2, mlp_width=16, norm_eps=1e-12
)


@pytest.fixture(scope="module")
def tensors():
    return load_file(MINILM / "model.safetensors")


@pytest.fixture(scope="module")
def minilm(tensors):
    """The real model, as a compiled function of ids and mask."""
    bert = from_published(DESCRIPTION)
    params = params_from_tensors(bert, tensors)
    apply = jax.jit(bert.apply)
    return lambda ids, mask: np.asarray(apply({"params": params}, ids, mask))


@pytest.fixture(scope="module")
def small_params():
    return SMALL.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), bool))


def reference(tensors, ids, mask):
    """BERT in float64: Devlin et al. 2019, post-norm, 12 heads, erf GELU."""
    w = {name: np.float64(value) for name, value in tensors.items()}
    erf = np.vectorize(math.erf)

    def dense(h, name):
        return h @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(h, name):
        h = h - h.mean(-1, keepdims=True)
        h = h / np.sqrt((h**2).mean(-1, keepdims=True) + 1e-12)
        return h * w[f"{name}.LayerNorm.weight"] + w[f"{name}.LayerNorm.bias"]

    def heads(h):
        return h.reshape(*h.shape[:2], 12, 32).transpose(0, 2, 1, 3)

    at = "embeddings"
    h = w[f"{at}.word_embeddings.weight"][ids]
    h = h + w[f"{at}.position_embeddings.weight"][: ids.shape[1]]
    h = norm(h + w[f"{at}.token_type_embeddings.weight"][0], at)
    for i in range(6):
        at = f"encoder.layer.{i}"
        q, k, v = (heads(dense(h, f"{at}.attention.self.{n}")) for n in ("query", "key", "value"))
        logits = q @ k.transpose(0, 1, 3, 2) / np.sqrt(32)
        logits = np.where(mask[:, None, None, :], logits, -np.inf)
        p = np.exp(logits - logits.max(-1, keepdims=True))
        a = ((p / p.sum(-1, keepdims=True)) @ v).transpose(0, 2, 1, 3).reshape(h.shape)
        h = norm(h + dense(a, f"{at}.attention.output.dense"), f"{at}.attention.output")
        m = dense(h, f"{at}.intermediate.dense")
        m = m * (1 + erf(m / np.sqrt(2))) / 2
        h = norm(h + dense(m, f"{at}.output.dense"), f"{at}.output")
    return np.where(mask[..., None], h, 0)


def random_tokens(seed, batch, length, keep):
    """Random ids, and a mask that keeps at least the first token of each row."""
    rng = np.random.default_rng(seed)
    mask = rng.random((batch, length)) < keep
    mask[:, 0] = True
    return rng.integers(0, 30522, (batch, length), dtype=np.int32), mask


def relative_error(value, exact):
    return np.abs(value - exact).max() / np.abs(exact).max()


@pytest.mark.parametrize(("length", "keep"), [(1, 1.0), (7, 1.0), (24, 0.6), (70, 0.9)])
def test_equals_a_float64_forward_with_the_real_weights(minilm, tensors, length, keep):
    ids, mask = random_tokens(length, 2, length, keep)
    assert relative_error(minilm(ids, mask), reference(tensors, ids, mask)) < 2e-6


@pytest.mark.parametrize(("length", "keep"), [(5, 1.0), (33, 0.7)])
def test_equals_transformers_bert(minilm, tensors, length, keep):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    theirs = transformers.BertModel(
        transformers.BertConfig(**DESCRIPTION), add_pooling_layer=False
    ).eval()
    state = {name: torch.from_numpy(np.float32(value)) for name, value in tensors.items()}
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not unexpected and all("position_ids" in name for name in missing)
    ids, mask = random_tokens(length, 3, length, keep)
    with torch.no_grad():
        out = theirs(torch.from_numpy(ids).long(), attention_mask=torch.from_numpy(mask).long())
    exact = np.where(mask[..., None], out.last_hidden_state.numpy(), 0)
    assert relative_error(minilm(ids, mask), exact) < 2e-6


def test_what_stands_in_the_padding_changes_nothing(minilm):
    ids, mask = random_tokens(0, 3, 16, 0.5)
    others = np.where(mask, ids, random_tokens(1, 3, 16, 0.5)[0])
    assert not np.array_equal(ids, others)
    np.testing.assert_array_equal(minilm(ids, mask), minilm(others, mask))


def test_more_padding_changes_nothing(minilm):
    ids, mask = random_tokens(0, 2, 10, 0.8)
    padded = minilm(np.pad(ids, ((0, 0), (0, 22))), np.pad(mask, ((0, 0), (0, 22))))
    assert relative_error(padded[:, :10], minilm(ids, mask)) < 2e-6
    assert not padded[:, 10:].any()


def test_batch_mates_change_nothing(minilm):
    ids, mask = random_tokens(0, 4, 12, 0.7)
    alone = np.concatenate([minilm(ids[i : i + 1], mask[i : i + 1]) for i in range(4)])
    assert relative_error(alone, minilm(ids, mask)) < 2e-6


def test_a_row_without_tokens_gives_zeros(small_params):
    mask = jnp.array([[True, True], [False, False]])
    states = SMALL.apply(small_params, jnp.ones((2, 2), jnp.int32), mask)
    assert np.isfinite(states).all() and states[0].any() and not states[1].any()


def published(params):
    """The parameters of a Bert under the names and layouts of a weight file."""
    tensors = {}
    for module, leaves in params["params"].items():
        for leaf, value in leaves.items():
            name = f"{module}.{'bias' if leaf == 'bias' else 'weight'}"
            tensors[name] = np.asarray(value).T if leaf == "kernel" else np.asarray(value)
    return tensors


def test_extra_tensors_are_ignored_and_halves_become_float32(small_params):
    tensors = published(small_params)
    halves = {name: np.float16(value) for name, value in tensors.items()}
    loaded = params_from_tensors(SMALL, halves | {"pooler.dense.weight": np.zeros((8, 8))})
    jax.tree.map(
        lambda got, want: np.testing.assert_array_equal(got, np.float32(np.float16(want))),
        loaded,
        dict(small_params["params"]),
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded)} == {np.dtype(np.float32)}


@pytest.mark.parametrize("fault", ["lack", "shape", "NaN"])
def test_bad_weights_are_named(small_params, fault):
    name = "encoder.layer.1.output.dense.weight"
    tensors = published(small_params)
    if fault == "lack":
        del tensors[name]
    elif fault == "shape":
        tensors[name] = tensors[name][:, 1:]
    else:
        tensors[name] = np.where(np.eye(*tensors[name].shape) == 1, np.nan, tensors[name])
    with pytest.raises(UserError, match=fault) as caught:
        params_from_tensors(SMALL, tensors)
    assert name in str(caught.value)


@pytest.mark.parametrize("key", ["hidden_act", "position_embedding_type", "model_type"])
def test_a_variant_of_bert_is_refused(key):
    with pytest.raises(UserError, match=key):
        from_published(DESCRIPTION | {key: "other"})


def test_a_description_without_a_size_is_refused():
    with pytest.raises(UserError, match="hidden_size"):
        from_published({k: v for k, v in DESCRIPTION.items() if k != "hidden_size"})
