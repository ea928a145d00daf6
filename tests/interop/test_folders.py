"""Folders of others' weights are read, whole or in part, or refused by name; nothing runs."""

import json
import os
import pickle
import tempfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from cascade.errors import UserError
from cascade.interop import folders
from cascade.interop.folders import open_weights

INDEX = "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
PICKLE = "pytorch_model.bin"


def tensors():
    rng = np.random.default_rng(0)
    return {
        "a.weight": rng.normal(size=(6, 5)).astype(np.float32),
        "b.weight": rng.normal(size=(4, 3, 2)).astype(np.float16),
        "c.weight": rng.normal(size=(7,)).astype(ml_dtypes.bfloat16),
        "scalar": np.full((), 3.0, np.float32),
    }


def sharded(folder: Path, **changes) -> Path:
    """A folder of two shards and their index, in which `changes` replace file names."""
    folder.mkdir(exist_ok=True)
    parts = np.array_split(sorted(tensors()), 2)
    weight_map = {}
    for shard, names in zip(SHARDS, parts, strict=True):
        save_file({name: tensors()[name] for name in names}, folder / shard)
        weight_map |= dict.fromkeys(map(str, names), shard)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map | changes}))
    return folder


def reindexed(folder: Path, shard) -> Path:
    """The folder, with an index that says the first tensor is in `shard`."""
    return sharded(folder, **{"a.weight": shard})


def assert_whole(weights):
    assert weights.names() == sorted(tensors())
    for name, value in tensors().items():
        read = weights.read(name)
        assert read.dtype == weights.dtype(name) == value.dtype
        assert read.shape == weights.shape(name) == value.shape
        np.testing.assert_array_equal(read, value)


# ------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("name", [n for n in folders.WEIGHT_FILES if not n.endswith(".json")])
def test_one_file(tmp_path, name):
    save_file(tensors(), tmp_path / name)
    assert_whole(open_weights(tmp_path))


def test_shards_under_an_index(tmp_path):
    weights = open_weights(sharded(tmp_path))
    assert_whole(weights)
    assert [path.name for path in weights.files] == list(SHARDS)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(["a.weight", "b.weight", "c.weight"]), data=st.data())
def test_any_part_of_a_tensor(tmp_path, name, data):
    weights, whole = open_weights(sharded(tmp_path)), tensors()[name]
    bounds = [sorted(data.draw(st.tuples(*[st.integers(0, n)] * 2))) for n in whole.shape]
    part = tuple(slice(low, high) for low, high in bounds if low < high)[: whole.ndim]
    part = part if len(part) == whole.ndim else ()
    read = weights.read(name, part)
    assert read.dtype == whole.dtype
    np.testing.assert_array_equal(read, whole[part])


def test_full_slices_as_jax_gives_them(tmp_path):
    part = (slice(None), slice(2, 4, None))
    read = open_weights(sharded(tmp_path)).read("a.weight", part)
    np.testing.assert_array_equal(read, tensors()["a.weight"][part])


# --------------------------------------------------------------------------- what isn't a model


def test_no_folder(tmp_path):
    with pytest.raises(UserError, match="no folder"):
        open_weights(tmp_path / "none")


def test_a_folder_without_weights(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="holds no weights"):
        open_weights(tmp_path)


