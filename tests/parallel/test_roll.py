"""The roll call: who isn't there, who doesn't fit, and who is no process of ours."""

import json
import re
import socket
import threading
import time

import click
import pytest
from click.testing import CliRunner
from processes import free_port
from tqdm import tqdm

from cascade.cli import OneSentence
from cascade.errors import UserError
from cascade.parallel import roll
from cascade.parallel.environments import Place


@pytest.fixture(autouse=True)
def unwatched(monkeypatch):
    """Nobody's end ends this process; all of the roll's processes are threads here."""
    monkeypatch.setattr(roll, "Roll", lambda *arguments: None)


def call(places, wait=5.0):
    """Calls the roll in as many threads: each one's answer, or its error's sentence."""
    said = {}

    def one(number, place):
        try:
            said[number] = roll.answer(place, wait, silence=60)
        except UserError as error:
            said[number] = str(error)

    threads = [threading.Thread(target=one, args=pair) for pair in enumerate(places)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [said[number] for number in range(len(places))]


def places(*processes, count=None):
    coordinator = f"localhost:{free_port()}"
    return [Place(coordinator, count or len(processes), process) for process in processes]


def test_all_hear_of_one_address_however_late_process_0_is():
    there = places(3, 1, 2, 0)
    answers = call(there)
    assert len(set(answers)) == 1
    host, port = answers[0].split(":")
    assert host == "localhost" and answers[0] != there[0].coordinator and int(port) > 0


def test_no_coordinator():
    began = time.monotonic()
    (said,) = call(places(1, count=2), wait=0.5)
    assert "Process 1 of 2 found no process 0 at localhost" in said and "within 0.5 s" in said
    assert time.monotonic() - began < 20


def test_a_host_that_has_no_address():
    (said,) = call([Place("nowhere.invalid:5", 2, 1)], wait=0.3)
    assert "found no process 0 at nowhere.invalid:5" in said and "--coordinator" in said


def test_who_is_missing_is_named_to_all_that_came():
    said = call(places(0, 2, count=4), wait=1.0)
    assert said[0] == said[1]
    assert "Of 4 processes, 1, 3 didn't call process 0 within 1 s" in said[0]


def test_a_port_that_is_taken():
    with socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True) as other:
        port = other.getsockname()[1]
        (said,) = call([Place(f"localhost:{port}", 2, 0)])
    assert f"can't listen on port {port}" in said and "another port" in said


def test_another_program_at_the_coordinator_s_port():
    def greet(server):
        peer, _ = server.accept()
        with peer:
            peer.sendall(b"SSH-2.0-OpenSSH\r\n")

    with socket.create_server(("localhost", 0)) as server:
        threading.Thread(target=greet, args=[server]).start()
        (said,) = call([Place(f"localhost:{server.getsockname()[1]}", 2, 1)])
    assert "gave no answer" in said and "another program" in said


@pytest.mark.parametrize(
    "noise", [b"", b"GET / HTTP/1.1\r\n\r\n", b"[]\n", b'{"process": "x"}\n', b"\xff\n"]
)
def test_strangers_at_process_0_s_port_are_sent_away(noise):
    there = places(0, 1)
    host, port = there[0].coordinator.split(":")

    def stranger():
        for _ in range(50):
            try:
                with socket.create_connection((host, int(port)), timeout=1) as peer:
                    peer.sendall(noise)
                    return
            except ConnectionRefusedError:
                time.sleep(0.02)

    knocking = threading.Thread(target=stranger)
    knocking.start()
    late = threading.Timer(0.3, lambda: answers.extend(call(there[1:])))
    answers = []
    late.start()
    answers += call(there[:1], wait=10)
    late.join(), knocking.join()
    assert len(set(answers)) == 1 and "localhost:" in answers[0]


@pytest.mark.parametrize("count", [3, 5])
def test_processes_that_disagree_about_how_many_they_are(count):
    zero, one = places(0, 1, count=4)
    said = call([zero, one._replace(processes=count)])
    assert said[0] == said[1]
    assert f"Process 1 was started as one of {count}, process 0 as one of 4" in said[0]


def test_two_that_say_they_are_the_same():
    one = places(0, 1, 1, count=4)
    said = call(one)
    assert set(said) == {"Two processes were started as process 1; give each its own --process."}


@pytest.mark.parametrize("last", [1, 2], ids=["before it calls again", "after it called again"])
def test_one_that_was_started_again_takes_its_own_place(last):
    zero, *others = places(0, 1, 2)
    host, port = zero.coordinator.split(":")
    hello = {"process": 1, "processes": 3, "versions": roll.versions()}
    answers = []

    def start(place):
        thread = threading.Thread(target=lambda: answers.extend(call([place], wait=20)))
        thread.start()
        time.sleep(0.2)  # for its call to arrive before the next one's
        return thread

    started = [start(zero)]
    while True:
        try:
            with socket.create_connection((host, int(port))) as given_up:
                given_up.sendall(json.dumps(hello).encode() + b"\n")
                time.sleep(0.2)
            break
        except ConnectionRefusedError:
            time.sleep(0.02)
    started += [start(place) for place in sorted(others, key=lambda place: place.process == last)]
    for thread in started:
        thread.join()
    assert len(answers) == 3 and len(set(answers)) == 1


def test_another_version_is_named(monkeypatch):
    zero, one = places(0, 1)
    mine = roll.versions()
    calls = iter([mine, {**mine, "jax": "0.0.1"}])
    monkeypatch.setattr(roll, "versions", lambda: next(calls))
    said = call([zero, one])
    assert said[0] == said[1] and "has jax " in said[0] and "0.0.1" in said[0]


def test_a_sentence_has_its_own_line_where_a_bar_is_open():
    @click.command(cls=OneSentence)
    def fail():
        bar = tqdm(total=3)
        bar.update(0)
        raise UserError("It broke.")

    result = CliRunner().invoke(fail)
    assert result.exit_code == 2
    *_, bar, said, end = re.split("[\r\n]", result.stderr)
    assert "0/3" in bar and (said, end) == ("error: It broke.", "")
