"""Command lines of the launchers, and what their dry runs print, without this machine's paths."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
GOLDEN = ROOT / "tests" / "golden" / "launch"
# Quotes, spaces, a variable, two lines, letters and pictures beyond ASCII.
AWKWARD = (
    "--config",
    "configs/emoji/base64.py:smoke",
    "--config.train.steps=8",
    '--config.data.source.path=/data/it\'s "here", $HOME',
    "--config.text.weights=日本 🍎\nsecond line",
)
PLACE = ("--name", "base", "--zone", "us-east5-a")
BUCKET = ("--workdir", "gs://my-bucket/runs/base")
IMAGE = ("--image", "us-docker.pkg.dev/mine/images/cascade:1")


def _case(script: str, line: str, *words: str) -> tuple[str, tuple[str, ...]]:
    return script, (*shlex.split(line), *words)


# name -> (script, words before the --)
CASES = {
    "local": _case("local.sh", "--workdir 'my runs/base' --secrets hf.env"),
    "local_gpus": _case("local.sh", "--workdir runs/base --processes 4 --gpus-each 2"),
    "slurm": _case(
        "slurm.sh",
        "--workdir '/scratch/my runs/100%' --nodes 4 --gpus-per-node 8 --time 04:00:00 "
        "--sbatch=--partition=a100 --secrets /home/you/hf.env",
    ),
    "tpu_vm": _case(
        "tpu_vm.sh", "train --topology v5p-512 --secrets /home/you/hf.env", *PLACE, *BUCKET
    ),
    "tpu_vm_queued": _case(
        "tpu_vm.sh",
        "train --topology 2xv5e-256 --spot --keep --create=--network=mine",
        *PLACE,
        *BUCKET,
    ),
    "gke_tpu": _case(
        "gke.py",
        "up --name base --topology 2xv5e-256 --queue tpus --priority high --spot --secret hf "
        "--service-account writer",
        *IMAGE,
        *BUCKET,
    ),
    "gke_gpu": _case(
        "gke.py",
        "up --name base --workdir runs/base --claim shared --gpus nvidia-h100-80gb:8 --nodes 4 "
        "--queue gpus",
        *IMAGE,
    ),
}


def command(script: str, *words: str) -> list[str]:
    """The words that run a launcher."""
    runner = [sys.executable] if script.endswith(".py") else ["bash"]
    return [*runner, str(LAUNCH / script), *words]


def run(script: str, *words: str, path: Path | None = None, environment=(), **settings):
    """Runs a launcher to its end.

    Args:
      path: a folder of programs that come before all others.
    """
    before = "" if path is None else f"{path}{os.pathsep}"
    whole = {**os.environ, "PATH": f"{before}{os.environ['PATH']}", **dict(environment)}
    done = subprocess.run(
        command(script, *words), capture_output=True, timeout=120, env=whole, **settings
    )
    # Not as text, which takes \r for \n.
    done.stdout, done.stderr = done.stdout.decode(), done.stderr.decode()
    return done


def dry_run(name: str) -> str:
    """What a case's dry run prints, with /checkout for where this checkout is."""
    script, words = CASES[name]
    environment = {"HOME": "/home/you", "XDG_CACHE_HOME": ""}
    done = run(script, *words, "--dry-run", "--", *AWKWARD, environment=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.replace(str(ROOT), "/checkout")
