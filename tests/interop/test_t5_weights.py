"""T5's weights arrive in their place whatever files they come in, or are refused by name."""

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_t5 import as_params, module, random_tensors, write_folder

from cascade.errors import UserError
from cascade.interop.folders import Weights, open_weights
from cascade.interop.t5 import T5Tensors, read_params, write_t5
from cascade.parallel.mesh import make_mesh
from cascade.shards import named

SIZES = {"vocab_size": 64, "d_model": 16, "d_ff": 32, "num_heads": 4}
QUERY = "encoder.block.1.layer.0.SelfAttention.q.weight"


@pytest.fixture(scope="module")
def tensors():
    return random_tensors(module(**SIZES))


def read(folder, dtype="float32", sizes=(1, 1, 1)):
    t5 = module(dtype, **SIZES)
    mesh = make_mesh(
        **dict(zip(("data", "fsdp", "tensor"), sizes, strict=True)),
        devices=jax.devices()[: np.prod(sizes)],
    )
    return read_params(t5, T5Tensors(t5, open_weights(folder)), mesh)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2), (1, 2, 4)])
@pytest.mark.parametrize(
    ("stored", "dtype", "shard_bytes"),
    [
        ("float32", "float32", 10**9),
        ("float32", "bfloat16", 5000),
        ("float16", "float32", 5000),
        ("bfloat16", "bfloat16", 10**9),
    ],
)
def test_weights_arrive_in_their_place(tmp_path, tensors, stored, dtype, shard_bytes, sizes):
    folder = write_folder(tmp_path, tensors, stored=stored, shard_bytes=shard_bytes, **SIZES)
    params = read(folder, dtype, sizes)
    rounded = {name: np.float32(value.astype(stored)) for name, value in tensors.items()}
    wanted = dict(named(as_params(module(dtype, **SIZES), rounded)))
    assert dict(named(params)).keys() == wanted.keys()
    for path, leaf in named(params):
        assert leaf.dtype == wanted[path].dtype
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(wanted[path]))
    split = params["layers"]["gate"].sharding.shard_shape((2, 32, 16))
    assert split == (2, 32 // sizes[2], 16 // sizes[1])


def test_a_device_reads_its_own_part_alone(tmp_path, tensors, monkeypatch):
    largest = []
    original = Weights.read

    def watched(self, name, part=()):
        value = original(self, name, part)
        largest.append(value.size)
        return value

    monkeypatch.setattr(Weights, "read", watched)
    read(write_folder(tmp_path, tensors, **SIZES), sizes=(1, 4, 2))
    assert max(largest) == 64 * 16 // 8  # the embedding's


def test_the_embeddings_other_name_and_a_whole_t5s_decoder(tmp_path, tensors):
    renamed = dict(tensors)
    renamed["encoder.embed_tokens.weight"] = renamed.pop("shared.weight")
    renamed["decoder.block.0.layer.0.SelfAttention.q.weight"] = np.zeros((3, 3), np.float32)
    renamed["lm_head.weight"] = np.zeros((3, 3), np.float32)
    params = read(write_folder(tmp_path, renamed, **SIZES))
    np.testing.assert_array_equal(params["embedding"], tensors["shared.weight"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(QUERY), "lack the tensor"),
        (lambda t: t.update({QUERY: t[QUERY][1:]}), r"\(31, 16\).*means.*\(32, 16\)"),
        (lambda t: t.update({QUERY: np.ones_like(t[QUERY], np.int32)}), "int32"),
        (lambda t: t.update({QUERY: t[QUERY] * np.nan}), "NaN"),
        (lambda t: t[QUERY].__setitem__((0, 0), np.inf), "infinity"),
    ],
)
@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 4, 2)])
def test_a_bad_tensor_is_named(tmp_path, tensors, change, message, sizes):
    changed = {name: value.copy() for name, value in tensors.items()}
    change(changed)
    folder = tmp_path / "t5"
    folder.mkdir()
    save_file(changed, folder / "model.safetensors")
    with pytest.raises(UserError, match=message) as caught:
        read(folder, sizes=sizes)
    assert QUERY in str(caught.value)


def test_more_layers_than_config_json_says(tmp_path, tensors):
    extra = "encoder.block.2.layer.0.layer_norm.weight"
    folder = write_folder(tmp_path, tensors | {extra: np.ones(16, np.float32)}, **SIZES)
    with pytest.raises(UserError, match=extra):
        read(folder)


def test_the_digest_is_of_what_is_used(tmp_path, tensors):
    def digest(name, values, dtype, **how):
        folder = write_folder(tmp_path / name, values, **how, **SIZES)
        return T5Tensors(module(dtype, **SIZES), open_weights(folder)).digest()

    one = digest("one", tensors, "bfloat16")
    assert one == digest("many", tensors, "bfloat16", shard_bytes=5000)
    assert digest("whole", tensors, "float32") != one
    changed = {name: value.copy() for name, value in tensors.items()}
    changed[QUERY][-1, -1] += 1
    assert digest("changed", changed, "bfloat16") != one


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_written_is_what_was_used(tmp_path, tensors, dtype):
    t5 = module(dtype, **SIZES)
    held = T5Tensors(t5, open_weights(write_folder(tmp_path / "a", tensors, **SIZES)))
    (tmp_path / "b").mkdir()
    names = write_t5(tmp_path / "b", t5, held)
    assert sorted(names) == sorted(path.name for path in (tmp_path / "b").iterdir())
    again = T5Tensors(t5, open_weights(tmp_path / "b"))
    assert again.digest() == held.digest()
    assert load_file(tmp_path / "b" / "model.safetensors")[QUERY].dtype == t5.dtype


def test_transformers_reads_what_is_written(tmp_path, tensors):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    t5 = module(**SIZES)
    held = T5Tensors(t5, open_weights(write_folder(tmp_path / "a", tensors, **SIZES)))
    (tmp_path / "b").mkdir()
    write_t5(tmp_path / "b", t5, held)
    theirs = transformers.T5EncoderModel.from_pretrained(tmp_path / "b")
    for name, value in theirs.state_dict().items():
        if name in tensors:
            np.testing.assert_array_equal(value.numpy(), tensors[name])
