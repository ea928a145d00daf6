"""A bundle comes back as it went out, or not at all: never damaged, never by running its code."""

import hashlib
import json
import os
import pickle
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from tiny_cascade import TEXT, WordEncoder, stage_config, tiny_stages, trained

from cascade import bundle, shards
from cascade.errors import UserError
from cascade.manifest import BLANK

MANY = settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="module")
def stages():
    return tiny_stages()


@pytest.fixture(scope="module")
def original(stages, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundles") / "tiny"
    return bundle.save_bundle(folder, stages, TEXT, WordEncoder())


@pytest.fixture
def folder(original, tmp_path):
    """A bundle of one's own to damage."""
    return Path(shutil.copytree(original, tmp_path / "tiny"))


def load(folder):
    return bundle.load_bundle(folder, WordEncoder())


def reseal(folder: Path, edit):
    """Rewrites cascade.json with right sums: what a malicious maker would do."""
    manifest = json.loads((folder / "cascade.json").read_text())
    manifest = edit(manifest) or manifest
    text = manifest["text"]
    for entries in [text["files"], text["weights"], *(s["files"] for s in manifest["stages"])]:
        for entry in entries:
            path = folder / entry["name"]
            if os.path.isfile(path):  # False for a name that no file can have
                data = path.read_bytes()
                entry["bytes"], entry["sha256"] = len(data), hashlib.sha256(data).hexdigest()
    seal(folder, manifest)


def seal(folder: Path, manifest):
    """Writes cascade.json with its own sum, whatever else it holds."""
    manifest["sha256"] = BLANK
    raw = json.dumps(manifest).encode()
    digest = hashlib.sha256(raw).hexdigest()
    blank = f'"sha256": "{BLANK}", "text"'
    assert raw.count(blank.encode()) == 1
    raw = raw.replace(BLANK.encode(), digest.encode(), 1)
    (folder / "cascade.json").write_bytes(raw)


def edit_tensors(folder: Path, edit):
    """Changes stage 1's tensors and reseals the bundle."""
    path = folder / "stage1-00001.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)
    reseal(folder, lambda manifest: None)


# ------------------------------------------------------------------------------- there and back


def test_everything_comes_back_bit_for_bit(original, stages):
    loaded = load(original)
    assert loaded.text == TEXT
    for before, after in zip(stages, loaded.stages, strict=True):
        assert after.trained_steps == before.trained_steps
        assert after.stage.config.to_dict() == before.stage.config.to_dict()
        jax.tree.map(np.testing.assert_array_equal, after.params, before.params)


def test_bfloat16_halves_the_size_and_rounds_to_eight_bits(original, stages, tmp_path):
    half = bundle.save_bundle(tmp_path / "half", stages, TEXT, WordEncoder(), dtype="bfloat16")
    for before, after in zip(stages, load(half).stages, strict=True):
        for a, b in zip(*map(jax.tree.leaves, (before.params, after.params)), strict=True):
            assert b.dtype == np.float32
            np.testing.assert_array_equal(b, a.astype(jax.numpy.bfloat16).astype(np.float32))
    arrays = sum(leaf.nbytes for leaf in jax.tree.leaves([s.params for s in stages]))

    def saved(folder):
        return sum(path.stat().st_size for path in folder.glob("*.safetensors"))

    assert saved(original) - saved(half) >= 0.49 * arrays


def test_no_shard_is_above_the_limit(stages, tmp_path):
    many = bundle.save_bundle(tmp_path / "b", stages, TEXT, WordEncoder(), shard_bytes=1000)
    files = list(many.glob("stage*.safetensors"))
    assert len(files) > 20 and max(path.stat().st_size for path in files) <= 1000
    loaded = load(many)
    jax.tree.map(np.testing.assert_array_equal, loaded.stages[1].params, stages[1].params)


def test_parameter_paths_are_joined_by_slashes(original):
    names = load_file(original / "stage0-00001.safetensors")
    assert "conv_in/kernel" in names


def test_other_files_in_the_folder_do_no_harm(folder):
    (folder / "README.md").write_text("My cascade.")
    assert len(load(folder).stages) == 2


# ------------------------------------------------------------------------------------ damage


FILES = ("cascade.json", "stage0-00001.safetensors", "tokenizer/words.txt")


@MANY
@given(
    name=st.sampled_from(FILES),
    place=st.floats(0, 1, exclude_max=True),
    flip=st.integers(1, 255),
    kind=st.sampled_from(["flip", "cut", "grow"]),
)
def test_any_changed_byte_is_noticed(original, name, place, flip, kind):
    path = original / name
    whole = path.read_bytes()
    at = int(place * len(whole))
    changed = {
        "flip": whole[:at] + bytes([whole[at] ^ flip]) + whole[at + 1 :],
        "cut": whole[:at],
        "grow": whole + bytes([flip]),
    }[kind]
    try:
        path.write_bytes(changed)
        with pytest.raises(UserError) as error:
            load(original)
        assert "\n" not in str(error.value)
    finally:
        path.write_bytes(whole)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(UserError, match=name):
        load(folder)


def leaves(value, path=()):
    """Paths of every value inside a JSON tree."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in items:
        yield (*path, key)
        if isinstance(item, dict | list):
            yield from leaves(item, (*path, key))


JUNK = st.sampled_from(
    [None, True, -1, 0, 3, 1.5, 1e308, "", "x", "\ud800", [], {}, [1], {"a": 1}, [[]], "../x"]
)


@MANY
@given(data=st.data(), junk=JUNK)
def test_a_sealed_lie_is_an_error_or_harmless(original, data, junk):
    path = original / "cascade.json"
    whole = path.read_bytes()
    manifest = json.loads(whole)
    *outer, last = data.draw(st.sampled_from(sorted(leaves(manifest), key=str)))
    inner = manifest
    for key in outer:
        inner = inner[key]
    if last == "sha256" and not outer:
        return
    inner[last] = junk
    try:
        seal(original, manifest)
        load(original)
    except UserError as error:
        assert "\n" not in str(error)
    finally:
        path.write_bytes(whole)


@pytest.mark.parametrize(
    "text", ["", "[]", "null", "[" * 100_000, '{"format_version": NaN}', "\x00\xff", '"\\ud800"']
)
def test_a_foreign_cascade_json(folder, text):
    (folder / "cascade.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"cascade\.json"):
        load(folder)


def test_a_newer_format_says_so(folder):
    reseal(folder, lambda m: m.update(format_version=3))
    with pytest.raises(UserError, match="version 3"):
        load(folder)


def test_the_format_before_text_weights_is_read(folder, stages):
    manifest = json.loads((folder / "cascade.json").read_text())
    manifest["format_version"] = 1
    assert manifest["text"].pop("weights") == []
    seal(folder, manifest)
    loaded = load(folder)
    jax.tree.map(np.testing.assert_array_equal, loaded.stages[0].params, stages[0].params)


@pytest.mark.parametrize(
    "name", ["../stolen", "/etc/hostname", "tokenizer/../../stolen", "a/b", "", ".", "tokenizer/",
             "x\0y", "..", "C:\\x", "tokenizer\\x", "~", "x" * 5000],
)  # fmt: skip
def test_names_that_lead_out_of_the_folder(folder, name):
    (folder.parent / "stolen").write_bytes(b"secret")
    for entries in (lambda m: m["text"]["files"], lambda m: m["stages"][0]["files"]):
        reseal(folder, lambda m, e=entries: e(m)[0].update(name=name))
        with pytest.raises(UserError, match="file"):
            load(folder)


def test_links_that_lead_out_of_the_folder(folder):
    shard = folder / "stage0-00001.safetensors"
    outside = folder.parent / "outside.safetensors"
    shard.rename(outside)
    shard.symlink_to(outside)
    with pytest.raises(UserError, match="outside the bundle"):
        load(folder)
    shard.unlink()
    outside.rename(shard)
    (folder / "tokenizer").rename(folder.parent / "elsewhere")
    (folder / "tokenizer").symlink_to(folder.parent / "elsewhere")
    with pytest.raises(UserError, match="outside the bundle"):
        load(folder)


def test_a_pipe_in_place_of_a_file_is_not_opened(folder):
    (folder / "stage0-00001.safetensors").unlink()
    os.mkfifo(folder / "stage0-00001.safetensors")
    with pytest.raises(UserError, match="stage0"):
        load(folder)


class Trap:
    """Pickles into a call that makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_pickle_is_never_executed(folder):
    trap = folder.parent / "sprung"
    (folder / "stage0-00001.safetensors").write_bytes(pickle.dumps(Trap(trap)))
    reseal(folder, lambda m: None)
    with pytest.raises(UserError, match="safetensors"):
        load(folder)
    assert not trap.exists()


def test_a_tensor_of_another_network_is_named(folder):
    edit_tensors(folder, lambda tensors: tensors.pop("conv_in/kernel"))
    with pytest.raises(UserError, match=r"stage 1.*conv_in/kernel.*is missing"):
        load(folder)


def test_a_file_that_comes_twice(folder):
    reseal(folder, lambda m: m["stages"][0]["files"].append(dict(m["stages"][0]["files"][0])))
    with pytest.raises(UserError, match="twice"):
        load(folder)


def test_a_bundle_may_not_name_a_weights_file(folder):
    reseal(folder, lambda m: m["text"]["section"].update(name="minilm", weights="/etc"))
    with pytest.raises(UserError, match="weights file"):
        bundle.load_bundle(folder)


def test_another_text_encoder_is_refused(folder):
    with pytest.raises(UserError, match="fingerprint"):
        bundle.load_bundle(folder, WordEncoder("0" * 64))
    with pytest.raises(UserError, match="words"):
        bundle.load_bundle(folder)


# ----------------------------------------------------------------------------- what doesn't fit


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: [], "at least one"),
        (lambda s: s[::-1], "lowres_resolution"),
        (lambda s: [s[0], s[1]._replace(trained_steps=0)], "untrained"),
        (lambda s: [s[0], trained(stage_config(16, 4))], "lowres_resolution"),
        (lambda s: [s[0], trained(stage_config(16, 8, text_length=5))], "5 tokens"),
        (lambda s: [trained(stage_config(8, 0, text_width=16))], "16"),
    ],
)
def test_stages_that_are_no_cascade(stages, tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        bundle.save_bundle(tmp_path / "b", change(stages), TEXT, WordEncoder())
    assert not list(tmp_path.iterdir())


def test_an_untrained_stage_is_refused_on_loading(folder):
    reseal(folder, lambda m: m["stages"][1].update(trained_steps=0))
    with pytest.raises(UserError, match="untrained"):
        load(folder)


def test_weights_that_diverged_are_not_saved(stages, tmp_path):
    first, *others = jax.tree.leaves(stages[0].params)
    broken = jax.tree.unflatten(jax.tree.structure(stages[0].params), [first * np.nan, *others])
    with pytest.raises(UserError, match="NaN"):
        bundle.save_bundle(tmp_path / "b", [stages[0]._replace(params=broken)], TEXT, WordEncoder())
    assert not list(tmp_path.iterdir())


def test_weights_of_another_network_are_not_saved(stages, tmp_path):
    mixed = [stages[0]._replace(params=stages[1].params)]
    with pytest.raises(UserError, match="stage 0"):
        bundle.save_bundle(tmp_path / "b", mixed, TEXT, WordEncoder())


# ------------------------------------------------------------------------------- overwriting


@pytest.mark.parametrize("load", [bundle.load_bundle, bundle.load_stages])
def test_a_bundle_without_a_name(load):
    """As an unset variable of a shell gives it: not the current folder."""
    with pytest.raises(UserError, match="name is empty"):
        load("")


def test_nothing_is_overwritten_unasked(folder, stages):
    with pytest.raises(UserError, match="already holds"):
        bundle.save_bundle(folder, stages, TEXT, WordEncoder())
    other = folder.parent / "thesis"
    other.mkdir()
    (other / "chapter1").write_text("irreplaceable")
    with pytest.raises(UserError, match="isn't a bundle"):
        bundle.save_bundle(other, stages, TEXT, WordEncoder(), overwrite=True)
    assert (other / "chapter1").read_text() == "irreplaceable"


def test_overwriting_replaces_the_whole(folder, stages):
    (folder / "stale").write_text("")
    newer = [stages[0]._replace(trained_steps=99)]
    bundle.save_bundle(folder, newer, TEXT, WordEncoder(), overwrite=True)
    assert [s.trained_steps for s in load(folder).stages] == [99]
    assert not (folder / "stale").exists()
    assert [p.name for p in folder.parent.iterdir()] == ["tiny"]


@pytest.mark.parametrize("failing", ["write", "rename"])
def test_a_failed_overwrite_keeps_the_old_bundle(folder, stages, monkeypatch, failing):
    calls = []

    def full_disk(path, data):
        calls.append(path)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        path.write_bytes(data)

    rename = os.rename

    def refuse_second(source, target):
        calls.append(source)
        if len(calls) == 2:
            raise OSError(5, "Input/output error")
        rename(source, target)

    if failing == "write":
        monkeypatch.setattr(shards, "write_durably", full_disk)
    else:
        monkeypatch.setattr(os, "rename", refuse_second)
    with pytest.raises(UserError, match=r"No space left|Input/output"):
        bundle.save_bundle(folder, stages, TEXT, WordEncoder(), overwrite=True)
    monkeypatch.undo()
    assert len(load(folder).stages) == 2
    assert [p.name for p in folder.parent.iterdir()] == ["tiny"]
