"""launch/tpu_vm.sh against a made-up cloud: training is finished, whatever happens on the way."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from cases import AWKWARD, BUCKET, PLACE, command, run
from fakes import install

GCLOUD = f"""#!/usr/bin/env bash
exec "{sys.executable}" "{Path(__file__).with_name("fake_gcloud.py")}" "$@"
"""
# Does what its worker's line of $CLOUD/plan says, one word a start, and keeps what it was told.
CASCADE = """#!/usr/bin/env bash
worker=${HOME##*/}
printf '%s\\0' "$@" >"$CLOUD/told.$worker"
printf '%s' "${HF_TOKEN:-}" >"$CLOUD/token.$worker"
what=$(head -n 1 "$CLOUD/plan.$worker")
sed -i 1d "$CLOUD/plan.$worker"
case $what in
  finish) echo '{"step": 8}' >"$CLOUD/buckets/my-bucket/runs/base/finished.json" ;;
  preempted) echo PREEMPTED | tr -d '\\n' >"$CLOUD/state"; exit 143 ;;
  suspended) echo SUSPENDED | tr -d '\\n' >"$CLOUD/state"; exit 143 ;;
  saved) ;;
  *) exit "$what" ;;
esac
"""
# The environment that bootstrap makes: its `cascade` is the one above.
UV = """#!/usr/bin/env bash
if [[ $1 == venv ]]; then
  mkdir -p "${@: -1}/bin"
  touch "${@: -1}/bin/python"
  chmod +x "${@: -1}/bin/python"
else
  [[ $* == *"/source[tpu,hub]" && -e $HOME/cascade/source/setup.py ]] || exit 1
  cp "$(command -v cascade)" "$HOME/cascade/venv/bin/cascade"
fi
"""
# A checkout of one file, for most tests; packing the real one takes seconds.
GIT = """#!/usr/bin/env bash
for word in "$@"; do [[ $word == --output=* ]] && archive=${word#*=}; done
case $3 in
  ls-tree) echo there ;;
  archive) cd "$CLOUD" && touch setup.py && tar -czf "$archive" setup.py ;;
esac
"""
NOTHING = "#!/usr/bin/env bash\n"


@pytest.fixture
def cloud(tmp_path):
    """What a launch needs: `plan(...)` says what each start of training comes to."""

    class Cloud:
        folder = tmp_path / "cloud"
        tools = install(
            tmp_path / "tools", gcloud=GCLOUD, cascade=CASCADE, uv=UV, git=GIT,
            gcsfuse=NOTHING, mountpoint=NOTHING, sleep=NOTHING,
        )  # fmt: skip
        environment = {  # noqa: RUF012
            "CLOUD": str(tmp_path / "cloud"),
            "XDG_CACHE_HOME": str(tmp_path / "cache"),
            "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
        }

        def plan(self, *starts: str):
            self.folder.mkdir()
            for worker in range(2):
                (self.folder / f"plan.{worker}").write_text("\n".join(starts) + "\n")

        def train(self, *words: str):
            quick = ("--poll", "1", "--backoff", "0")
            return run(
                "tpu_vm.sh", "train", *PLACE, *BUCKET, "--topology", "v5p-16", *quick, *words, "--",
                *AWKWARD, environment=self.environment,
            )  # fmt: skip

        def verbs(self) -> list[str]:
            """What gcloud was asked to do to the TPU VMs."""
            calls = map(json.loads, (self.folder / "calls").read_text().splitlines())
            verbs = [words[3] for words in calls if words[1] == "tpus"]
            return [verb for verb in verbs if verb in ("create", "delete")]

        def left(self) -> bool:
            return (self.folder / "state").exists()

    return Cloud()


def test_every_worker_gets_the_words_unchanged_and_all_is_deleted(cloud):
    (cloud.tools / "git").unlink()
    cloud.plan("finish")
    done = cloud.train()
    assert done.returncode == 0, done.stderr
    told = ["train", "--workdir", "/gcs/my-bucket/runs/base", *AWKWARD]
    for worker in range(2):
        words = (cloud.folder / f"told.{worker}").read_bytes().decode().split("\0")
        assert words == [*told, ""]
    assert cloud.verbs() == ["create", "delete"] and not cloud.left()


@pytest.mark.parametrize(("what", "queue"), [("preempted", ()), ("suspended", ("--queue",))])
def test_what_was_preempted_is_created_again_and_goes_on(cloud, what, queue):
    cloud.plan(what, "finish")
    done = cloud.train("--spot", *queue)
    assert done.returncode == 0, done.stderr
    assert cloud.verbs() == ["create", "delete", "create", "delete"] and not cloud.left()


def test_failures_lost_connections_and_a_full_zone_are_tried_again(cloud):
    cloud.plan("1", "saved", "finish")
    (cloud.folder / "full").write_text("1")
    (cloud.folder / "outages").write_text("2")
    done = cloud.train("--keep")
    assert done.returncode == 0, done.stderr
    assert (
        cloud.verbs() == ["create", "create"] and cloud.left() and "goes on costing" in done.stderr
    )


def test_tries_are_bounded_and_what_failed_is_deleted(cloud):
    cloud.plan(*["1"] * 9)
    done = cloud.train("--retries", "2")
    assert done.returncode == 1 and "giving up" in done.stderr
    assert len((cloud.folder / "plan.0").read_text().splitlines()) == 9 - 3
    assert cloud.verbs() == ["create", "delete"] and not cloud.left()


def test_a_mistake_in_the_input_isnt_tried_again(cloud):
    cloud.plan("2", "finish")
    done = cloud.train()
    assert done.returncode == 2, done.stderr
    assert (cloud.folder / "plan.0").read_text() == "finish\n" and not cloud.left()


def test_secrets_travel_by_file_alone(cloud, tmp_path):
    cloud.plan("finish")
    secrets = tmp_path / "hf.env"
    secrets.write_text("# mine\nHF_TOKEN=top secret $HOME\n")
    secrets.chmod(0o600)
    done = cloud.train("--secrets", str(secrets), "--keep")
    assert done.returncode == 0, done.stderr
    for worker in range(2):
        assert (cloud.folder / f"token.{worker}").read_text() == "top secret $HOME"
        home = cloud.folder / "workers" / str(worker)
        assert (home / ".cascade-secrets").stat().st_mode & 0o777 == 0o600
    assert "top secret" not in (cloud.folder / "calls").read_text() + done.stdout + done.stderr


def test_watching_again_leaves_a_training_that_runs_alone(cloud, tmp_path):
    cloud.plan("finish")
    # A worker that trains: its process is this test's own.
    (cloud.folder / "state").write_text("READY")
    for worker in range(2):
        home = cloud.folder / "workers" / str(worker) / "cascade"
        home.mkdir(parents=True)
        (home / "pid").write_text(str(os.getpid()))
    words = ("train", *PLACE, *BUCKET, "--topology", "v5p-16", "--poll", "1", "--", *AWKWARD)
    watching = subprocess.Popen(
        command("tpu_vm.sh", *words), env={**os.environ, **cloud.environment},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    said = []
    for line in watching.stdout:
        said.append(line)
        if "already running" in line:
            watching.terminate()
    assert watching.wait() == 130, said
    assert "goes on and costs" in said[-1]
    assert (cloud.folder / "plan.0").read_text() == "finish\n" and cloud.left()
