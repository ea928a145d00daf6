"""Plans of the full-size stages, side by side; and how what chips send grows with their number.

    python bench/plan.py table                     # three stages × three TPU topologies
    python bench/plan.py table --stages sr256_600m --topologies v5e-256
    python bench/plan.py table --tries 2           # and how large a batch each takes
    python bench/plan.py scaling                   # FSDP on 16 … 512 chips of v5p
    python bench/plan.py scaling --override --config.stage.network.channels=128     # quicker

Needs `pip install -e '.[libtpu]'` and no TPU. A step is compiled for each line, some minutes, and a
few times more for the largest batch; what was compiled once is kept (see docs/plan.md), so that a
run that was interrupted goes on. Times are this machine's, while it did whatever else it did.
Results go to bench/results/.
"""

import json
import os
import platform
from pathlib import Path

import click

from cascade.parallel.estimate import MACHINE_CODE, estimate
from cascade.parallel.plan import changed, measure
from cascade.parallel.topology import parse

RESULTS = Path(__file__).parent / "results"
TOPOLOGIES = ("v5e-256", "v5p-512", "v6e-256")
STAGES = ("base64_2b", "sr256_600m", "sr1024_400m")
SCALES = ("v5p-32", "v5p-128", "v5p-1024")  # 16, 64 and 512 chips


@click.group()
def main():
    """Tables of plans; see the file's own words for examples."""


@main.command()
@click.option("--stages", default=",".join(STAGES), show_default=True)
@click.option("--topologies", default=",".join(TOPOLOGIES), show_default=True)
@click.option("--tries", default=0, help="Compilations spent on the largest batch that fits.")
@click.option("--override", multiple=True, help="--config.a.b=value, of every stage.")
def table(stages, topologies, tries, override):
    """Each stage's training step, as its config has it, on each topology."""
    from cascade import config

    rows = []
    for stage in stages.split(","):
        loaded = config.load(f"configs/imagen/{stage}.py", override)
        for topology in topologies.split(","):
            measured = measure(loaded, topology)
            rows.append(row(stage, topology, loaded.train.batch_size, measured))
            if tries:
                rows[-1] |= largest_batch(loaded, topology, measured, tries)
            click.echo(rows[-1])
            write("plan-table", rows, [f"--tries {tries}"] if tries else [], override)


@main.command()
@click.option("--config", "spec", default="configs/imagen/base64_2b.py", show_default=True)
@click.option("--topologies", default=",".join(SCALES), show_default=True)
@click.option("--fsdp", default=8, show_default=True, help="Chips that parameters are split over.")
@click.option("--a-chip", default=8, show_default=True, help="Pictures.")
@click.option("--override", multiple=True, help="--config.a.b=value.")
def scaling(spec, topologies, fsdp, a_chip, override):
    """Parameters split the same way and as many pictures a chip, on more and more chips."""
    from cascade import config

    rows, loaded = [], config.load(spec, override)
    for topology in topologies.split(","):
        chips = parse(topology).chips
        sharded = changed(loaded, batch=a_chip * chips, mesh=f"data={chips // fsdp},fsdp={fsdp}")
        measured = measure(sharded, topology)
        rows.append(row(Path(spec).stem, topology, a_chip * chips, measured))
        click.echo(rows[-1])
        write("plan-scaling", rows, [], override)


def row(stage: str, topology: str, batch: int, measured) -> dict:
    """One line of a table, bytes in GB of one chip."""
    found = estimate(measured, batch, 0.4)
    line = {
        "stage": stage,
        "topology": topology,
        "mesh": "×".join(str(size) for size in measured.mesh.values()),
        "batch": batch,
        "peak GB": measured.peak_bytes / 1e9,
        "of GB": found.capacity / 1e9,
        "compile s": measured.compile_seconds,
        "host GB": measured.host_bytes / 1e9,
    }
    if measured.sent is None:
        return line
    sent = sum(size for size, _ in measured.sent.values())
    return line | {
        "sent GB": sent / 1e9,
        "× ideal": sent / measured.ideal_bytes,
        **{kind: size / 1e9 for kind, (size, _) in measured.sent.items()},
        **{f"{name} ms": 1e3 * seconds for name, seconds in found.bounds.items()},
        "images/s at 40 %": found.images_per_second,
    }


def largest_batch(config, topology: str, measured, tries: int) -> dict:
    """How large a batch fits, in whole pictures a chip: the largest known to, the least not to.

    Memory grows about evenly with the batch, so each one tried lies on the line through the two
    that come nearest to the chip's memory; no more is tried where one more picture doesn't fit.
    """
    shares = measured.mesh["data"] * measured.mesh["fsdp"]
    room = estimate(measured, 1, 0.4).capacity - MACHINE_CODE
    own = config.train.batch_size // shares
    tried = {0: measured.peak_bytes - measured.temporary_bytes, own: measured.peak_bytes}
    fitting, refused = own, None
    for _ in range(tries):
        if refused == fitting + 1:
            break
        (a, at_a), (b, at_b) = sorted(tried.items(), key=lambda one: abs(one[1] - room))[:2]
        guess = max(int(a + (room - at_a) * (b - a) / (at_b - at_a)), fitting + 1)
        guess = guess if refused is None else min(guess, refused - 1)
        found = measure(changed(config, batch=guess * shares), topology)
        tried[guess] = found.peak_bytes
        if estimate(found, 1, 0.4).fits:
            fitting = guess
        else:
            refused = guess
    return {"fits": fitting * shares, "refused": refused * shares if refused else ""}


def write(name: str, rows: list[dict], flags: list[str], override):
    """The rows so far, as JSON and as a table."""
    columns = list(dict.fromkeys(key for line in rows for key in line))
    command = ["python bench/plan.py", name.removeprefix("plan-"), *flags]
    command += [f"--override {each}" for each in override]
    lines = [
        f"`{' '.join(command)}` on {os.cpu_count()} cores, {platform.machine()}",
        "",
        "| " + " | ".join(columns) + " |",
        "|---" * len(columns) + "|",
    ]
    for line in rows:
        cells = (line.get(key, "") for key in columns)
        texts = [f"{cell:,.4g}" if isinstance(cell, float) else str(cell) for cell in cells]
        lines.append("| " + " | ".join(texts) + " |")
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (RESULTS / f"{name}.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
