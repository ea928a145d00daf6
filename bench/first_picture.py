"""Seconds from a command to its picture, cold and warm, and from a call to its picture.

    python bench/first_picture.py
    python bench/first_picture.py --bundle runs/demo/bundle --repeats 1

`cascade sample --num 1` runs in a process of its own with an empty home folder, so that it
compiles everything, and again with what the first run left there (`~/.cache/cascade`): with the
bundle's base stage alone, and with all stages. Then one process draws again and again, for a
picture once all is compiled. The median of `--repeats` is told; results go to
bench/results/first-picture.md.
"""

import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click

from cascade.bundle import SHIPPED, load_bundle, save_bundle
from cascade.cli import OneSentence
from cascade.files import write_whole
from cascade.pipeline import load

RESULT = Path(__file__).parent / "results" / "first-picture.md"
SAMPLE = [sys.executable, "-c", "from cascade.cli import main; main()", "sample"]
PROMPT = "a red apple"


@click.command(cls=OneSentence)
@click.option("--bundle", default=SHIPPED, type=Path, help="[default: the package's own]")
@click.option("--repeats", default=3, type=click.IntRange(min=1), show_default=True)
def main(bundle, repeats):
    """Times both, and writes the table."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        whole = load_bundle(bundle)
        for count in dict.fromkeys((1, len(whole.stages))):
            part = Path(folder, f"stages-{count}")
            stages = whole.stages[:count]
            save_bundle(part, stages, whole.text, whole.text_encoder, dtype="bfloat16")
            homes = [Path(folder, f"home-{count}-{i}") for i in range(repeats)]
            side = stages[-1].stage.config.resolution
            steps = "/".join(str(trained.stage.config.sampling.steps) for trained in stages)
            times = [commanded(part, home) for home in (*homes, *homes)]  # cold, then warm
            found = times[:repeats], times[repeats:], called(part, repeats)
            told = " | ".join(f"{statistics.median(part):.2f} s" for part in found)
            rows.append(f"| {side}×{side} | {steps} | {told} |")
            click.echo(rows[-1])
    command = shlex.join(["python", "bench/first_picture.py", *sys.argv[1:]])
    lines = [
        f"`{command}`, {len(os.sched_getaffinity(0))} CPU cores",
        "",
        "| picture | steps | command, cold | command, warm | call |",
        "|---|---|---|---|---|",
        *rows,
    ]
    write_whole(RESULT, "\n".join(lines) + "\n")


def commanded(bundle: Path, home: Path) -> float:
    """Seconds that `cascade sample` takes for one picture, where `home` is the home folder."""
    home.mkdir(exist_ok=True)
    command = [*SAMPLE, "--bundle", bundle, "--prompt", PROMPT, "--num", "1", "--out", home / "out"]
    began = time.perf_counter()
    environment = {**os.environ, "HOME": str(home)}
    subprocess.run(command, env=environment, check=True, capture_output=True)
    return time.perf_counter() - began


def called(bundle: Path, repeats: int) -> list[float]:
    """Seconds that one picture takes of a pipeline that has drawn one already."""
    pipe, times = load(bundle), []
    for seed in range(repeats + 1):
        began = time.perf_counter()
        pipe(PROMPT, seed=seed, progress=False)
        times.append(time.perf_counter() - began)
    return times[1:]


if __name__ == "__main__":
    main()
