"""T5's encoder against torch's (also where there is none: its golden states), and its laws."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P
from safetensors import safe_open
from tiny_t5 import DESCRIPTION, as_params, module, random_tensors, random_tokens, relative_error

from cascade.errors import UserError
from cascade.interop.t5 import abstract_params
from cascade.networks.t5 import RULES, distance_buckets, from_published, published
from cascade.parallel import hlo, rules
from cascade.parallel.collectives import collectives
from cascade.parallel.layout import Layout
from cascade.parallel.mesh import AXES, batch_sharding, make_mesh, split_rows
from cascade.parallel.rules import shardings
from cascade.shards import named

GOLDEN = Path(__file__).parents[1] / "golden" / "t5.safetensors"
CASES = ["like_published", "odd_sizes"]
# Bounds on ‖ours − theirs‖ / ‖theirs‖, theirs always float32.
ERRORS = {"float32": 1e-4, "bfloat16": 2e-2}
# What T5 v1.1 and Flan-T5 were published in: width, MLP, layers, heads.
PUBLISHED_SIZES = {
    "small": (512, 1024, 8, 6),
    "base": (768, 2048, 12, 12),
    "large": (1024, 2816, 24, 16),
    "xl": (2048, 5120, 24, 32),
    "xxl": (4096, 10240, 24, 64),
}
SMALL = {"vocab_size": 50}


def run(t5, params, ids, mask):
    return np.asarray(jax.jit(t5.apply)({"params": params}, ids, mask))


@pytest.fixture(scope="module")
def small():
    """A module and its random parameters, as a compiled function of ids and mask."""
    t5 = module(**SMALL)
    params = as_params(t5, random_tensors(t5))
    apply = jax.jit(t5.apply)
    return lambda ids, mask: np.asarray(apply({"params": params}, ids, mask))


# ------------------------------------------------------------------------------ others' states


@pytest.mark.parametrize("dtype", list(ERRORS))
@pytest.mark.parametrize("case", CASES)
def test_equals_the_golden_states(case, dtype):
    with safe_open(GOLDEN, "np") as file:
        changes = json.loads(file.metadata()["cases"])[case]
        held = {name: file.get_tensor(f"{case}/{name}") for name in ("ids", "mask", "states")}
        t5 = module(dtype, **changes)
        tensors = {name: file.get_tensor(f"{case}/{name}") for name in random_tensors(t5)}
    states = run(t5, as_params(t5, tensors), held["ids"], held["mask"])
    assert states.dtype == np.float32
    assert relative_error(states, held["states"]) < ERRORS[dtype]


@pytest.mark.parametrize("dtype", list(ERRORS))
@pytest.mark.parametrize(
    ("changes", "length", "keep"),
    [
        ({}, 1, 1.0),
        ({"d_model": 64, "d_kv": 16, "d_ff": 160, "num_layers": 4, "num_heads": 4}, 77, 0.3),
        ({"d_model": 24, "d_kv": 8, "num_heads": 6}, 160, 0.8),
        ({"relative_attention_num_buckets": 8, "relative_attention_max_distance": 16}, 33, 0.6),
        ({"layer_norm_epsilon": 1e-2, "num_layers": 1}, 256, 1.0),
    ],
)
def test_equals_transformers(changes, length, keep, dtype):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    changes = SMALL | changes
    t5 = module(dtype, **changes)
    tensors = random_tensors(t5, seed=length)
    theirs = transformers.T5EncoderModel(transformers.T5Config(**DESCRIPTION | changes)).eval()
    state = {name: torch.from_numpy(value) for name, value in tensors.items()}
    theirs.load_state_dict(state | {"encoder.embed_tokens.weight": state["shared.weight"]})
    ids, mask = random_tokens(length, 3, length, keep, SMALL["vocab_size"])
    with torch.no_grad():
        out = theirs(torch.from_numpy(ids).long(), torch.from_numpy(mask).long())
    ours = run(t5, as_params(t5, tensors), ids, mask)
    assert relative_error(ours, out.last_hidden_state.numpy()) < ERRORS[dtype]


@pytest.mark.parametrize(("buckets", "max_distance"), [(32, 128), (16, 50), (8, 20), (4, 3)])
def test_buckets_equal_transformers(buckets, max_distance):
    torch = pytest.importorskip("torch")
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
    relative = torch.arange(600)[None, :] - torch.arange(600)[:, None]
    theirs = t5.T5Attention._relative_position_bucket(relative, True, buckets, max_distance)
    np.testing.assert_array_equal(distance_buckets(600, buckets, max_distance), theirs.numpy())


# --------------------------------------------------------------------------------------- laws


def test_known_buckets():
    ahead = distance_buckets(200, 32, 128)[0]
    assert ahead[[0, 1, 7, 8, 11, 12, 15, 16, 127, 128, 199]].tolist() == [
        *(0, 17, 23, 24, 24, 25, 25, 26, 31, 31, 31),
    ]
    assert distance_buckets(200, 32, 128)[199, ::-1][:3].tolist() == [0, 1, 2]


@given(st.integers(1, 300), st.sampled_from([4, 8, 32]), st.integers(9, 200))
def test_buckets_grow_with_distance_and_tell_directions_apart(length, buckets, max_distance):
    table = distance_buckets(length, buckets, max_distance)
    behind, ahead = table[-1, ::-1], table[0]
    assert (np.diff(behind) >= 0).all() and behind.max() < buckets // 2
    np.testing.assert_array_equal(ahead[1:], behind[1:] + buckets // 2)
    assert (behind[max_distance:] == buckets // 2 - 1).all()


def test_what_stands_in_the_padding_changes_no_token(small):
    ids, mask = random_tokens(0, 3, 16, 0.5, 50)
    others = np.where(mask, ids, random_tokens(1, 3, 16, 0.5, 50)[0])
    assert not np.array_equal(ids, others)
    np.testing.assert_array_equal(small(ids, mask)[mask], small(others, mask)[mask])


def test_more_padding_changes_nothing(small):
    ids, mask = random_tokens(0, 2, 10, 0.8, 50)
    padded = small(np.pad(ids, ((0, 0), (0, 22))), np.pad(mask, ((0, 0), (0, 22))))
    assert relative_error(padded[:, :10], small(ids, mask)) < 2e-6


def test_batch_mates_change_nothing(small):
    ids, mask = random_tokens(0, 4, 12, 0.7, 50)
    alone = np.concatenate([small(ids[i : i + 1], mask[i : i + 1]) for i in range(4)])
    assert relative_error(alone, small(ids, mask)) < 2e-6


def test_the_order_of_words_matters(small):
    ids, mask = random_tokens(0, 1, 6, 1.0, 50)
    assert relative_error(small(ids[:, ::-1], mask)[:, ::-1], small(ids, mask)) > 0.05


def test_a_row_without_tokens_is_finite(small):
    assert np.isfinite(small(np.zeros((1, 5), np.int32), np.zeros((1, 5), bool))).all()


@pytest.mark.parametrize("dtype", list(ERRORS))
def test_a_loop_over_layers_changes_nothing(dtype):
    flat, loop = (module(dtype, unroll, **SMALL) for unroll in (True, False))
    params = as_params(flat, random_tensors(flat))
    ids, mask = random_tokens(0, 2, 9, 0.8, 50)
    assert relative_error(run(loop, params, ids, mask), run(flat, params, ids, mask)) < 2e-6


def test_bfloat16_is_for_matrices_alone():
    dtypes = {path: leaf.dtype for path, leaf in named(abstract_params(module("bfloat16")))}
    small = {path for path, dtype in dtypes.items() if dtype == jnp.float32}
    assert small == {"layers/norm_attention", "layers/norm_mlp", "norm_out", "relative_bias"}
    assert set(dtypes.values()) == {jnp.dtype("float32"), jnp.dtype("bfloat16")}


# -------------------------------------------------------------------------------- on a mesh


def mesh_of(*sizes):
    return make_mesh(**dict(zip(AXES, sizes, strict=True)))


@pytest.fixture
def everything_is_large(monkeypatch):
    monkeypatch.setattr(rules, "SMALLEST_SHARDED", 1)


MESHES = [(1, 4, 2), (2, 2, 2), (1, 1, 8), (1, 8, 1), (8, 1, 1)]
OVER_MESHES = {"d_model": 32, "d_ff": 64, "num_heads": 8}


@pytest.mark.parametrize(("sizes", "told"), [*((m, True) for m in MESHES), ((1, 4, 2), False)])
def test_sharded_equals_unsharded(sizes, told, everything_is_large):
    mesh = mesh_of(*sizes)
    t5 = module(**OVER_MESHES, **SMALL)
    params = as_params(t5, random_tensors(t5))
    ids, mask = random_tokens(0, 8, 12, 0.7, 50)
    laid = jax.device_put(params, shardings(params, mesh, RULES))
    split = t5.clone(layout=Layout.of(mesh, RULES) if told else None)
    sharded = run(split, laid, split_rows(ids, mesh), split_rows(mask, mesh))
    assert relative_error(sharded, run(t5, params, ids, mask)) < 2e-6


def sent(sizes, rows: int, length: int) -> tuple[dict[str, int], jax.sharding.PartitionSpec]:
    """What a laid-out encoder's program sends, collective -> calls, and how its states lie."""
    mesh = mesh_of(*sizes)
    t5 = module(unroll=False, **OVER_MESHES, **SMALL).clone(layout=Layout.of(mesh, RULES))

    def placed(tree, places):
        return jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
            tree,
            places,
        )

    abstract = abstract_params(t5)
    ids = jax.ShapeDtypeStruct((rows, length), jnp.int32, sharding=batch_sharding(mesh))
    mask = jax.ShapeDtypeStruct((rows, length), bool, sharding=batch_sharding(mesh))
    arguments = placed(abstract, shardings(abstract, mesh, RULES)), ids, mask
    apply = jax.jit(lambda params, ids, mask: t5.apply({"params": params}, ids, mask))
    compiled = apply.lower(*arguments).compile()
    traffic = collectives(hlo.parse(compiled.as_text()), mesh.size)
    return {kind: each.calls for kind, each in traffic.items()}, compiled.output_shardings.spec


