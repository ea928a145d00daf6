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
    "local: no such option": ("local.sh", ("--proceses=2",), AWKWARD, "'--proceses'"),
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
CLAIM = (*without("--workdir", GKE), "--claim", "c", "--workdir")
GPUS = (*without("--topology", GKE), "--gpus", "l4:1")
# What a dry run refuses too, as it is wrong wherever it would be run.
ODD = {
    "local: beyond all ports": ("local.sh", ("--port", "99999"), (), "at most 65535"),
    "local: a million processes": ("local.sh", ("--processes", "1000000"), (), "at most 1024"),
    "local: an option for a folder": ("local.sh", ("--workdir", "--port"), (), "needs a value"),
    "local: an empty secret": ("local.sh", ("--secrets", ""), (), "--secrets needs a value"),
    "local: two lines": ("local.sh", ("--processes", "1\n2"), (), "'1 2'"),
    "slurm: empty": ("slurm.sh", ("--sbatch=",), (), "--sbatch is ''"),
    "slurm: a script": ("slurm.sh", ("--sbatch", "partition=a100"), (), "partition=a100"),
    "slurm: the end of options": ("slurm.sh", ("--sbatch=--",), (), "--sbatch is '--'"),
    "slurm: a word for a time": ("slurm.sh", ("--time", "abc"), (), "04:00:00"),
    "slurm: a time of four parts": ("slurm.sh", ("--time", "1:2:3:4"), (), "04:00:00"),
    "slurm: two lines": ("slurm.sh", ("--name", "a\nb"), (), "--name is 'a b'"),
    "slurm: a long grace": ("slurm.sh", ("--grace", "65536"), (), "at most 65535"),
    "tpu_vm: no pause": ("tpu_vm.sh", (*TPU, "--poll", "0"), (), "at least 1"),
    "tpu_vm: an odd zone": ("tpu_vm.sh", (*TPU, "--zone", "us east"), (), "us-east5-a"),
    "tpu_vm: an odd project": ("tpu_vm.sh", (*TPU, "--project", "-x"), (), "--project is '-x'"),
    "tpu_vm: not an option": ("tpu_vm.sh", (*TPU, "--create", "mine"), (), "--create is 'mine'"),
    "tpu_vm: a whole bucket": ("tpu_vm.sh", (*TPU, "--workdir", "gs://b//"), (), "gs://BUCKET/"),
    "tpu_vm: up a folder": ("tpu_vm.sh", (*TPU, "--workdir", "gs://b/../r"), (), "without '..'"),
    "tpu_vm: what is here": ("tpu_vm.sh", (*TPU, "--topology=local"), (), "v5p, v6e)."),
    "gke: up a folder": ("gke.py", (*GKE, "--workdir", "gs://b/r/.."), (), "without '..'"),
    "gke: what is here": ("gke.py", (*GKE, "--topology=local"), (), "v5p, v6e)."),
    "gke: an empty image": ("gke.py", (*GKE, "--image", ""), (), "--image"),
    "gke: a spaced image": ("gke.py", (*GKE, "--image", "a b"), (), "--image"),
    "gke: a whole bucket": ("gke.py", (*GKE, "--workdir", "gs://b//"), (), "gs://BUCKET/"),
    "gke: a whole claim": ("gke.py", (*CLAIM, ""), (), "--claim"),
    "gke: nodes of a slice": ("gke.py", (*GKE, "--nodes", "4"), (), "--gpus"),
    "gke: chips of a node": ("gke.py", (*GPUS, "--chips-per-host", "4"), (), "--topology"),
}
for _script, _words in {
    "local.sh": ("--workdir", "x"),
    "slurm.sh": ("--workdir", "x"),
    "tpu_vm.sh": TPU,
    "gke.py": GKE,
}.items():
    ODD |= {
        f"{_script}: {' '.join(more)}": (_script, _words, more, said)
        for more, said in [
            (("--processes", "3"), "--processes is the launcher's"),
            (("--process=0",), "--process is the launcher's"),
            (("--coordinator", "a:1"), "--coordinator is the launcher's"),
        ]
    }
    ODD[f"{_script}: a config's variant alone"] = (_script, _words, ("--config", ":smoke"), "onfig")
    ODD[f"{_script}: an option for a config"] = (_script, _words, ("--config", "--x"), "onfig")


@pytest.mark.parametrize("name", ODD)
def test_a_dry_run_refuses_what_cannot_be_run(name):
    script, words, more, said = ODD[name]
    if script in ("local.sh", "slurm.sh"):
        words = ("--workdir", "x", *words)
    rest = more if more[:1] == ("--config",) else (*AWKWARD, *more)
    done = run(script, *words, "--dry-run", "--", *rest)
    assert done.returncode == 2, done
    assert said in done.stderr and not done.stdout
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "limit", ["90", "4:00", "04:00:00", "7-0", "7-12:30", "1-0:0:0", "UNLIMITED"]
)
def test_slurm_takes_every_form_of_a_time(limit):
    done = run("slurm.sh", "--workdir", "x", "--time", limit, "--dry-run", "--", *AWKWARD)
    assert done.returncode == 0 and f"--time={limit}" in done.stdout, done.stderr


@pytest.mark.parametrize("name", CASES)
def test_options_are_taken_as_one_word_too(name, monkeypatch):
    script, words = CASES[name]
    joined = []
    for word in words:
        if word.startswith("--") or not joined or not joined[-1].startswith("--"):
            joined.append(word)
        else:
            joined[-1] += f"={word}"
    printed = dry_run(name)
    monkeypatch.setitem(CASES, name, (script, tuple(joined)))
    assert dry_run(name) == printed


@pytest.mark.parametrize("script", ["local.sh", "slurm.sh"])
def test_a_dry_run_says_that_secrets_are_missing(script, tmp_path):
    secrets = tmp_path / "hf.env"
    words = ("--workdir", "x", "--secrets", str(secrets), "--dry-run", "--", *AWKWARD)
    done = run(script, *words)
    assert done.returncode == 0 and f"{secrets} can't be read here" in done.stderr
    secrets.write_text("HF_TOKEN=x")
    assert not run(script, *words).stderr


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
