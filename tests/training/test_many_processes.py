"""Training over processes: stopped, killed, resumed by fewer, and equal to one process's."""

import json
import signal
import time

import numpy as np
import pytest
from one_level import flags
from processes import Running, cluster, run_processes

STEPS, BATCH, RECORDS = 20, 8, 64
FLOAT32 = 1e-5  # what the order of a sum over processes may change, over 20 steps

# Trains as `cascade train`, leaving the pictures' hashes of each step in WORKDIR/met-RUN-PROCESS;
# a step takes long enough to be met by a signal.
TRAIN = """
import hashlib, pathlib, sys, time
from cascade.cli import main
from cascade.data import loader
from cascade.training import observe

run, workdir, arguments = sys.argv[1], sys.argv[2], sys.argv[3:]
after_step, following = observe.Observer.after_step, loader.Position.__next__

def slowly(self, *rest):
    after_step(self, *rest)
    time.sleep(0.15)

def noted(self):
    import jax
    batch = following(self)
    if "valid" not in batch:  # held-out batches have it
        hashes = [hashlib.sha256(picture.tobytes()).hexdigest() for picture in batch["image"]]
        with open(f"{workdir}/met-{run}-{jax.process_index()}", "a") as file:
            print(*hashes, file=file)
    return batch

observe.Observer.after_step, loader.Position.__next__ = slowly, noted
main(["train", "--workdir", workdir, *arguments])
"""


class Runs:
    """Starts the same training in one folder, over and over, and reads what it leaves."""

    def __init__(self, folder, cache, **changes):
        self.folder = folder
        folder.mkdir()
        settings = dict(
            train__steps=STEPS,
            train__log_every=1,
            train__checkpoint_every=5,
            train__eval_every=0,
            train__sample_every=0,
            text_cache__folder=cache,
        )
        self.arguments = ["--config", "configs/emoji/base64.py:smoke"]
        self.arguments += flags(**{**settings, **changes})

    def start(self, run: str, count: int) -> dict:
        """What `Running` takes for `count` processes."""
        command = ["-c", TRAIN, run, self.folder, *self.arguments]
        place = cluster(count) if count > 1 else {}
        return dict(commands=[command] * count, environment=place, timeout=900)

    def losses(self) -> dict[int, float]:
        """Each logged step's loss, up to now."""
        path = self.folder / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        rows = [json.loads(line) for line in lines if line.endswith("}")]
        steps = [row["step"] for row in rows if "loss" in row]
        assert len(steps) == len(set(steps))
        return {row["step"]: row["loss"] for row in rows if "loss" in row}

    def met(self, run: str, count: int) -> list[list[str]]:
        """Each global batch that a run met: its processes' parts in their order."""
        files = [(self.folder / f"met-{run}-{p}").read_text().splitlines() for p in range(count)]
        return [" ".join(parts).split() for parts in zip(*files, strict=True)]

    def saved(self) -> int:
        """The newest checkpoint."""
        return max(int(p.name) for p in (self.folder / "checkpoints").iterdir())


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """One process's whole run, and the cache of captions that all share."""
    folder = tmp_path_factory.mktemp("alone")
    runs = Runs(folder / "run", folder / "cache")
    codes, outputs = run_processes(**runs.start("whole", 1))
    assert codes == [0], outputs
    assert json.loads((folder / "run" / "finished.json").read_text()) == {"step": STEPS}
    return runs


@pytest.mark.parametrize(("count", "fewer"), [(2, 1), pytest.param(4, 2, marks=pytest.mark.slow)])
def test_stopped_killed_and_resumed_training_is_as_one_process_s(alone, tmp_path, count, fewer):
    runs = Runs(tmp_path / "run", alone.folder.parent / "cache")
    expected = alone.losses()

    # SIGTERM to one: all save at one step.
    with Running(**runs.start("stopped", count)) as running:
        running.wait_for(lambda: 6 in runs.losses(), 600)
        running.send(1, signal.SIGTERM)
        began = time.monotonic()
        codes, outputs = running.wait()
        assert time.monotonic() - began < 30 * count  # one machine runs them all
    assert codes == [0] * count, outputs
    stopped = runs.saved()
    assert 6 <= stopped < STEPS and stopped == max(runs.losses())
    sentence = f"Stopped at step {stopped}, saved; the same command goes on."
    assert [sentence in output.out for output in outputs] == [True] + [False] * (count - 1)
    assert not (runs.folder / "finished.json").exists()
    # Each saved the position of its own share.
    positions = runs.folder / "checkpoints" / str(stopped) / "data"
    assert len(list(positions.glob("process_*.json"))) == count

    # SIGKILL of one, after more steps: the others say so and stop.
    with Running(**runs.start("killed", count)) as running:
        running.wait_for(lambda: stopped + 2 in runs.losses(), 600)
        running.send(count - 1, signal.SIGKILL)
        codes, outputs = running.wait()
    assert codes == [75] * (count - 1) + [-signal.SIGKILL], outputs
    for index, output in enumerate(outputs[:-1]):
        assert f"error: process {index} of {count}: Process {count - 1} is gone" in output.err

    # Fewer go on from the last checkpoint to the end.
    kept = runs.saved()
    codes, outputs = run_processes(**runs.start("resumed", fewer))
    assert codes == [0] * fewer, outputs
    assert json.loads((runs.folder / "finished.json").read_text()) == {"step": STEPS}
    assert not any("|" in output.err for output in outputs[1:])  # bars are process 0's

    found = runs.losses()
    assert found.keys() == expected.keys() == set(range(1, STEPS + 1))
    np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=FLOAT32)

    whole = alone.met("whole", 1)
    stopped_met, resumed = runs.met("stopped", count), runs.met("resumed", fewer)
    assert stopped_met == whole[:stopped] and resumed == whole[kept:]
    epoch = [picture for batch in whole[: RECORDS // BATCH] for picture in batch]
    assert len(set(epoch)) == len(epoch) == RECORDS


def test_one_process_saves_too_when_it_is_terminated(alone, tmp_path):
    runs = Runs(tmp_path / "run", alone.folder.parent / "cache")
    with Running(**runs.start("stopped", 1)) as running:
        running.wait_for(lambda: 3 in runs.losses(), 600)
        running.send(0, signal.SIGTERM)
        codes, (output,) = running.wait()
    stopped = runs.saved()
    assert codes == [0] and f"Stopped at step {stopped}, saved" in output.out
    assert runs.losses() == {k: v for k, v in alone.losses().items() if k <= stopped}
    assert not (runs.folder / "finished.json").exists()