def test_what_a_layer_sends_is_its_weights_and_two_sums(everything_is_large):
    """Heads and the MLP's width are summed over `tensor`, nothing is over `fsdp`."""
    layers, matrices = DESCRIPTION["num_layers"], 7
    calls, spec = sent((1, 4, 2), 8, 12)
    assert calls["all-reduce"] == 2 * layers and spec == P("fsdp")
    calls, spec = sent((1, 8, 1), 8, 12)
    assert "all-reduce" not in calls and "reduce-scatter" not in calls and spec == P("fsdp")
    assert matrices * layers <= calls["all-gather"] <= matrices * layers + 1  # the ids
    calls, spec = sent((1, 1, 8), 8, 12)
    assert calls["all-reduce"] == 2 * layers and calls["all-gather"] == 1  # the embedding's width


def test_few_tokens_leave_the_weights_where_they_are(everything_is_large):
    for rows, length in ((8, 1), (12, 8)):  # fewer tokens than the width, rows that don't divide
        mesh = mesh_of(1, 8, 1)
        t5 = module(**OVER_MESHES, **SMALL).clone(layout=Layout.of(mesh, RULES))
        params = as_params(t5, random_tensors(t5))
        laid = jax.device_put(params, shardings(params, mesh, RULES))
        ids, mask = random_tokens(0, rows, length, 1.0, 50)
        plain = jax.jit(t5.clone(layout=None).apply).lower({"params": laid}, ids, mask)
        assert jax.jit(t5.apply).lower({"params": laid}, ids, mask).as_text() == plain.as_text()


