"""Dry runs print what was reviewed, scripts are sound, and a mistake is one sentence."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cases import AWKWARD, BUCKET, CASES, GOLDEN, IMAGE, LAUNCH, PLACE, ROOT, dry_run, run
from fakes import RECORDER, install

SCRIPTS = sorted(path.name for path in LAUNCH.glob("*.sh"))
HELPFUL = ["local.sh", "slurm.sh", "tpu_vm.sh", "gke.py"]


@pytest.mark.parametrize("name", CASES)
def test_a_dry_run_prints_what_was_reviewed(name):
    assert dry_run(name) == (GOLDEN / f"{name}.txt").read_text(encoding="utf-8")


def test_no_golden_output_is_left_over():
    assert {path.stem for path in GOLDEN.glob("*.txt")} == set(CASES)


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_satisfy_shellcheck(script):
    shellcheck = shutil.which("shellcheck") or str(Path(sys.executable).with_name("shellcheck"))
    done = subprocess.run(
        [shellcheck, "-x", f"launch/{script}"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", HELPFUL)
def test_help_has_an_example(script):
    done = run(script, "--help")
    assert done.returncode == 0 and f"launch/{script}" in done.stdout.split("Example:")[1]


def without(option: str, words: tuple[str, ...]) -> tuple[str, ...]:
    """The words less an option and its value."""
    at = words.index(option)
    return words[:at] + words[at + 2 :]


TPU = ("train", *PLACE, "--topology", "v5e-16", *BUCKET)
GKE = ("up", "--name", "base", *IMAGE, *BUCKET, "--topology", "v5e-16")
MISTAKES = {
    "local: no folder": ("local.sh", (), AWKWARD, "--workdir"),
    "local: a bucket": ("local.sh", BUCKET, AWKWARD, "mount"),
    "local: no config": ("local.sh", ("--workdir", "x"), ("--config.seed=1",), "no config"),
    "local: half a process": ("local.sh", ("--processes", "1.5"), AWKWARD, "whole number"),
    "local: no such option": ("local.sh", ("--proceses=2",), AWKWARD, "--proceses=2"),
    "local: no value": ("local.sh", ("--workdir",), None, "needs a value"),
    "local: two folders": ("local.sh", ("--workdir", "x"), (*AWKWARD, "--workdir=y"), "before"),
    "slurm: no folder": ("slurm.sh", (), AWKWARD, "--workdir"),
    "slurm: a bucket": ("slurm.sh", BUCKET, AWKWARD, "share"),
    "slurm: an open secret": (
        "slurm.sh",
        ("--workdir", "x", "--secrets", str(LAUNCH / "common.sh")),
        AWKWARD,
        "chmod 600",
    ),
    "tpu_vm: no command": ("tpu_vm.sh", PLACE, None, "train, create"),
    "tpu_vm: no name": ("tpu_vm.sh", without("--name", TPU), AWKWARD, "--name"),
    "tpu_vm: no zone": ("tpu_vm.sh", without("--zone", TPU), AWKWARD, "--zone"),
    "tpu_vm: no topology": ("tpu_vm.sh", without("--topology", TPU), AWKWARD, "--topology"),
    "tpu_vm: an odd size": ("tpu_vm.sh", (*TPU, "--topology", "v5e-17"), AWKWARD, "v5e comes in"),
    "tpu_vm: a local folder": ("tpu_vm.sh", (*TPU, "--workdir", "/tmp/x"), AWKWARD, "gs://"),
    "tpu_vm: no config": ("tpu_vm.sh", TPU, None, "no config"),
    "tpu_vm: a config of mine": ("tpu_vm.sh", TPU, ("--config=mine.py",), "commit it"),
    "gke: no name": ("gke.py", without("--name", GKE), AWKWARD, "--name"),
    "gke: a long name": ("gke.py", (*GKE, "--name", "n" * 41), AWKWARD, "at most 40"),
    "gke: an odd queue": ("gke.py", (*GKE, "--queue", "My Queue"), AWKWARD, "My Queue"),
    "gke: no image": ("gke.py", without("--image", GKE), AWKWARD, "--image"),
    "gke: a local folder": ("gke.py", (*GKE, "--workdir", "/tmp/x"), AWKWARD, "gs://"),
    "gke: out of the claim": ("gke.py", (*GKE, "--claim", "c", "--workdir", "../x"), AWKWARD, "in"),
    "gke: no hardware": ("gke.py", without("--topology", GKE), AWKWARD, "--gpus"),
    "gke: both": ("gke.py", (*GKE, "--gpus", "l4:1"), AWKWARD, "--gpus"),
    "gke: an odd size": ("gke.py", (*GKE, "--topology", "v5e-17"), AWKWARD, "v5e comes in"),
    "gke: no number": ("gke.py", (*without("--topology", GKE), "--gpus", "l4"), AWKWARD, "l4:1"),
    "gke: no config": ("gke.py", GKE, None, "No config"),
    "gke: two folders": ("gke.py", GKE, (*AWKWARD, "--workdir", "y"), "before"),
    "gke: odd hosts": ("gke.py", (*GKE[:-1], "v5e-1", "--chips-per-host", "4"), AWKWARD, "divide"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_sentence_and_nothing_is_run(tmp_path, name):
    script, words, rest, said = MISTAKES[name]
    tools = install(
        tmp_path / "tools", **dict.fromkeys(("cascade", "sbatch", "gcloud", "kubectl"), RECORDER)
    )
    (tmp_path / "records").mkdir()
    done = run(
        script, *words, *(() if rest is None else ("--", *rest)),
        path=tools, environment={"RECORDS": str(tmp_path / "records")}, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 2, done
    assert said in done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert not list((tmp_path / "records").iterdir())


@pytest.mark.parametrize(
    ("name", "tool"),
    [("local", "cascade"), ("slurm", "sbatch"), ("tpu_vm", "gcloud"), ("gke_gpu", "kubectl")],
)
def test_a_missing_tool_is_named(tmp_path, name, tool):
    script, words = CASES[name]
    # A PATH with what any machine has, and not the tool.
    plain = install(tmp_path / "plain")
    for program in ("bash", "dirname", "git", "stat", "seq", "cat", "python3"):
        (plain / program).symlink_to(shutil.which(program))
    words = [word for word in words if "hf.env" not in word and word != "--secrets"]
    done = run(script, *words, "--", *AWKWARD, environment={"PATH": str(plain)})
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert f"{tool} isn't installed here" in done.stderr
