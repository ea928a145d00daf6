"""Pictures a second a core: decode, crop and resize, ours and a PyTorch DataLoader with Pillow.

    python bench/input.py                    # a minute on two cores; the parity extra adds PyTorch
    python bench/input.py --pictures 64 --repeats 3
    python bench/input.py --train            # and the training loop's wait for its input

Both read the same JPEG files (quality 90, blotches with grain, some 2.2 bits a pixel), cut the
central square, bring it to the size that training wants by a mean over areas (Pillow's box filter
there) and hand out float32 batches in [-1, 1] of 16 pictures, through the whole loader. A picture a
second a core is one over the CPU seconds that a picture costs its process, all threads counted, so
that others' use of the machine shows less than in wall time. Each side has a process of its own;
they take turns, and each figure is the median of `--repeats` passes. Results go to bench/results/.

`--train` trains a small base stage on a synthetic source of 64×64 pictures and prints the share of
wall time that it waited for batches, as metrics.jsonl has it.
"""

import json
import multiprocessing
import multiprocessing.connection
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import click
import numpy as np
from PIL import Image

BATCH = 16
# (width, height) of the files -> side of the batches' pictures.
CASES = {
    "512² to 256²": ((512, 512), 256),
    "640×480 to 256²": ((640, 480), 256),
    "1024² to 256²": ((1024, 1024), 256),
    "2048² to 1024²": ((2048, 2048), 1024),
    "1536×1152 to 1024²": ((1536, 1152), 1024),
}


def write_pictures(folder: Path, size: tuple[int, int], count: int):
    """JPEG files with a caption each."""
    folder.mkdir()
    for i in range(count):
        rng = np.random.default_rng([i, *size])
        total = rng.normal(0, 5, (size[1], size[0], 3))  # grain
        for cells, share in ((12, 0.75), (96, 0.2)):
            coarse = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), np.uint8))
            total += share * np.asarray(coarse.resize(size, Image.Resampling.BICUBIC))
        picture = Image.fromarray(np.clip(total, 0, 255).astype(np.uint8))
        picture.save(folder / f"{i:04d}.jpg", quality=90)
        (folder / f"{i:04d}.txt").write_text("a picture")


def ours(folder: Path, side: int) -> Iterator:
    """One pass of our loader."""
    from ml_collections import ConfigDict

    from cascade.data.loader import make_loader

    section = {
        "eval_source": {"name": "folder", "path": str(folder)},
        "filter": {"min_side": 0, "max_aspect": 100.0},
        "ground": "#ffffff",
        "crop": "centre",
        "buckets": (),
        "mirror": 0.0,
        "workers": 0,
        "max_broken_rate": 0.0,
        "cache_decoded": False,
    }
    return make_loader(
        ConfigDict(section),
        resolution=side,
        lowres_resolution=0,
        crop_resolution=0,
        texts=lambda captions: {},
        seed=0,
        batch_size=BATCH,
        train=False,
    )


class Pillow:
    """A map-style data set as PyTorch's tutorials write it: a file a picture, by Pillow."""

    def __init__(self, folder: Path, side: int):
        self._paths, self._side = sorted(folder.glob("*.jpg")), side

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, i: int):
        import torch

        picture = Image.open(self._paths[i]).convert("RGB")
        width, height = picture.size
        short = min(width, height)
        left, top = (width - short) // 2, (height - short) // 2
        picture = picture.crop((left, top, left + short, top + short))
        picture = picture.resize((self._side, self._side), Image.Resampling.BOX)
        return torch.from_numpy(np.array(picture)).float() / 127.5 - 1


def pillow(folder: Path, side: int) -> Iterator:
    """One pass of a PyTorch DataLoader in its own process."""
    import torch

    torch.set_num_threads(1)
    return torch.utils.data.DataLoader(Pillow(folder, side), batch_size=BATCH)


SIDES: dict[str, Callable] = {"cascade": ours, "torch + Pillow": pillow}


def serve(name: str, pipe: multiprocessing.connection.Connection):
    """A child's life: one pass for each (folder, side) it is sent, answered by CPU seconds."""
    while job := pipe.recv():
        start = time.process_time()
        batches = sum(1 for _ in SIDES[name](*job))
        pipe.send((time.process_time() - start) / (batches * BATCH))


