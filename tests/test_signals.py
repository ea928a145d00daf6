"""SIGTERM and Ctrl-C end a command wherever they find it, and nothing comes after its end."""

import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import click
import pytest
from click.testing import CliRunner

from cascade.cli import OneSentence

# Runs one of these, in a process of its own: a signal too many would end the whole suite.
COMMANDS = """
import ctypes, importlib, pathlib, signal, sys, tempfile, time
import click
from click.testing import CliRunner
from cascade.cli import OneSentence
from cascade.signals import AGAIN

number = signal.Signals[sys.argv[2]]
signal.signal(signal.SIGINT, signal.default_int_handler)  # some shells start with it ignored
HANDLED = signal.SIGALRM, signal.SIGINT, signal.SIGTERM
def state():
    return [sys.unraisablehook, *map(signal.getsignal, HANDLED)]

class Dying:
    def __init__(self, last_words):
        self.last_words = last_words
    def __del__(self):
        self.last_words()

class Asked:
    def __getattr__(self, name):
        signal.raise_signal(number)

def send():
    signal.raise_signal(number)

def destructor():
    Dying(send)
    Dying(lambda: time.sleep(60))  # until it comes again, and is lost again
    time.sleep(60)

def bare_except():
    try:
        send()
    except:
        pass
    time.sleep(60)

def clearing():
    has = ctypes.pythonapi.PyObject_HasAttrString
    has.argtypes = [ctypes.py_object, ctypes.c_char_p]
    assert has(Asked(), b"x") == 0
    time.sleep(60)

def converted():
    try:
        send()
    except BaseException as error:
        raise ImportError("an extension's") from error

def importing():
    with tempfile.TemporaryDirectory() as folder:
        sys.path.insert(0, folder)
        module = "import signal; signal.raise_signal(%d); whole = True" % number
        pathlib.Path(folder, "fragile.py").write_text(module)
        assert importlib.import_module("fragile").whole
        print("whole")
        time.sleep(60)

def cleaning_up():
    Dying(send)  # it would come again while
    try:
        send()
    finally:
        time.sleep(2 * AGAIN)
        if number == signal.SIGTERM:
            send()
        print("cleaned up")

def as_it_ends():
    Dying(send)
    Dying(send)
    time.sleep(AGAIN)

command = click.command(cls=OneSentence)(globals()[sys.argv[1]])
if command.callback is as_it_ends:
    before = state()
    for _ in range(50):
        result = CliRunner().invoke(command)
        assert result.exit_code in (0, 128 + number), result
    time.sleep(3 * AGAIN)
    assert state() == before
    print("nothing came late")
else:
    command([])
"""


def in_its_process(command, name):
    return subprocess.run(
        [sys.executable, "-c", COMMANDS, command, name], check=False, capture_output=True, text=True
    )


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
@pytest.mark.parametrize(
    "command",
    ["destructor", "bare_except", "clearing", "converted", "importing", "cleaning_up"],
)
def test_a_signal_isnt_lost(command, name):
    done = in_its_process(command, name)
    code, said = {"SIGTERM": (143, "Terminated."), "SIGINT": (130, "Interrupted.")}[name]
    assert (done.returncode, done.stderr.strip()) == (code, f"error: {said}"), done
    assert done.stdout == {"cleaning_up": "cleaned up\n", "importing": "whole\n"}.get(command, "")


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_nothing_comes_after_the_end(name):
    done = in_its_process("as_it_ends", name)
    assert (done.returncode, done.stdout) == (0, "nothing came late\n"), done


def fails_with(error):
    @click.command(cls=OneSentence)
    def command():
        if error is not None:
            raise error

    return command


def test_a_thread_may_call_a_command():
    before = signal.getsignal(signal.SIGTERM)
    with ThreadPoolExecutor(1) as pool:
        result = pool.submit(CliRunner().invoke, fails_with(None)).result()
    assert result.exit_code == 0 and signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(
    "error", [MemoryError("137 GiB"), RuntimeError("RESOURCE_EXHAUSTED: 137 GiB\ndetails")]
)
def test_too_little_memory_is_a_sentence(error):
    result = CliRunner().invoke(fails_with(error))
    assert result.exit_code == 2 and len(result.stderr.splitlines()) == 1
    assert "ask for less at once" in result.stderr and "137 GiB" in result.stderr
