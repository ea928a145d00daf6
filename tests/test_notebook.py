"""Where notebooks keep their runs, the pictures of their example, and the curves they show."""

import json
import os
import sys
import types

import pytest

from cascade.data.folder import Folder
from cascade.errors import UserError
from cascade.notebook import (
    EXAMPLE,
    MOST,
    curves,
    example_pictures,
    lasting_folder,
    live_curves,
    logged,
)


def write_run(folder, rows, age=0):
    """A run's metrics.jsonl with so many rows, last written `age` seconds after the epoch."""
    folder.mkdir(parents=True)
    text = "".join(json.dumps({"step": i + 1, "loss": 1 / (i + 1)}) + "\n" for i in range(rows))
    (folder / "metrics.jsonl").write_text(text)
    os.utime(folder / "metrics.jsonl", (age, age))


def test_at_home_it_is_below_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert lasting_folder("mine").absolute() == tmp_path / "mine"
    assert not (tmp_path / "mine").exists()


@pytest.fixture
def colab(monkeypatch):
    """Colab's module, which notes what it mounts; `refuses` makes it raise."""
    drive = types.SimpleNamespace(mounted=[], refuses=False)

    def mount(place):
        if drive.refuses:
            raise ValueError("mount failed")
        drive.mounted.append(place)

    drive.mount = mount
    monkeypatch.setitem(sys.modules, "google", types.ModuleType("google"))
    monkeypatch.setitem(sys.modules, "google.colab", types.ModuleType("google.colab"))
    sys.modules["google.colab"].drive = drive
    return drive


def test_in_colab_it_is_on_the_drive(colab):
    folder = lasting_folder("mine")
    (mounted,) = colab.mounted
    assert str(folder).startswith(mounted) and folder.name == "mine"


def test_a_drive_that_is_refused(colab):
    colab.refuses = True
    with pytest.raises(UserError, match=r"mounted \(mount failed\)"):
        lasting_folder("mine")


def test_the_example_is_a_folder_to_train_on(tmp_path):
    for _ in range(2):  # again: the same
        example_pictures(tmp_path / "pictures", 16)
        source = Folder(str(tmp_path / "pictures"))
        captions = {caption for i in range(len(source)) for caption in source.captions(i)}
        assert len(source) == len(captions) == len(EXAMPLE)
        assert {"a red apple", "a blue heart"} < captions


def test_runs_are_found_wherever_commands_leave_them(tmp_path):
    assert logged(tmp_path) == {}
    write_run(tmp_path / "few/halvings/8", 3, age=3)
    write_run(tmp_path / "few/halvings/guided", 0, age=2)  # has logged nothing
    write_run(tmp_path / "few/sub", 2, age=1)
    found = logged(tmp_path / "few")
    assert {name: len(rows) for name, rows in found.items()} == {"few/sub": 2, "few/halvings/8": 3}
    assert list(found) == ["few/sub", "few/halvings/8"]  # the latest last
    assert list(logged(tmp_path / "few/sub")) == ["sub"]


def test_the_latest_runs_are_shown(tmp_path):
    for i in range(MOST + 2):
        write_run(tmp_path / f"run{i}", 1, age=10 - i)
    names = [name.split("/")[-1] for name in logged(tmp_path)]
    assert names == [f"run{i}" for i in reversed(range(MOST))]


@pytest.mark.parametrize("runs", [1, 3])
def test_curves_are_a_small_picture(tmp_path, runs):
    for i in range(runs):
        write_run(tmp_path / f"run{i}", 30 * i + 1)
    picture = curves(logged(tmp_path))
    assert picture.startswith(b"\x89PNG") and len(picture) < 100_000


def test_curves_need_a_notebook(tmp_path):
    with pytest.raises(UserError, match="notebook"), live_curves(tmp_path):
        pytest.fail("it went on")
