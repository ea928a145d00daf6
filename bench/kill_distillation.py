"""Kills a distillation at random points and starts it again, until its students are there.

    python bench/kill_distillation.py             # 20 kills at smoke size, minutes on a CPU
    python bench/kill_distillation.py --kills 5 --together 1

One distillation (guidance folded in, then 4 → 2) runs unbroken. Then others of the same config, a
few at once, are killed with SIGKILL, every time after a random part of the unbroken one's duration,
and started again by the same command; one that comes to its end before its kills are spent is
followed by another in a new folder. Every student of each must have the unbroken one's bytes. The
result goes to bench/results/kill_distillation.md.
"""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import click

RESULT = Path(__file__).parent / "results" / "kill_distillation.md"
CASCADE = [sys.executable, "-c", "from cascade.cli import main; main()"]
# One level of the smoke network: little to compile after every kill.
STAGE = {
    "network.channel_mults": (1,),
    "network.num_blocks": (1,),
    "network.strides": (1,),
    "network.self_attention": (False,),
    "network.text_attention": (True,),
    "network.middle": False,
}
TRAIN = {"log_every": 1, "checkpoint_every": 2, "eval_every": 0, "sample_every": 0}
# Nothing here runs for as long as it takes to compile it well.
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
STUDENTS = ("guided", "2")


@click.command()
@click.option("--kills", default=20, show_default=True)
@click.option("--together", default=4, show_default=True, help="How many run at once.")
@click.option("--updates", default=8, show_default=True, help="Of each of the two students.")
@click.option("--seed", default=0, show_default=True, help="Of the random points.")
def main(kills, together, updates, seed):
    """Runs, kills, compares, and writes the table."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        flags = [f"--config.stage.{key}={value}" for key, value in STAGE.items()]
        flags += [f"--config.train.{key}={value}" for key, value in TRAIN.items()]
        flags += [f"--config.text_cache.folder={folder / 'text_cache'}"]
        base = ["train", "--config", "configs/emoji/base64.py:smoke", "--workdir", folder / "base"]
        finish([*base, *flags, "--config.train.steps=4"], folder)
        flags += [f"--config.train.steps={updates}", f"--config.distill.updates_last={updates}"]
        flags += ["--config.distill.end_steps=2"]
        flags += [f"--config.train.learning_rate.decay_steps={updates}"]
        flags += [f"--config.distill.teacher={folder / 'base'}"]
        distill = ["distill", "--config", "configs/emoji/distill.py:base:smoke", *flags]

        def to(name):
            return [*distill, "--workdir", folder / name]

        finish(to("warm"), folder)  # what it compiles, all others read
        began = time.monotonic()
        finish(to("unbroken"), folder)
        duration = time.monotonic() - began
        wanted = digests(folder / "unbroken")
        click.echo(f"An unbroken one takes {duration:.0f} s here and now.")

        def broken(worker: int) -> list[list[str]]:
            """One worker's share of the kills: where each found it, for each distillation."""
            rng, left, found = random.Random(f"{seed} {worker}"), share(kills, together, worker), []
            while left:
                name = f"broken-{worker}-{len(found)}"
                found.append(kill(to(name), folder, name, duration, left, rng))
                left -= len(found[-1])
                finish(to(name), folder)
                if digests(folder / name) != wanted:
                    raise SystemExit(f"A distillation ended in other students: {found[-1]}")
                click.echo(f"Killed {len(found[-1])} times ({', '.join(found[-1])}): the same.")
            return found

        with ThreadPoolExecutor(together) as pool:
            found = [each for several in pool.map(broken, range(together)) for each in several]
    write(f"--kills {kills} --together {together} --updates {updates} --seed {seed}", found, wanted)


def share(kills: int, workers: int, worker: int) -> int:
    """How many kills are one worker's."""
    return kills // workers + (worker < kills % workers)


def start(arguments, folder) -> subprocess.Popen:
    """Runs `cascade` with these arguments, its compiled programs kept in the folder."""
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": QUICK,
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    log = (folder / "log").open("ab")
    command = [*CASCADE, *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=log, stderr=log)


def finish(arguments, folder):
    """Runs `cascade` to its end, which must be a good one."""
    if start(arguments, folder).wait() != 0:
        raise SystemExit((folder / "log").read_text()[-2000:])


def kill(arguments, folder, name, duration, most, rng) -> list[str]:
    """Kills up to `most` times, unless it ends before; says where each of them found it."""
    points = []
    while len(points) < most:
        process = start(arguments, folder)
        try:
            code = process.wait(rng.uniform(0.0, duration))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            points.append(reached(folder / name))
            continue
        if code != 0:
            raise SystemExit((folder / "log").read_text()[-2000:])
        break
    return points


def reached(folder: Path) -> str:
    """How far a distillation had come: the last update that it logged."""
    for student in reversed(STUDENTS):
        if (folder / "students" / student / "cascade.json").exists():
            return f"{student} done"
        path = folder / "halvings" / student / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        rows = [json.loads(line) for line in lines if line.endswith("}")]
        if rows:
            return f"{student} at {rows[-1]['step']}"
    return "teacher kept" if (folder / "teacher" / "cascade.json").exists() else "nothing yet"


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of each student's weights."""
    return {
        name: hashlib.sha256(
            b"".join(p.read_bytes() for p in sorted((folder / "students" / name).glob("*.saf*")))
        ).hexdigest()
        for name in STUDENTS
    }


def write(command: str, found: list[list[str]], wanted: dict[str, str]):
    """Leaves what was seen: where the kills of each distillation found it."""
    lines = [
        f"`python bench/kill_distillation.py {command}`, {os.cpu_count()} CPU cores",
        "",
        "Guidance folded in, then 4 → 2 steps, a checkpoint every "
        f"{TRAIN['checkpoint_every']} updates. {sum(map(len, found))} SIGKILLs, each followed by "
        f"the same command; {len(found)} distillations came to their end so, and every student of "
        "each has the unbroken one's bytes:",
        "",
        "| student | SHA-256 of its weights |",
        "|---|---|",
        *[f"| {name} | `{digest}` |" for name, digest in wanted.items()],
        "",
        "How far the kills of each found it (student and last logged update):",
        "",
        *[f"- {', '.join(points) or 'it ended before its first'}" for points in found],
    ]
    RESULT.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
