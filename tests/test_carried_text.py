"""A bundle that carries its text encoder draws anywhere, and names nothing outside itself."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from test_bundle import reseal, seal
from tiny_cascade import stage_config, trained
from tiny_t5 import write_folder

from cascade import bundle, digests, manifest
from cascade.errors import UserError
from cascade.text.encoders import t5
from cascade.training.export import bundle_runs

SETTINGS = {
    "max_length": 4,
    "null": "empty_prompt",
    "keep_padding": True,
    "lower_case": True,
    "dtype": "bfloat16",
}
SHARD = "text_encoder/model.safetensors"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("t5"))


@pytest.fixture(scope="module")
def encoder(source):
    return t5(weights=str(source), **SETTINGS)


@pytest.fixture(scope="module")
def stages():
    return [trained(stage_config(8, 0, text_width=16))]


def save(folder, stages, encoder, source, **how):
    text = {"name": "t5", "weights": str(source), **SETTINGS}
    return bundle.save_bundle(folder, stages, text, encoder, **how)


@pytest.fixture(scope="module")
def original(stages, encoder, source, tmp_path_factory):
    return save(tmp_path_factory.mktemp("bundles") / "b", stages, encoder, source)


@pytest.fixture
def folder(original, tmp_path):
    """A bundle of one's own to damage."""
    return Path(shutil.copytree(original, tmp_path / "b"))


def test_the_encoder_comes_back_without_its_source(folder, encoder):
    loaded = bundle.load_bundle(folder)
    assert loaded.text_encoder.fingerprint == encoder.fingerprint
    for got, want in zip(
        loaded.text_encoder.encode(["a cat"]), encoder.encode(["a cat"]), strict=True
    ):
        np.testing.assert_array_equal(got, want)
    assert loaded.text == {"name": "t5", "weights": "", **SETTINGS}


def test_no_path_of_the_maker_is_in_it(folder, source):
    for path in folder.rglob("*.json"):
        assert str(source) not in path.read_text()


def test_a_loaded_bundle_can_be_saved_again_even_over_itself(folder, encoder):
    loaded = bundle.load_bundle(folder)
    how = {"text": loaded.text, "text_encoder": loaded.text_encoder, "overwrite": True}
    bundle.save_bundle(folder, loaded.stages, **how)
    assert bundle.load_bundle(folder).text_encoder.fingerprint == encoder.fingerprint


def test_weights_may_be_left_out(stages, encoder, source, tmp_path):
    light = save(tmp_path / "light", stages, encoder, source, text_weights=False)
    assert not (light / "text_encoder").exists()
    with pytest.raises(UserError, match="text_weights"):
        bundle.load_bundle(light)
    assert bundle.load_bundle(light, encoder).text_encoder is encoder
    named = bundle.load_bundle(light, text_weights=str(source)).text_encoder
    assert named.fingerprint == encoder.fingerprint


def test_ones_own_encoder_takes_the_place_of_the_carried_one(folder, encoder):
    shutil.rmtree(folder / "text_encoder")
    assert bundle.load_bundle(folder, encoder).text_encoder is encoder


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "spiece.model"])
def test_a_flipped_byte_or_a_missing_file_is_named(folder, name):
    path = folder / "text_encoder" / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=f"{name}.*damaged"):
        bundle.load_bundle(folder)
    path.unlink()
    with pytest.raises(UserError, match=f"no file 'text_encoder/{name}"):
        bundle.load_bundle(folder)


def test_other_weights_with_right_sums_are_not_the_encoder(folder, tmp_path):
    other = write_folder(tmp_path / "other", layer_norm_epsilon=1e-3)
    changed = t5(weights=str(other), **SETTINGS)
    shutil.rmtree(folder / "text_encoder")
    (folder / "text_encoder").mkdir()
    changed.save_weights(folder / "text_encoder")
    reseal(folder, lambda m: None)
    with pytest.raises(UserError, match="fingerprints differ"):
        bundle.load_bundle(folder)


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/etc/hostname", "text_encoder/../../x", "text_encoder/a/b"]
)
def test_names_that_lead_out_of_the_folder(folder, name):
    reseal(folder, lambda m: m["text"]["weights"][0].update(name=name))
    with pytest.raises(UserError, match="outside the bundle"):
        bundle.load_bundle(folder)


def test_files_of_the_bundle_that_are_not_the_encoders(folder):
    reseal(folder, lambda m: m["text"].update(weights=m["text"]["files"]))
    with pytest.raises(UserError, match="isn't in text_encoder"):
        bundle.load_bundle(folder)


def test_a_link_that_leads_out_of_the_folder(folder):
    (folder / SHARD).rename(folder.parent / "secret")
    (folder / SHARD).symlink_to(folder.parent / "secret")
    with pytest.raises(UserError, match="outside the bundle"):
        bundle.load_bundle(folder)


@pytest.mark.parametrize("weights", ["/etc", "google/flan-t5-small", "text_encoder", "../t5"])
def test_it_may_not_say_where_weights_are(folder, weights):
    reseal(folder, lambda m: m["text"]["section"].update(weights=weights))
    with pytest.raises(UserError, match="may not do"):
        bundle.load_bundle(folder)


@pytest.mark.parametrize("weights", ["/etc", "google/flan-t5-small"])
def test_nor_to_those_who_put_it_into_another_bundle(folder, tmp_path, weights):
    """The files that it carries, and their sums, are right."""
    reseal(folder, lambda m: m["text"]["section"].update(weights=weights))
    with pytest.raises(UserError, match="may not do"):
        bundle_runs([folder], tmp_path / "other")


def test_carried_weights_are_proved_before_they_go_into_another_bundle(folder, tmp_path):
    bundle_runs([folder], tmp_path / "same")
    data = bytearray((folder / SHARD).read_bytes())
    data[-1] ^= 1
    (folder / SHARD).write_bytes(data)
    with pytest.raises(UserError, match=r"model\.safetensors.*damaged"):
        bundle_runs([folder], tmp_path / "other")


def test_weights_in_cascade_json_of_another_kind(folder):
    described = json.loads((folder / "cascade.json").read_text())
    described["text"]["weights"] = {"name": SHARD}
    seal(folder, described)
    with pytest.raises(UserError, match="weights"):
        bundle.load_bundle(folder)


# ----------------------------------------------------------------- sums that are remembered


@pytest.fixture
def remembering(monkeypatch, tmp_path):
    """Remembers the digests of small files too, below a home of its own."""
    monkeypatch.setattr(digests, "LEAST_BYTES", 0)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home" / ".cache" / "cascade" / "digests"


def test_large_files_are_hashed_once(folder, remembering, monkeypatch):
    bundle.load_bundle(folder)
    assert len(list(remembering.iterdir())) > 2
    monkeypatch.setattr(manifest.hashlib, "file_digest", None)
    bundle.load_bundle(folder)


def test_and_again_once_they_change_however_they_are_dated(folder, remembering):
    bundle.load_bundle(folder)
    path = folder / SHARD
    before = path.stat()
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(UserError, match="damaged"):
        bundle.load_bundle(folder)


def test_a_cache_folder_that_cannot_be_written_is_said(folder, remembering, caplog):
    remembering.parent.mkdir(parents=True)
    remembering.write_text("a file in its place")
    bundle.load_bundle(folder)
    assert "Can't remember a digest" in caplog.text