def measure(count: int, repeats: int) -> dict[str, dict[str, float]]:
    """Case -> side -> median pictures a CPU second."""
    spawn, pipes = multiprocessing.get_context("spawn"), {}
    for name in SIDES if find_spec("torch") else ["cascade"]:
        pipes[name], end = spawn.Pipe()
        spawn.Process(target=serve, args=(name, end), daemon=True).start()
        end.close()
    rates = {}
    with tempfile.TemporaryDirectory() as temporary:
        for case, (size, side) in CASES.items():
            folder = Path(temporary) / case
            write_pictures(folder, size, count)
            taken = {name: [] for name in pipes}
            for turn in range(repeats + 1):
                for name, pipe in pipes.items():
                    pipe.send((folder, side))
                    seconds = pipe.recv()
                    if turn:  # the first pass imports and warms up
                        taken[name].append(seconds)
            rates[case] = {name: 1 / statistics.median(times) for name, times in taken.items()}
            click.echo(f"{case}: " + ", ".join(f"{n} {r:.0f}/s" for n, r in rates[case].items()))
    for pipe in pipes.values():
        pipe.send(None)
    return rates


def input_wait(steps: int) -> list[float]:
    """Shares of wall time that training waited for input, a value for every ten steps."""
    from cascade import config as configs
    from cascade.training.train import train

    config = configs.load("configs/emoji/base64.py:smoke")
    config.stage.resolution = 64
    config.data.source.side = config.data.eval_source.side = 64
    config.train.update(steps=steps, log_every=10, eval_every=0, sample_every=0)
    config.train.checkpoint_every = 0
    with tempfile.TemporaryDirectory() as workdir:
        config.text_cache.folder = str(Path(workdir) / "texts")
        train(config, workdir, progress=False)
        lines = (Path(workdir) / "metrics.jsonl").read_text().splitlines()
    waits = [json.loads(line).get("input_wait") for line in lines]
    return [wait for wait in waits if wait is not None][1:]  # the first has the compilation


def markdown(report: dict) -> str:
    """The report as a table under what it was measured with."""
    lines = [
        f"`{report['command']}` on {report['cores']} {platform.machine()} cores (load "
        f"{report['load']:.1f} beforehand), Python {platform.python_version()}; pictures a CPU "
        "second",
        "",
        "| case | cascade | torch + Pillow | ratio |",
        "|---|---|---|---|",
    ]
    for case, rates in report["rates"].items():
        mine, theirs = rates["cascade"], rates.get("torch + Pillow")
        compared = f"{theirs:.0f} | {mine / theirs:.2f}" if theirs else "- | -"
        lines.append(f"| {case} | {mine:.0f} | {compared} |")
    if report["input_wait"]:
        median, most = statistics.median(report["input_wait"]), max(report["input_wait"])
        lines += ["", f"Training waited for input {median:.2%} of the time, at most {most:.2%}."]
    return "\n".join(lines) + "\n"


@click.command(help=__doc__.replace("\n\n", "\n\n\b\n", 1))
@click.option("--pictures", default=64, show_default=True, help="Files of each case.")
@click.option("--repeats", default=3, show_default=True, help="Timed passes.")
@click.option("--train", is_flag=True, help="Also measure the training loop's wait.")
@click.option("--steps", default=40, show_default=True, help="Of that training.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path(__file__).parent / "results",
    help="Folder for the JSON and the table.  [default: bench/results]",
)
def main(pictures: int, repeats: int, train: bool, steps: int, out: Path):
    report = {
        "command": " ".join(["python", "bench/input.py", *sys.argv[1:]]),
        "cores": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
        "rates": measure(pictures // BATCH * BATCH, repeats),
        "input_wait": input_wait(steps) if train else [],
    }
    out.mkdir(parents=True, exist_ok=True)
    for suffix, text in ((".json", json.dumps(report, indent=2) + "\n"), (".md", markdown(report))):
        temporary = out / f".input{suffix}"
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(out / f"input{suffix}")
    click.echo(markdown(report))


if __name__ == "__main__":
    main()
