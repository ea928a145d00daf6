"""Exported weights: names that never change, values that are the bundle's to the bit."""

import json
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from tiny_cascade import WordEncoder, stage_config

from cascade.config import to_json
from cascade.errors import UserError
from cascade.interop.weights import export_safetensors, write_stage
from cascade.shards import named
from cascade.stage import Stage
from cascade.text.encoders import ENCODERS

BASE = {
    "channel_mults": (1, 2),
    "num_blocks": (1, 3),
    "strides": (1, 2),
    "resampling": "block",
    "entry_skips": True,
    "middle": True,
    "middle_attention": (True, True),
    "self_attention": (False, True),
    "text_attention": (False, True),
    "attention_per_block": True,
    "text_channels": 16,
}
SR = {
    "channel_mults": (1, 2),
    "num_blocks": (1, 2),
    "strides": (2, 2),
    "resampling": "shuffle",
    "self_attention": (False, False),
    "text_attention": (False, True),
}


def stage(lowres: int, network: dict) -> Stage:
    config = stage_config(16, lowres)
    config.network.update(network)
    return Stage(config)


STAGES = {
    "base": (0, BASE),
    "sr": (8, SR),
    "base_scanned": (0, {**BASE, "scan_blocks": True}),
}


@pytest.mark.parametrize("name", STAGES)
def test_parameter_names_shapes_and_order_are_what_they_were(name):
    """Others' programs and files rely on them: a change here breaks every exported file."""
    params = jax.eval_shape(stage(*STAGES[name]).init, jax.random.key(0))
    lines = [f"{path} {'×'.join(map(str, leaf.shape))}" for path, leaf in named(params)]
    pinned = Path(__file__).with_name("parameters") / f"{name}.txt"
    assert lines == pinned.read_text(encoding="utf-8").splitlines()


def read(path: Path) -> tuple[dict, dict[str, np.ndarray]]:
    """Reads a safetensors file by its specification, with numpy alone: (header, tensors)."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    metadata = header.pop("__metadata__")
    types = {"F32": np.float32, "BF16": ml_dtypes.bfloat16}
    tensors = {}
    for name, entry in header.items():
        start, end = (8 + length + offset for offset in entry["data_offsets"])
        flat = np.frombuffer(data[start:end], types[entry["dtype"]])
        tensors[name] = flat.reshape(entry["shape"])
    return metadata, tensors


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_values_are_the_bundles_to_the_bit(bundle, stages, tmp_path, dtype):
    out = export_safetensors(bundle, tmp_path / "out", dtype=dtype, progress=False)
    assert {p.name for p in out.iterdir()} == {
        "safetensors.json",
        "stage0.safetensors",
        "stage1.safetensors",
    }
    for i, trained in enumerate(stages):
        metadata, tensors = read(out / f"stage{i}.safetensors")
        assert list(tensors) == [name for name, _ in named(trained.params)]
        for name, leaf in named(trained.params):
            np.testing.assert_array_equal(tensors[name], leaf.astype(dtype))
        said = json.loads(metadata["cascade"])
        assert said["config"] == json.loads(json.dumps(to_json(trained.stage.config)))
        assert (said["format_version"], said["stage"], said["trained_steps"]) == (1, i, 7)


def test_the_text_encoder_is_named_without_being_built(bundle, tmp_path, monkeypatch):
    """A bundle of IF may come without its 10 GB of T5."""
    monkeypatch.delitem(ENCODERS, "words")
    out = export_safetensors(bundle, tmp_path / "out", progress=False)
    encoder = WordEncoder()
    assert json.loads((out / "safetensors.json").read_text())["text_encoder"] == {
        "name": encoder.name,
        "max_length": encoder.max_length,
        "width": encoder.width,
        "fingerprint": encoder.fingerprint,
    }


def test_two_exports_are_the_same_to_the_byte(bundle, tmp_path):
    first, second = (
        export_safetensors(bundle, tmp_path / name, progress=False) for name in ("first", "second")
    )
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes()


def test_a_large_stage_is_in_shards_under_an_index(bundle, stages, tmp_path):
    out = export_safetensors(bundle, tmp_path / "out", shard_bytes=4_000, progress=False)
    index = json.loads((out / "stage0.safetensors.index.json").read_text())
    largest = max(leaf.nbytes for _, leaf in named(stages[0].params))
    together = {}
    for name in sorted(set(index["weight_map"].values())):
        _, tensors = read(out / name)
        assert all(index["weight_map"][tensor] == name for tensor in tensors)
        assert sum(tensor.nbytes for tensor in tensors.values()) <= max(4_000, largest)
        together |= tensors
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in together.values())
    assert {path: t.shape for path, t in together.items()} == {
        path: leaf.shape for path, leaf in named(stages[0].params)
    }
    manifest = json.loads((out / "safetensors.json").read_text())
    listed = {file["name"] for stage in manifest["stages"] for file in stage["files"]}
    assert listed == {path.name for path in out.iterdir()} - {"safetensors.json"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_no_finite_number_once_rounded_is_refused(stages, tmp_path, dtype):
    """The largest float32 is beyond bfloat16's."""
    largest = np.finfo(np.float32).max
    leaves, treedef = jax.tree.flatten(stages[0].params)
    leaves[-1] = np.full_like(leaves[-1], largest)
    broken = stages[0]._replace(params=jax.tree.unflatten(treedef, leaves))
    if dtype == "float32":
        write_stage(tmp_path, 0, broken, dtype=dtype)
        return
    with pytest.raises(UserError, match="infinite"):
        write_stage(tmp_path, 0, broken, dtype=dtype)


def test_a_stage_is_written_in_pieces(stages, tmp_path, monkeypatch):
    """No whole tensor is asked for, nor all of a file put together in memory."""
    asked = []

    class Watched:
        def __init__(self, array):
            self.array, self.shape = array, array.shape

        def __getitem__(self, part):
            asked.append(self.array[part].nbytes)
            return self.array[part]

    monkeypatch.setattr("cascade.interop.folders.PIECE_BYTES", 1000)
    watched = stages[0]._replace(params=jax.tree.map(Watched, stages[0].params))
    write_stage(tmp_path, 0, watched)
    row = max(leaf[:1].nbytes for _, leaf in named(stages[0].params) if leaf.ndim)
    assert max(asked) <= max(1000, row)
    _, tensors = read(tmp_path / "stage0.safetensors")
    for name, leaf in named(stages[0].params):
        np.testing.assert_array_equal(tensors[name], leaf)


def test_what_is_refused_leaves_nothing(bundle, tmp_path):
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "mine.txt").write_text("mine")
    for arguments, message in [
        ((bundle, taken), "isn't a safetensors export"),
        ((tmp_path / "none", tmp_path / "out"), "isn't a bundle"),
    ]:
        with pytest.raises(UserError, match=message):
            export_safetensors(*arguments, progress=False)
    with pytest.raises(UserError, match="float64"):
        export_safetensors(bundle, tmp_path / "out", dtype="float64", progress=False)
    assert list(tmp_path.iterdir()) == [taken]


def test_an_earlier_export_is_replaced_only_when_asked(bundle, tmp_path):
    out = export_safetensors(bundle, tmp_path / "out", progress=False)
    with pytest.raises(UserError, match="overwrite"):
        export_safetensors(bundle, out, progress=False)
    export_safetensors(bundle, out, dtype="bfloat16", overwrite=True, progress=False)
    assert json.loads((out / "safetensors.json").read_text())["dtype"] == "bfloat16"
    assert list(tmp_path.iterdir()) == [out]
