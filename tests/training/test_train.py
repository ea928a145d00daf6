"""One whole path at smoke size: train, resume, bundle, draw; and what a run leaves behind."""

import json
import shutil
import signal

import numpy as np
import pytest
from click.testing import CliRunner
from one_level import flags
from PIL import Image

from cascade import config
from cascade.cli import main
from cascade.errors import Stopped, UserError
from cascade.text.bert import VENDORED
from cascade.training import metrics
from cascade.training import train as training
from cascade.training.checkpoint import Checkpoints
from cascade.training.export import bundle_runs
from cascade.training.loop import write_config
from cascade.training.same_run import check_same
from cascade.training.train import train

SMOKE = "configs/emoji/base64.py:smoke"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished smoke run: (its folder, its config)."""
    folder = tmp_path_factory.mktemp("train")
    overrides = flags(mesh__data=2, mesh__fsdp=4, text_cache__folder=folder / "cache")
    loaded = config.load(SMOKE, overrides)
    train(loaded, folder / "run", progress=False)
    return folder / "run", loaded


def test_metrics_say_what_they_should(run):
    rows = metrics.read(run[0] / "metrics.jsonl")
    logged = [row for row in rows if "loss" in row]
    assert [row["step"] for row in logged] == [2, 4]
    for key in ("gradient_norm", "pictures_per_second", "flops_per_second", "input_wait"):
        assert all(row[key] >= 0 for row in logged)
    assert any(key.startswith("loss_logsnr_") for key in logged[0])
    assert [row["step"] for row in rows if "eval_loss" in row] == [4]
    assert list((run[0] / "tensorboard").iterdir())


def test_samples_stand_beside_real_pictures(run):
    with Image.open(run[0] / "samples" / "00000004.png") as sheet:
        assert np.asarray(sheet).std() > 0


def test_train_bundle_sample(run, tmp_path):
    def cascade(*arguments):
        result = CliRunner().invoke(main, [str(a) for a in arguments])
        assert result.exit_code == 0, result.output
        return result.output

    cascade("bundle", "--stages", run[0], "--out", tmp_path / "bundle")
    cascade("sample", "--bundle", tmp_path / "bundle", "--prompt", "a red apple", "--num", 1,
            "--out", tmp_path / "out")  # fmt: skip
    (picture,) = (tmp_path / "out").glob("*.png")
    side = run[1].stage.resolution
    assert Image.open(picture).size == (side, side)


@pytest.mark.parametrize("remat", ["none", "blocks"])
def test_a_finished_run_started_again_changes_nothing(run, remat):
    before = (run[0] / "metrics.jsonl").read_text()
    again = run[1].copy_and_resolve_references()
    again.stage.network.remat = remat  # what is recomputed is no part of what a run is
    train(again, run[0], progress=False)
    assert (run[0] / "metrics.jsonl").read_text() == before


def test_sigterm_in_the_last_save_stops_what_would_follow(run, tmp_path, monkeypatch):
    def save(checkpoints, step, *given, go_on=Checkpoints.save):
        if step == 4:
            signal.raise_signal(signal.SIGTERM)
        go_on(checkpoints, step, *given)

    monkeypatch.setattr(Checkpoints, "save", save)
    with pytest.raises(Stopped, match="at step 4, saved"):
        train(run[1], tmp_path, progress=False)
    assert json.loads((tmp_path / "finished.json").read_text()) == {"step": 4}
    train(run[1], tmp_path, progress=False)  # goes on to the end, which is here


@pytest.fixture
def no_data(monkeypatch):
    """Whatever is refused is so before the data is looked at and captions are embedded."""
    monkeypatch.setattr(training, "inputs", lambda *_: pytest.fail("the data was looked at"))


def test_a_folder_that_cannot_be_made_is_refused(run, tmp_path, no_data):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="Can't write the run"):
        train(run[1], tmp_path / "file" / "run", progress=False)


def test_a_table_and_its_pictures_may_move_but_not_be_read_otherwise(run):
    def reading(files, root, column):
        read = run[1].copy_and_resolve_references()
        names = {"file_column": column, "caption_column": "caption"}
        read.data.source = {"name": "parquet", "files": files, "root": root, **names}
        return read

    saved = config.to_json(reading("/here/*.parquet", "/here", "file"))
    check_same(reading("/there/*.parquet", "/there", "file"), saved, "another run")
    with pytest.raises(UserError, match="file_column is 'path' now and was 'file'"):
        check_same(reading("/here/*.parquet", "/here", "path"), saved, "another run")


@pytest.mark.parametrize(
    ("key", "value"), [("seed", 1), ("stage.network.channels", 32), ("train.ema_decay", 0.5)]
)
def test_another_config_in_the_same_folder_is_refused_by_key(run, key, value, no_data):
    other = run[1].copy_and_resolve_references()
    *sections, last = key.split(".")
    section = other
    for name in sections:
        section = section[name]
    section[last] = value
    kept = sorted(p.name for p in (run[0] / "checkpoints").iterdir())
    with pytest.raises(UserError, match=f"config.{key} is"):
        train(other, run[0], progress=False)
    assert sorted(p.name for p in (run[0] / "checkpoints").iterdir()) == kept


def with_weights_at(loaded, folder, *, flip=False):
    """The config, its text encoder read from a copy of the same files; one bit flipped in it."""
    shutil.copytree(VENDORED, folder)
    if flip:
        weights = bytearray((folder / "model.safetensors").read_bytes())
        weights[-2] ^= 1
        (folder / "model.safetensors").write_bytes(weights)
    other = loaded.copy_and_resolve_references()
    other.text.weights = str(folder)
    return other


def test_a_run_goes_on_with_the_same_weights_elsewhere_and_not_with_others(run, tmp_path):
    same = with_weights_at(run[1], tmp_path / "same")
    train(same, run[0], progress=False)
    others = with_weights_at(run[1], tmp_path / "others", flip=True)
    with pytest.raises(UserError, match="another text encoder: its fingerprint is"):
        train(others, run[0], progress=False)


def test_runs_are_bundled_wherever_their_weights_were(run, tmp_path):
    for name, flip in (("same", False), ("others", True)):
        shutil.copytree(run[0], tmp_path / name)
        moved = with_weights_at(run[1], tmp_path / f"weights of {name}", flip=flip)
        write_config(moved, tmp_path / name)
    # One stage twice is no cascade, but that is seen once the encoders agree.
    with pytest.raises(UserError, match="Stage 1 has lowres_resolution"):
        bundle_runs([run[0], tmp_path / "same"], tmp_path / "bundle")
    with pytest.raises(UserError, match="was trained with other text encoder weights"):
        bundle_runs([tmp_path / "others", run[0]], tmp_path / "bundle")


def test_a_batch_that_devices_cant_share_is_refused(tmp_path):
    loaded = config.load(SMOKE, ["--config.train.batch_size=3", "--config.mesh.data=8"])
    with pytest.raises(UserError, match="batch_size=3"):
        train(loaded, tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_a_diverged_run_stops_with_a_sentence(tmp_path):
    overrides = flags(
        mesh__data=2, mesh__fsdp=4, text_cache__folder=tmp_path / "cache",
        train__learning_rate__peak=1e30, train__clip_norm=0.0, train__steps=40,
    )  # fmt: skip
    loaded = config.load(SMOKE, overrides)
    with pytest.raises(UserError, match="diverged"):
        train(loaded, tmp_path / "run", progress=False)


def test_tensorboard_without_room_ends_nothing(tmp_path, monkeypatch, caplog):
    writer = metrics.Metrics(tmp_path, start_step=0)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer.board.file_writer.event_writer._ev_writer, "flush", full)
    writer.scalars(1, {"loss": 1.0})
    writer.close()
    assert "No space left on device" in caplog.text
    writer.board.file_writer.event_writer.close()  # as the program's exit does
    assert [row["loss"] for row in metrics.read(tmp_path / "metrics.jsonl")] == [1.0]


def test_rows_after_the_last_checkpoint_are_dropped_and_a_cut_line_ignored(tmp_path):
    rows = [json.dumps({"step": step, "loss": 1.0}) for step in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(rows) + '\n{"step": 4, "lo')
    writer = metrics.Metrics(tmp_path, start_step=2)
    writer.scalars(3, {"loss": 0.5, "not a number": float("nan")})
    writer.close()
    assert metrics.read(tmp_path / "metrics.jsonl") == [
        {"step": 1, "loss": 1.0},
        {"step": 2, "loss": 1.0},
        {"step": 3, "loss": 0.5},
    ]
