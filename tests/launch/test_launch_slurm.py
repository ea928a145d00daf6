"""Slurm's variables, made up, drive real processes to a finished training through a preemption."""

import contextlib
import json
import os
import signal
import subprocess
import time
from pathlib import Path

from cases import command
from fakes import CASCADE, SBATCH, SCANCEL, SCONTROL, SRUN, install
from one_level import flags
from processes import QUICK

STEPS = 20
# The processes of job J meet at port 61440 + J mod 4096; one that no other run here has.
JOB = 4096 + os.getpid() % 4096


def steps_logged(workdir: Path) -> list[int]:
    """The steps of metrics.jsonl that have a loss, in the order they were written."""
    try:
        text = (workdir / "metrics.jsonl").read_text()
    except FileNotFoundError:
        return []
    rows = [json.loads(line) for line in text.split("\n")[:-1]]
    return [row["step"] for row in rows if "loss" in row]


def outputs(tasks: Path) -> dict[str, str]:
    """What each task of each start wrote, by TASK.START."""
    return {path.name: path.read_text() for path in sorted(tasks.glob("?.?"))}


def test_a_job_is_requeued_when_stopped_and_finishes(tmp_path):
    tools = install(
        tmp_path / "tools", cascade=CASCADE, sbatch=SBATCH, srun=SRUN, scancel=SCANCEL,
        scontrol=SCONTROL,
    )  # fmt: skip
    tasks, workdir = tmp_path / "tasks", tmp_path / "a run"
    tasks.mkdir()
    environment = {
        **os.environ,
        "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
        "JOB": str(JOB),
        "TASKS": str(tasks),
        "XLA_FLAGS": f"--xla_force_host_platform_device_count=1 {QUICK}",
    }
    overrides = flags(
        train__steps=STEPS,
        train__batch_size=2,
        train__log_every=1,
        train__checkpoint_every=1000,  # only where it is stopped, and in the end
        train__eval_every=0,
        train__sample_every=0,
        text_cache__folder=f"{tmp_path}/the captions' cache",
    )
    words = ["--config", "configs/emoji/base64.py:smoke", *overrides]
    options = ("--workdir", str(workdir), "--tasks-per-node", "2", "--retries", "0")
    launch = command("slurm.sh", *options, "--", *words)
    job = subprocess.Popen(
        launch, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        process_group=0,
    )  # fmt: skip
    try:
        # The time limit is near, as --signal tells the batch script alone.
        end = time.monotonic() + 400
        while not steps_logged(workdir):
            assert job.poll() is None and time.monotonic() < end, outputs(tasks)
            time.sleep(0.02)
        os.kill(int((tasks / "batch").read_text()), signal.SIGUSR1)
        said = job.communicate(timeout=400)[0]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(job.pid, signal.SIGKILL)
    wrote = outputs(tasks)
    assert job.returncode == 0, (said, wrote)
    assert said.count(f"requeueing job {JOB}") == 1
    assert sorted(wrote) == ["0.0", "0.1", "1.0", "1.1"]
    assert json.loads((workdir / "finished.json").read_text())["step"] == STEPS
    assert steps_logged(workdir) == list(range(1, STEPS + 1))  # each once, none left out
    assert "Stopped at step" in wrote["0.0"] and "Stopped at step" not in wrote["0.1"]
