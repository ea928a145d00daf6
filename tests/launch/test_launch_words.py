"""Any words arrive unchanged, and what a dry run prints does what the launcher does."""

import os
import subprocess
import tempfile
from pathlib import Path

import pytest
from cases import BUCKET, CASES, IMAGE, LAUNCH, PLACE, run
from fakes import RECORDER, SCONTROL, install, records
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

CONFIG = ("--config", "configs/emoji/base64.py")
# Everything that a command line in UTF-8 can hold; not NUL.
TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"))
TRICKY = TEXT | st.sampled_from(
    [
        "'",
        "''",
        '"',
        "$HOME",
        "$(reboot)",
        "`id`",
        "\\",
        "\\n",
        "\n",
        "a\n",
        " ",
        "*",
        "!!",
        "-",
        "&",
    ]
)
WORDS = st.lists(st.lists(TRICKY).map("".join).map("--config.a=".__add__), max_size=4)
# script, words before the --, the tool that is handed the words
LAUNCHES = [
    ("local.sh", ("--workdir", "{folder}/it's mine"), "cascade"),
    ("slurm.sh", ("--workdir", "{folder}/it's mine", "--nodes", "2"), "sbatch"),
    ("tpu_vm.sh", ("run", *PLACE, *BUCKET, "--queue"), "gcloud"),
    ("gke.py", ("up", "--name", "base", *IMAGE, *BUCKET, "--topology", "v5e-16"), "kubectl"),
]
# Of several at once, each to a file; kubectl's last word is its standard input.
TOOLS = dict.fromkeys(("cascade", "sbatch", "gcloud", "srun"), RECORDER)
TOOLS["kubectl"] = RECORDER.replace('"$@"', '"$@" "$(cat)"')


def called(folder: Path, tools: Path, action) -> list[list[str]]:
    """What the tools are told while an action runs with the environment it is given."""
    kept = Path(tempfile.mkdtemp(dir=folder))
    run_folder = folder / "it's mine"
    run_folder.mkdir(exist_ok=True)
    action({"RECORDS": str(kept), "MAKES": str(run_folder / "finished.json")})
    return sorted(records(kept))