class Trap:
    """Pickles into a call that makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", [PICKLE, "diffusion_pytorch_model.bin", "model.ckpt", "model.pt"])
def test_a_pickle_is_refused_and_a_safetensors_alternative_named(tmp_path, name):
    trap = tmp_path / "sprung"
    (tmp_path / name).write_bytes(pickle.dumps(Trap(trap)))
    with pytest.raises(UserError, match=r"only pickles.*flan-t5.*safe_serialization=True"):
        open_weights(tmp_path)
    assert not trap.exists()


def test_a_pickle_that_calls_itself_safetensors(tmp_path):
    trap = tmp_path / "sprung"
    (tmp_path / "model.safetensors").write_bytes(pickle.dumps(Trap(trap)))
    with pytest.raises(UserError, match="isn't a safetensors file"):
        open_weights(tmp_path)
    assert not trap.exists()


def test_a_missing_shard_is_named(tmp_path):
    (sharded(tmp_path) / SHARDS[1]).unlink()
    with pytest.raises(UserError, match=f"no file '{SHARDS[1]}'"):
        open_weights(tmp_path)


@pytest.mark.parametrize("cut", [0, 4, 100, -1])
def test_a_shard_cut_short_is_named(tmp_path, cut):
    shard = sharded(tmp_path) / SHARDS[0]
    shard.write_bytes(shard.read_bytes()[:cut])
    with pytest.raises(UserError, match=f"{SHARDS[0]}' is damaged"):
        open_weights(tmp_path)


def test_a_tensor_that_its_shard_lacks(tmp_path):
    with pytest.raises(UserError, match=r"lacks the tensor 'a\.weight'"):
        open_weights(reindexed(tmp_path, SHARDS[1]))


def test_a_tensor_that_nobody_has(tmp_path):
    weights = open_weights(sharded(tmp_path))
    for ask in (weights.shape, weights.dtype, weights.read):
        with pytest.raises(UserError, match=r"lack the tensor 'd\.weight'"):
            ask("d.weight")


def test_eight_bit_numbers_are_refused_by_name(tmp_path):
    save_file({"a": np.zeros(3, np.uint8)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"'a' .* as U8"):
        open_weights(tmp_path).read("a")


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", '{"weight_map": {}}', '{"weight_map": ["a"]}', "{}", "[" * 100_000, "\xff"],
)
def test_an_index_that_is_none(tmp_path, text):
    (sharded(tmp_path) / INDEX).write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=f"{INDEX}.*get it again"):
        open_weights(tmp_path)


# ------------------------------------------------------------------------ out of the folder


@pytest.mark.parametrize(
    "shard",
    [
        "../secret.safetensors",
        "sub/../../secret.safetensors",
        "sub/model.safetensors",
        "..\\secret.safetensors",
        "/etc/secret.safetensors",
        "C:\\secret.safetensors",
        "..",
        ".hidden.safetensors",
        "secret.bin",
        "a" * 5000 + ".safetensors",
        "a\0.safetensors",
        "a\n.safetensors",
        "",
        7,
        None,
        ["model.safetensors"],
    ],
)
def test_an_index_may_only_name_plain_files(tmp_path, shard):
    save_file(tensors(), tmp_path / "secret.safetensors")
    with pytest.raises(UserError, match="isn't the plain name"):
        open_weights(reindexed(tmp_path / "model", shard))


def test_an_absolute_path_of_a_real_file(tmp_path):
    save_file(tensors(), tmp_path / "secret.safetensors")
    with pytest.raises(UserError, match="isn't the plain name"):
        open_weights(reindexed(tmp_path / "model", str(tmp_path / "secret.safetensors")))


@pytest.mark.parametrize("file", [SHARDS[0], INDEX, "model.safetensors"])
@pytest.mark.parametrize("relative", [True, False])
def test_a_link_that_leads_outside(tmp_path, file, relative):
    folder = sharded(tmp_path / "model")
    outside = tmp_path / f"secret-{file}"
    save_file(tensors(), folder / "model.safetensors")
    if file != "model.safetensors":
        (folder / "model.safetensors").unlink()
    (folder / file).rename(outside)
    (folder / file).symlink_to(Path("..") / outside.name if relative else outside)
    with pytest.raises(UserError, match="leads outside"):
        open_weights(folder)


def test_links_within_the_folder_are_followed(tmp_path):
    folder = sharded(tmp_path)
    (folder / "objects").mkdir()
    (folder / SHARDS[0]).rename(folder / "objects" / "1")
    (folder / SHARDS[0]).symlink_to("objects/1")
    assert_whole(open_weights(folder))


def hub_cache(root: Path) -> tuple[Path, Path]:
    """A model's folder in a hub cache's layout, and the folder of its blobs."""
    repository = root / "models--google--t5"
    folder = repository / "snapshots" / "abc" / "text_encoder"
    folder.mkdir(parents=True)
    (repository / "blobs").mkdir()
    sharded(folder)
    for path in list(folder.iterdir()):
        path.rename(repository / "blobs" / path.name)
        path.symlink_to(Path("../../../blobs") / path.name)
    return folder, repository / "blobs"


def test_the_hubs_cache_keeps_files_as_links_to_its_blobs(tmp_path):
    folder, _ = hub_cache(tmp_path)
    assert_whole(open_weights(folder))


def test_but_no_further(tmp_path):
    folder, blobs = hub_cache(tmp_path)
    (blobs / SHARDS[0]).rename(tmp_path / "secret.safetensors")
    (folder / SHARDS[0]).unlink()
    (folder / SHARDS[0]).symlink_to(tmp_path / "secret.safetensors")
    with pytest.raises(UserError, match="leads outside"):
        open_weights(folder)


def test_a_pipe_or_a_circle_of_links_is_no_file(tmp_path):
    folder = sharded(tmp_path)
    (folder / SHARDS[0]).unlink()
    os.mkfifo(folder / SHARDS[0])
    with pytest.raises(UserError, match="no file"):
        open_weights(folder)
    (folder / SHARDS[0]).unlink()
    (folder / SHARDS[0]).symlink_to(SHARDS[0])
    with pytest.raises(UserError, match="no file"):
        open_weights(folder)


# ------------------------------------------------------------------------------------ writing


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25)
@given(
    shapes=st.lists(st.lists(st.integers(0, 9), max_size=3), min_size=1, max_size=6),
    dtype=st.sampled_from(["float32", "float16", "bfloat16"]),
    piece=st.integers(1, 200),
    limit=st.integers(1, 3000),
)
def test_what_is_written_piece_by_piece_is_read(tmp_path, shapes, dtype, piece, limit):
    folder = Path(tempfile.mkdtemp(dir=tmp_path))
    rng = np.random.default_rng(0)
    values = {f"t{i}": rng.normal(size=shape).astype(dtype) for i, shape in enumerate(shapes)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folders, "PIECE_BYTES", piece)
        names = folders.write_weights(folder, "model", values, lambda n, p: values[n][p], limit)
    assert sorted(names) == sorted(path.name for path in folder.iterdir())
    loaded = {}
    for path in folder.glob("*.safetensors"):
        held = load_file(path)
        assert len(held) == 1 or sum(value.nbytes for value in held.values()) <= limit
        loaded |= held
    weights = open_weights(folder)
    assert weights.names() == sorted(values) == sorted(loaded)
    for name, value in values.items():
        np.testing.assert_array_equal(weights.read(name), value)
        np.testing.assert_array_equal(loaded[name], value)
