"""How long a cluster of processes takes to stop: asked to, and when one of them is killed.

    python bench/processes.py                 # 2 and 4 processes on this machine, minutes
    python bench/processes.py --counts 2

`cascade train` runs a stage of smoke size. One process gets SIGTERM; then, started again, one is
killed, and then process 0. Printed is the time until the last process has ended, and what asking at
each step whether to stop costs. Results go to bench/results/.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click

RESULT = Path(__file__).parent / "results" / "processes.md"
TRAIN = [sys.executable, "-c", "from cascade.cli import main; main()", "train"]
SETTINGS = {"steps": 1_000_000, "log_every": 1, "checkpoint_every": 5, "eval_every": 0}
SIGNALS = ((signal.SIGTERM, 1), (signal.SIGKILL, 1), (signal.SIGKILL, 0))
ASK = """
import time, jax
from cascade.parallel.processes import connect, stopping
connect(saves_when_terminated=True)
with stopping() as asked:
    began = time.perf_counter()
    for step in range(100_000):
        asked(step)
if jax.process_index() == 0:
    print((time.perf_counter() - began) * 10)
"""


@click.command()
@click.option("--counts", default="2,4", show_default=True, help="Numbers of processes.")
def main(counts):
    """Measures for each number of processes, and writes the table."""
    lines = [
        f"`python bench/processes.py --counts {counts}`, {os.cpu_count()} CPU cores",
        "",
        "| processes | SIGTERM to one, all saved and gone | SIGKILL of one | SIGKILL of process 0 |"
        " asking, a step |",
        "|---|---|---|---|---|",
    ]
    for count in map(int, counts.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            times = [seconds(count, Path(folder), *what) for what in SIGNALS]
        told = " | ".join(f"{value:.1f} s" for value in times)
        lines.append(f"| {count} | {told} | {asking(count):.1f} µs |")
        click.echo(lines[-1])
        RESULT.write_text("\n".join(lines) + "\n", encoding="utf-8")


def start(command: list[str], count: int, **options) -> list[subprocess.Popen]:
    """Starts `count` processes that find one another on this machine."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    shared = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_backend_optimization_level=0",  # to be at the first step sooner
        "CASCADE_COORDINATOR": address,
        "CASCADE_PROCESSES": str(count),
    }
    return [
        subprocess.Popen(command, env={**shared, "CASCADE_PROCESS": str(i)}, **options)
        for i in range(count)
    ]


def seconds(count: int, folder: Path, number: signal.Signals, victim: int) -> float:
    """From a signal to one training process until all have ended."""
    settings = [f"--config.train.{key}={value}" for key, value in SETTINGS.items()]
    cache = f"--config.text_cache.folder={folder / 'cache'}"
    place = ["--config", "configs/emoji/base64.py:smoke", "--workdir", str(folder / "run")]
    before = last_step(folder / "run")
    silent = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # exit codes tell
    processes = start([*TRAIN, *place, *settings, cache], count, **silent)
    while last_step(folder / "run") < before + 10:
        if any(process.poll() is not None for process in processes):
            raise SystemExit("A process ended by itself; see why with cascade train.")
        time.sleep(0.05)
    processes[victim].send_signal(number)
    began = time.perf_counter()
    codes = [process.wait() for process in processes]
    expected = [0 if number == signal.SIGTERM else 75] * count
    expected[victim] = 0 if number == signal.SIGTERM else -number
    if codes != expected:
        raise SystemExit(f"Exit codes {codes}, where {expected} were expected.")
    return time.perf_counter() - began


def last_step(run: Path) -> int:
    """The last step in a run's metrics."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)


def asking(count: int) -> float:
    """Microseconds of a call of `stopping`'s function."""
    first, *others = start([sys.executable, "-c", ASK], count, stdout=subprocess.PIPE, text=True)
    said, _ = first.communicate()
    for process in others:
        process.communicate()
    return float(said.splitlines()[-1])


if __name__ == "__main__":
    main()
