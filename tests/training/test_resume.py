"""40 steps straight, and 20 + kill −9 + 20, end in the same state, bit for bit."""

import functools
import json
import os
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
from one_level import flags
from processes import QUICK

from cascade import config
from cascade.parallel.mesh import make_mesh
from cascade.parallel.rules import shardings
from cascade.stage import Stage
from cascade.training.checkpoint import Checkpoints
from cascade.training.optim import make_optimizer
from cascade.training.state import init_state, with_shardings

# Trains; with a number as second argument, kills itself with −9 at that step.
TRAIN = """
import os, pathlib, signal, sys, time
from cascade import config
from cascade.training import observe, train

workdir, fatal, overrides = sys.argv[1], int(sys.argv[2]), sys.argv[3:]
after_step = observe.Observer.after_step

def deadly(self, step, *rest):
    after_step(self, step, *rest)
    if step == fatal:
        while not pathlib.Path(workdir, "checkpoints", "20").exists():
            time.sleep(0.05)  # Orbax writes in the background
        os.kill(os.getpid(), signal.SIGKILL)

observe.Observer.after_step = deadly
train.train(config.load("configs/emoji/base64.py:smoke", overrides), workdir, progress=False)
"""

SETTINGS = {
    "train__steps": 40,
    "train__checkpoint_every": 20,
    "train__log_every": 1,
    "train__eval_every": 0,
    "train__sample_every": 0,
    "stage__network__dropout": 0.1,
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(straight, broken): an unbroken run, and one killed at step 25 and started again."""
    folder = tmp_path_factory.mktemp("resume")
    overrides = flags(**SETTINGS, text_cache__folder=folder / "text_cache")
    # One device, as a user has; the fake devices are for the sharding tests.
    environment = {**os.environ, "XLA_FLAGS": QUICK}

    def run(name, fatal):
        command = [sys.executable, "-c", TRAIN, str(folder / name), str(fatal), *overrides]
        return subprocess.run(command, env=environment, check=False).returncode

    assert run("straight", fatal=0) == 0
    assert run("broken", fatal=25) == -signal.SIGKILL
    assert run("broken", fatal=0) == 0
    return folder / "straight", folder / "broken"


def final_state(workdir):
    """Everything the last checkpoint holds: step, parameters, EMA and the optimiser's state."""
    loaded = config.load("configs/emoji/base64.py:smoke", flags(**SETTINGS))
    create = functools.partial(init_state, Stage(loaded.stage), make_optimizer(loaded.train))
    abstract = jax.eval_shape(create, jax.random.key(0))
    mesh = make_mesh(data=1, fsdp=1, tensor=1, devices=jax.devices()[:1])
    placed = with_shardings(abstract, shardings(abstract, mesh))
    step, state, _ = Checkpoints(workdir, read_only=True).restore(placed)
    assert step == 40
    return state


def test_states_are_bit_identical(runs):
    straight, broken = map(final_state, runs)
    for one, other in zip(jax.tree.leaves(straight), jax.tree.leaves(broken), strict=True):
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


def test_metrics_are_bit_identical_and_each_step_is_there_once(runs):
    timeless = ("step", "loss", "gradient_norm")
    straight, broken = (
        [
            {k: v for k, v in json.loads(line).items() if k.startswith(timeless)}
            for line in (run / "metrics.jsonl").read_text().splitlines()
        ]
        for run in runs
    )
    assert [row["step"] for row in straight] == list(range(1, 41))
    assert straight == broken


def test_data_positions_are_identical(runs):
    def position(run):
        saved = run / "checkpoints" / "40" / "data"
        return [p.read_text() for p in sorted(saved.rglob("*.json"))]

    assert position(runs[0]) == position(runs[1]) != []
