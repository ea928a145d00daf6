"""Memory that drawing a 1024×1024 picture takes, whole and in tiles, by the compiler's own account.

    python bench/memory_1024.py                       # one chip of a TPU v5e, which needn't be here
    python bench/memory_1024.py --topology local       # the device that is here

The full-size 256 → 1024 stage's whole sampler is compiled for one picture, as `cascade plan
--sample` does, with guidance (the network sees two pictures) and without. Nothing is run. What was
compiled once is kept, so an interrupted run goes on where it was. Results go to bench/results/.
"""

import importlib.metadata
import itertools
import json
import os
import platform
import sys
from pathlib import Path

import click
from tqdm import tqdm

from cascade import config as configs
from cascade.parallel.plan import measure
from cascade.parallel.topology import LOCAL

CONFIG = "configs/imagen/sr1024_400m.py"
PARTS = {"weights": "argument_bytes", "temporaries": "temporary_bytes", "peak": "peak_bytes"}


def compiled(topology: str, tile: int, overlap: int, guidance: float) -> dict:
    """What one picture's sampler takes: bytes of each of PARTS, None where it doesn't fit."""
    config = configs.load(CONFIG, ["--config.train.batch_size=1"])
    config.mesh = {"data": -1, "fsdp": 1, "tensor": 1}
    config.stage.sampling.update(tile=tile, tile_overlap=overlap, guidance=guidance)
    configs.check(config)
    measured = measure(config, topology, sample=True, progress=False)
    return {
        "device": measured.device_kind,
        "TFLOP": measured.flops / config.stage.sampling.steps / 1e12,
        "seconds": measured.compile_seconds,
    } | {name: getattr(measured, field) for name, field in PARTS.items()}


def markdown(report: dict) -> str:
    """The report as a table under the command that made it."""
    lines = [
        f"`{report['command']}`; "
        + ", ".join(f"{name} {version}" for name, version in report["versions"].items())
        + f". One picture of 1024×1024 by {CONFIG}, weights in float32, activations in bfloat16, "
        f"on {report['rows'][0]['device']}. Where it doesn't fit the chip, the peak is what the "
        "compiler asked for.",
        "",
        "| tile | overlap | guidance | TFLOP a step | weights (GiB) | temporaries (GiB) "
        "| peak (GiB) |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        sizes = (f"{row[name] / 2**30:.2f}" if row[name] else "-" for name in PARTS)
        lines.append(
            f"| {row['tile'] or 'whole'} | {row['overlap']} | {row['guidance']:g} "
            f"| {row['TFLOP']:.1f} | {' | '.join(sizes)} |"
        )
    return "\n".join(lines) + "\n"


@click.command(help=__doc__.replace("\n\n", "\n\n\b\n", 1))
@click.option("--topology", default="v5e-1", show_default=True, help="As of `cascade plan`.")
@click.option("--tiles", default="0,512,256", show_default=True, help="Sides; 0 is the whole.")
@click.option("--overlap", default=64, show_default=True, help="Of tiles, pixels.")
@click.option("--guidance", default="8,1", show_default=True, help="Weights to compile for.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path(__file__).parent / "results",
    help="Folder for the JSON and the table.  [default: bench/results]",
)
def main(topology: str, tiles: str, overlap: int, guidance: str, out: Path) -> None:
    settings = itertools.product(map(int, tiles.split(",")), map(float, guidance.split(",")))
    rows = []
    for tile, weight in tqdm(list(settings), unit="program"):
        row = {"tile": tile, "overlap": overlap if tile else 0, "guidance": weight}
        rows.append(row | compiled(topology, **row))
    names = ("jax", "jaxlib", *(() if topology == LOCAL else ("libtpu",)))
    report = {
        "command": " ".join(["python", "bench/memory_1024.py", *sys.argv[1:]]),
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in names},
        "rows": rows,
    }
    out.mkdir(parents=True, exist_ok=True)
    name = f"memory-1024-{topology}"
    for suffix, text in ((".json", json.dumps(report, indent=2) + "\n"), (".md", markdown(report))):
        temporary = out / f".{name}{suffix}"
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, out / (name + suffix))
    click.echo(markdown(report))


if __name__ == "__main__":
    main()
