"""A run killed with −9 and started again ends where an unbroken one ends, bit for bit."""

import json
import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from cascade.training.export import read_run

STEPS = 40
TRAIN = """
import sys
from cascade import config
from cascade.training.train import train
loaded = config.load("configs/emoji/base64.py:smoke", sys.argv[2:])
train(loaded, sys.argv[1], progress=False)
"""


def command(workdir, tmp_path, steps=STEPS):
    overrides = {
        "text_cache": tmp_path / "text_cache",
        "train.steps": steps,
        "train.checkpoint_every": 20,
        "train.log_every": 1,
        "train.eval_every": 1000,
        "train.sample_every": 1000,
        # One level is enough to learn whether a run goes on as it was.
        "stage.network.channel_mults": (1,),
        "stage.network.num_blocks": (1,),
        "stage.network.strides": (1,),
        "stage.network.self_attention": (False,),
        "stage.network.text_attention": (True,),
        "stage.network.middle": False,
        "stage.network.dropout": 0.1,
    }
    flags = [f"--config.{key}={value}" for key, value in overrides.items()]
    return [sys.executable, "-c", TRAIN, str(workdir), *flags]


def environment():
    """One device, as a user has; the fake devices are for the sharding tests."""
    return {**os.environ, "XLA_FLAGS": ""}


def losses(workdir):
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def checkpointed(workdir, step):
    return (workdir / "checkpoints" / str(step)).exists()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """An unbroken run, and one killed with −9 some steps after its checkpoint at step 20."""
    tmp_path = tmp_path_factory.mktemp("resume")
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    subprocess.run(command(straight, tmp_path), check=True, env=environment())
    process = subprocess.Popen(command(broken, tmp_path, steps=100_000), env=environment())
    deadline = time.monotonic() + 300
    while not checkpointed(broken, 20) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert checkpointed(broken, 20), "the run ended before its first checkpoint"
    latest = max(int(p.name) for p in (broken / "checkpoints").iterdir() if p.name.isdigit())
    subprocess.run(command(broken, tmp_path, steps=latest + 20), check=True, env=environment())
    if latest != 20:  # slow to be killed: the unbroken run goes on to the same step
        subprocess.run(
            command(straight, tmp_path, steps=latest + 20), check=True, env=environment()
        )
    return straight, broken


def test_parameters_and_ema_are_bit_identical(runs):
    (_, straight), (_, broken) = (read_run(run) for run in runs)
    assert straight.trained_steps == broken.trained_steps
    for one, other in zip(
        jax.tree.leaves(straight.params), jax.tree.leaves(broken.params), strict=True
    ):
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


def test_metrics_are_bit_identical_and_each_step_is_there_once(runs):
    straight, broken = (losses(run) for run in runs)
    assert straight == broken
    steps = [json.loads(line)["step"] for line in (runs[1] / "metrics.jsonl").open()]
    assert steps == sorted(set(steps))


def test_data_positions_are_identical(runs):
    def position(run):
        newest = max((p for p in (run / "checkpoints").iterdir()), key=lambda p: int(p.name))
        return [p.read_text() for p in sorted((newest / "data").rglob("*.json"))]

    assert position(runs[0]) == position(runs[1]) != []