@pytest.mark.parametrize(("script", "before", "tool"), LAUNCHES)
@settings(max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(words=['--config.a=it\'s "here", $HOME `id` \\ \n日本 🍎 \n', "", "-", "--"])
@given(words=WORDS)
def test_words_arrive_and_a_dry_run_can_be_pasted(tmp_path_factory, script, before, tool, words):
    folder = tmp_path_factory.mktemp("launch")
    tools = install(folder / "tools", **TOOLS)
    before = tuple(word.replace("{folder}", str(folder)) for word in before)
    given_words = (*before, "--", *CONFIG, *words)

    def launch(environment):
        done = run(script, *given_words, path=tools, environment=environment)
        assert done.returncode == 0, done.stderr

    def paste(environment):
        done = run(script, *before, "--dry-run", "--", *CONFIG, *words)
        path = f"{tools}{os.pathsep}{os.environ['PATH']}"
        pasted = subprocess.run(
            ["bash"], input=done.stdout.encode(), env={**os.environ, "PATH": path, **environment}
        )
        assert pasted.returncode == 0

    real = called(folder, tools, launch)
    assert called(folder, tools, paste) == real
    (told, *_) = [call for call in real if call[0] == tool]
    if tool == "gcloud":
        (command,) = (word[10:] for word in told if word.startswith("--command="))
        # As the shell at the other end reads it, whichever it is.
        shown = subprocess.run(
            ["sh", "-c", f"printf '%s\\0' {command}"], stdout=subprocess.PIPE, check=True
        )
        told = shown.stdout.decode().split("\0")[:-1]
    if tool != "kubectl":  # a manifest's words are test_launch_manifests'
        assert tuple(told[-len(words) - 2 :]) == (*CONFIG, *words)


def test_a_pod_hands_its_words_on_and_tells_saved_from_finished(tmp_path):
    tools = install(tmp_path / "tools", **TOOLS)
    kept = tmp_path / "records"
    kept.mkdir()
    words = [*CONFIG, '--config.a=it\'s "here", $HOME `id` \\ \n日本 🍎']
    environment = {"RECORDS": str(kept), "SEEN_WITHIN": "1"}

    def pod(**more):
        words_of_pod = (str(tmp_path), *words)
        return run("gke_pod.sh", *words_of_pod, path=tools, environment=environment | more)

    assert pod().returncode == 90  # it ended well, but isn't finished: it was stopped and has saved
    assert pod(ENDS_WITH="2").returncode == 2
    assert pod(ENDS_WITH="75").returncode == 75
    assert pod(MAKES=str(tmp_path / "finished.json")).returncode == 0
    told = ["cascade", "train", "--workdir", str(tmp_path), *words]
    assert records(kept) == [told] * 4


# What srun ends with, how often it is called, and whether the job is requeued: saved, a mistake in
# the input, something else.
@pytest.mark.parametrize(("code", "calls", "again"), [(0, 1, True), (2, 1, False), (1, 3, False)])
def test_a_job_tries_again_or_is_requeued(tmp_path, code, calls, again):
    tools = install(tmp_path / "tools", **TOOLS, scontrol=SCONTROL, sleep="#!/usr/bin/env bash\n")
    kept = tmp_path / "records"
    kept.mkdir()
    environment = {"RECORDS": str(kept), "ENDS_WITH": str(code), "TASKS": str(tmp_path)}
    environment |= {"SLURM_JOB_ID": "1", "SLURM_RESTART_COUNT": "4"}
    words = (str(LAUNCH), str(tmp_path), "2", "5", "", "cascade", "train")
    done = run("slurm_job.sh", *words, path=tools, environment=environment)
    assert done.returncode == code, done.stderr
    assert (tmp_path / "requeued").exists() == again
    told = ["srun", "--kill-on-bad-exit=0", "--wait=120", "cascade", "train"]
    assert records(kept) == [told] * calls


def test_requeues_are_bounded(tmp_path):
    tools = install(tmp_path / "tools", **TOOLS, scontrol=SCONTROL)
    environment = {"RECORDS": str(tmp_path), "TASKS": str(tmp_path), "SLURM_JOB_ID": "1"}
    words = (str(LAUNCH), str(tmp_path), "2", "5", "", "cascade", "train")
    environment["SLURM_RESTART_COUNT"] = "5"
    done = run("slurm_job.sh", *words, path=tools, environment=environment)
    assert done.returncode == 2 and "after 5 requeues" in done.stderr
    assert not (tmp_path / "requeued").exists()


def test_secrets_are_on_no_command_line(tmp_path):
    tools = install(tmp_path / "tools", **TOOLS)
    tools.joinpath("cascade").write_text(
        "#!/usr/bin/env bash\n"
        'printf "%s\\0" "$HF_TOKEN" "$@" >"$RECORDS/$CASCADE_PROCESS"; echo "{}" >"$MAKES"\n'
    )
    kept = tmp_path / "records"
    kept.mkdir()
    secrets = tmp_path / "hf.env"
    secrets.write_text("HF_TOKEN=top secret $HOME\n")
    secrets.chmod(0o600)
    environment = {"RECORDS": str(kept), "MAKES": str(tmp_path / "finished.json")}
    words = ("--workdir", str(tmp_path), "--secrets", str(secrets))
    done = run("local.sh", *words, "--", *CONFIG, path=tools, environment=environment)
    assert done.returncode == 0, done.stderr
    for token, *told in records(kept):
        assert token == "top secret $HOME"
        assert told == ["train", "--workdir", str(tmp_path), *CONFIG]
    for name, (script, line) in CASES.items():
        if "--secrets" in line:
            line = [str(secrets) if word.endswith("hf.env") else word for word in line]
            done = run(script, *line, "--dry-run", "--", *CONFIG)
            assert str(secrets) in done.stdout and "top secret" not in done.stdout, name