def test_every_matrix_is_split_over_fsdp_and_tensor():
    mesh = mesh_of(1, 4, 2)
    width, mlp, layers, heads = PUBLISHED_SIZES["xxl"]
    t5 = module("bfloat16", d_model=width, d_ff=mlp, num_layers=layers, num_heads=heads, d_kv=64)
    abstract = abstract_params(t5)
    for path, sharding in named(shardings(abstract, mesh, RULES)):
        shape = dict(named(abstract))[path].shape
        split = np.prod(shape) / np.prod(sharding.shard_shape(shape))
        assert split == (1 if "norm" in path or "bias" in path else 8), path


# ---------------------------------------------------------------------------------- configs


@pytest.mark.parametrize("size", PUBLISHED_SIZES)
def test_published_sizes_have_their_parameters(size):
    width, mlp, layers, heads = PUBLISHED_SIZES[size]
    t5 = module(d_model=width, d_ff=mlp, num_layers=layers, num_heads=heads, d_kv=64)
    count = sum(leaf.size for leaf in jax.tree.leaves(abstract_params(t5)))
    a_layer = 4 * width * 64 * heads + 3 * width * mlp + 2 * width
    assert count == 32128 * width + 32 * heads + layers * a_layer + width
    billions = {"small": 0.035, "base": 0.110, "large": 0.341, "xl": 1.22, "xxl": 4.76}[size]
    assert abs(count / 1e9 - billions) < 0.006 * billions + 0.0005


