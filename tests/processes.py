"""Starts several real Python processes on this machine, as one cluster over loopback."""

import dataclasses
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
# Several processes compile the same at once; nothing here runs for long.
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


def free_port() -> int:
    """A TCP port that nobody listens on now."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


@dataclasses.dataclass
class Outputs:
    """What one process wrote, each whole."""

    out: str
    err: str


class Running:
    """Processes that were started; leaving the `with` kills those that are left.

    Args:
      commands: what follows the interpreter, one a process: ["-c", script, ...], ["-m", module].
      devices: fake CPU devices of each.
      environment: beyond this one's; what is None is taken out. With a callable, process i has
        `environment(i)`.
      timeout: seconds after which all are killed.
    """

    def __init__(
        self,
        commands: Sequence[Sequence[str]],
        *,
        devices: int = 1,
        environment: Mapping[str, str | None] | Callable[[int], Mapping[str, str | None]] = (),
        timeout: float = 300,
    ):
        self.processes, self.texts, self.readers = [], [], []
        for index, command in enumerate(commands):
            extra = environment(index) if callable(environment) else environment
            whole = {
                **os.environ,
                "JAX_PLATFORMS": "cpu",
                "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {QUICK}",
                "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{REPOSITORY / 'tests'}",
                **dict(extra),
            }
            process = subprocess.Popen(
                [sys.executable, *map(str, command)],
                env={name: value for name, value in whole.items() if value is not None},
                cwd=REPOSITORY,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
            )
            self.processes.append(process)
            self.texts.append(([], []))
            # Read as it comes: a full pipe would stop a process, and tests look while it runs.
            for pipe, kept in zip((process.stdout, process.stderr), self.texts[-1], strict=True):
                reader = threading.Thread(target=lambda p=pipe, k=kept: k.extend(p), daemon=True)
                reader.start()
                self.readers.append(reader)
        self.alarm = threading.Timer(timeout, self.kill)
        self.alarm.start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.kill()
        self.alarm.cancel()

    def kill(self):
        """Ends what still runs, at once."""
        for process in self.processes:
            process.kill()

    def send(self, index: int, number: signal.Signals):
        """Sends one process a signal."""
        self.processes[index].send_signal(number)

    def outputs(self) -> list[Outputs]:
        """What each has written up to now."""
        return [Outputs("".join(out), "".join(err)) for out, err in self.texts]

    def wait_for(self, condition: Callable[[], object], seconds: float = 120):
        """Returns once the condition holds; fails, saying what all wrote, where it never does."""
        end = time.monotonic() + seconds
        while not condition():
            ended = all(process.poll() is not None for process in self.processes)
            assert not ended and time.monotonic() < end, self.outputs()
            time.sleep(0.02)

    def wait(self) -> tuple[list[int], list[Outputs]]:
        """Exit codes (minus a signal's number where one ended it) and outputs, once all ended."""
        codes = [process.wait() for process in self.processes]
        for reader in self.readers:
            reader.join()
        self.alarm.cancel()
        return codes, self.outputs()


def run_processes(commands: Sequence[Sequence[str]], **settings) -> tuple[list[int], list[Outputs]]:
    """Starts processes, see `Running`, and waits for all: their exit codes and outputs."""
    with Running(commands, **settings) as running:
        return running.wait()


def cluster(count: int, port: int | None = None) -> Callable[[int], dict[str, str]]:
    """The environment by which process i of `count` finds the others, for `Running`."""
    port = port or free_port()
    return lambda index: {
        "CASCADE_COORDINATOR": f"localhost:{port}",
        "CASCADE_PROCESSES": str(count),
        "CASCADE_PROCESS": str(index),
    }
