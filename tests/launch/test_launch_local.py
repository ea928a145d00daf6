"""launch/local.sh starts again what failed, gives up in bounded time, and stops all together."""

import os
import signal
import subprocess
import time

import pytest
from cases import command, run
from fakes import install

CONFIG = ("--", "--config", "c.py")
# Each process does what its line of $PLAN/PROCESS says, one word a start.
CASCADE = """#!/usr/bin/env bash
plan=$PLAN/$CASCADE_PROCESS
echo "$CASCADE_COORDINATOR $CASCADE_PROCESSES ${CUDA_VISIBLE_DEVICES:-all}" >>"$plan.saw"
echo "this is process $CASCADE_PROCESS"
what=$(head -n 1 "$plan")
sed -i 1d "$plan"
case $what in
  finish) echo '{"step": 8}' >"$PLAN/finished.json" ;;
  saves) trap 'exit 0' TERM; echo >"$plan.ready"; while :; do sleep 0.05; done ;;
  *) exit "$what" ;;
esac
"""


@pytest.fixture
def plan(tmp_path):
    """`plan(starts of process 0, of process 1)` -> the launcher's words and environment."""
    tools = install(tmp_path / "tools", cascade=CASCADE)

    def write(*starts: str):
        for process, words in enumerate(starts):
            (tmp_path / str(process)).write_text("\n".join(words.split()) + "\n")
        path = f"{tools}{os.pathsep}{os.environ['PATH']}"
        words = ("--workdir", str(tmp_path), "--backoff", "0", "--retries", "2")
        return words, {"PLAN": str(tmp_path), "PATH": path}

    return write


def test_what_failed_is_started_again_all_together(plan, tmp_path):
    words, environment = plan("75 finish", "137 0")
    done = run("local.sh", *words, "--port", "9", "--gpus-each", "2", *CONFIG,
               environment=environment)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Ended with code 137" in done.stderr
    assert (tmp_path / "0.saw").read_text() == "localhost:9 2 0,1\n" * 2
    assert (tmp_path / "1.saw").read_text() == "localhost:9 2 2,3\n" * 2
    # Of whom a line is can be told.
    assert done.stdout.count("this is process 0\n") == 2
    assert done.stdout.count("[process 1] this is process 1\n") == 2


def test_tries_are_bounded(plan, tmp_path):
    words, environment = plan("1 1 1 1 1", "1 1 1 1 1")
    done = run("local.sh", *words, *CONFIG, environment=environment)
    assert done.returncode == 1 and "giving up" in done.stderr
    assert (tmp_path / "0").read_text().split() == ["1", "1"]


def test_a_mistake_in_the_input_isnt_tried_again(plan, tmp_path):
    words, environment = plan("2 finish", "2 0")
    done = run("local.sh", *words, *CONFIG, environment=environment)
    assert done.returncode == 2 and (tmp_path / "0").read_text() == "finish\n"


def test_saved_but_not_finished_goes_on(plan):
    words, environment = plan("0 finish", "0 0")
    done = run("local.sh", *words, *CONFIG, environment=environment)
    assert done.returncode == 0 and "Ended with code 0 before the end" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_all_and_nothing_is_started_again(plan, tmp_path, number):
    words, environment = plan("saves finish", "saves 0")
    # A shell that was started with Ctrl-C ignored, as a suite in the background is, can't catch it.
    keyboard = signal.signal(signal.SIGINT, signal.default_int_handler)
    launch = subprocess.Popen(
        command("local.sh", *words, *CONFIG), env={**os.environ, **environment},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, process_group=0,
    )  # fmt: skip
    signal.signal(signal.SIGINT, keyboard)
    try:
        end = time.monotonic() + 60
        while not all((tmp_path / f"{process}.ready").exists() for process in range(2)):
            assert launch.poll() is None and time.monotonic() < end, launch.communicate()
            time.sleep(0.02)
        launch.send_signal(number)
        said = launch.communicate(timeout=60)[0]
    finally:
        launch.kill()
    assert launch.returncode == 0 and "the same command goes on" in said
    assert (tmp_path / "0").read_text() == "finish\n"