def test_a_description_makes_a_module_that_gives_it_back():
    t5 = module(num_layers=5)
    assert from_published(published(t5), "float32", True) == t5


def test_the_hubs_own_files_are_read():
    flan = DESCRIPTION | {
        "architectures": ["T5ForConditionalGeneration"],
        "decoder_start_token_id": 0,
        "dropout_rate": 0.1,
        "eos_token_id": 1,
        "initializer_factor": 1.0,
        "is_encoder_decoder": True,
        "n_positions": 512,
        "num_decoder_layers": 24,
        "output_past": True,
        "pad_token_id": 0,
        "task_specific_params": {"summarization": {"num_beams": 4}},
        "tie_word_embeddings": False,
        "transformers_version": "4.24.0.dev0",
        "use_cache": True,
    }
    del flan["relative_attention_max_distance"]
    assert from_published(flan, "float32", True) == module()


def test_what_transformers_saves_is_read(tmp_path):
    transformers = pytest.importorskip("transformers")
    transformers.T5Config(**DESCRIPTION).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text("utf-8"))
    assert from_published(saved, "float32", True) == module()
    everything = transformers.T5Config(**DESCRIPTION).to_dict()
    assert from_published(everything, "float32", True) == module()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_type", "umt5"),
        ("feed_forward_proj", "relu"),
        ("dense_act_fn", "gelu"),
        ("is_decoder", True),
        ("eos_token_id", 2),
        ("quantization_config", {"bits": 4}),
        ("d_model", "512"),
        ("num_layers", 0),
        ("num_layers", 1001),
        ("num_heads", 1001),
        ("relative_attention_num_buckets", 1004),
        ("num_heads", -2),
        ("d_ff", True),
        ("layer_norm_epsilon", float("nan")),
        ("relative_attention_num_buckets", 30),
        ("vocab_size", 2**40),
    ],
)
def test_what_is_not_built_is_refused_by_name(key, value):
    with pytest.raises(UserError, match=key):
        from_published(DESCRIPTION | {key: value}, "float32", True)


@pytest.mark.parametrize("key", ["d_model", "feed_forward_proj", "model_type", "num_layers"])
def test_a_description_that_lacks_a_field_is_refused(key):
    with pytest.raises(UserError, match=f"lacks '{key}'"):
        from_published({k: v for k, v in DESCRIPTION.items() if k != key}, "float32", True)
