"""Folders are written whole or not at all, and a place that can't be written is refused first."""

import os
import signal
import subprocess
import sys

import pytest

from cascade.config import load
from cascade.embed import embed
from cascade.errors import UserError
from cascade.files import check_place, whole_folder
from cascade.interop.deepfloyd import import_deepfloyd
from cascade.interop.diffusers_folder import export_diffusers
from cascade.interop.stablehlo import export_stablehlo
from cascade.interop.weights import export_safetensors
from cascade.training.export import bundle_runs

KIND = {"kind": "bundle", "mark": "cascade.json"}

KILLED = """
import os, signal, sys
from cascade.files import whole_folder
with whole_folder(sys.argv[1], kind="bundle", mark="cascade.json", overwrite=False) as new:
    (new / "stage0.safetensors").write_text("half of it")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def fill(folder, text, overwrite=False):
    with whole_folder(folder, **KIND, overwrite=overwrite) as new:
        (new / "cascade.json").write_text(text)


def test_the_next_run_removes_what_a_killed_one_left(tmp_path):
    killed = subprocess.run([sys.executable, "-c", KILLED, tmp_path / "x.y"], check=False)
    assert killed.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    fill(tmp_path / "x", "a neighbour")
    assert left.exists()
    fill(tmp_path / "x.y", "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x", "x.y"]


def test_a_process_that_still_writes_keeps_its_folder(tmp_path):
    with whole_folder(tmp_path / "x", **KIND, overwrite=False) as new:
        (new / "cascade.json").write_text("slow")
        fill(tmp_path / "x", "quick")
        assert (new / "cascade.json").read_text() == "slow"
        with pytest.raises(UserError, match="--overwrite"):
            fill(tmp_path / "x", "again")


def test_overwriting_leaves_the_new_folder_alone(tmp_path):
    fill(tmp_path / "x", "old")
    fill(tmp_path / "x", "new", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert (tmp_path / "x" / "cascade.json").read_text() == "new"


@pytest.mark.parametrize("place", ["source", "source/inner", "source/a/b", ".", "link/inner"])
def test_a_place_within_or_around_a_source_is_refused(place, tmp_path):
    (tmp_path / "source").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "source")
    with pytest.raises(UserError, match="apart"):
        check_place(
            tmp_path / place, **KIND, overwrite=True, sources=["some/hub-id", tmp_path / "source"]
        )


def test_a_place_beside_a_source_is_free_and_stays_as_it_is(tmp_path):
    (tmp_path / "source").mkdir()
    check_place(tmp_path / "source2/x", **KIND, overwrite=False, sources=[tmp_path / "source"])
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("place", ["", "file/out", "n" * 300, "/proc/none/b"])
def test_a_place_that_cant_be_written_says_why_and_asks_for_no_space(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError) as refused:
        check_place(place, **KIND, overwrite=False)
    assert "space" not in str(refused.value) and "bundle" in str(refused.value)
    assert os.listdir(tmp_path) == ["file"]


def taken(folder, mark):
    (folder / mark).parent.mkdir(parents=True)
    (folder / mark).write_text("{}")
    return folder


WRITERS = {
    "safetensors.json": export_safetensors,
    "stablehlo.json": export_stablehlo,
    "stage0/model_index.json": export_diffusers,
    "cascade.json": lambda source, out, **how: import_deepfloyd([source], out, **how),
    "./cascade.json": lambda source, out, **how: bundle_runs([source], out, **how),
}


@pytest.mark.parametrize("mark", WRITERS)
def test_the_place_is_looked_at_before_what_is_read(mark, tmp_path):
    write, source = WRITERS[mark], tmp_path / "source"
    source.mkdir()  # empty, which is an error too, but a later one
    with pytest.raises(UserError, match="--overwrite"):
        write(source, taken(tmp_path / "taken", mark))
    if mark != "./cascade.json":  # a run may hold its bundle
        with pytest.raises(UserError, match="apart"):
            write(source, source / "inner", overwrite=True)


def test_a_cache_s_place_is_looked_at_before_captions_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr("cascade.embed.make_mesh", lambda **_: pytest.fail("it goes on"))
    config = load("configs/emoji/base64.py:smoke", [f"--config.text_cache.folder={tmp_path}/mine"])
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="file/out"):
        embed(config, str(tmp_path / "file" / "out"))
    with pytest.raises(UserError, match="empty name"):
        embed(config, "")
    assert os.listdir(tmp_path) == ["file"]
