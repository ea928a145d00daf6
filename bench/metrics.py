"""Do the evaluation's numbers follow what is done to pictures?

    python bench/metrics.py --data data/emoji64     # minutes on two CPU cores
    python bench/metrics.py --data data/emoji64 --pictures 400

The data is made by `cascade data build emoji --out data/emoji64 --resolution 64 --scenes 0`. So
many of its drawings, any, are the real pictures. As many others are compared with them as they are,
and then blurred, noised, packed as JPEG, without colour, and with few of them again and again.
Retrieval is asked for the drawings themselves, spoiled, among all of them. Results go to
bench/results/metrics.md.
"""

import io
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
from PIL import Image, ImageFilter

from cascade.data.preprocess import decode
from cascade.data.sources import tfds
from cascade.evaluation import scores
from cascade.evaluation.features import efficientnet_lite0
from cascade.evaluation.retrieval import among, direction, ranks
from cascade.files import write_whole
from cascade.images import to_uint8
from cascade.parallel.mesh import all_devices

SIDE = 64
FEW = 50


def blurred(radius: float) -> Callable:
    """A Gaussian blur of that many pixels."""

    def blur(picture, rng):
        return np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(radius)))

    return blur


def noised(deviation: float) -> Callable:
    """Gaussian noise, in units of the range [-1, 1]."""
    return lambda picture, rng: to_uint8(
        picture / 127.5 - 1 + rng.normal(scale=deviation, size=picture.shape)
    )


def grey(picture, rng):
    """Without its colour."""
    return np.asarray(Image.fromarray(picture).convert("L").convert("RGB"))


def jpeg(picture, rng):
    """As a JPEG file of quality 20 keeps it."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=20)
    return np.asarray(Image.open(buffer))


SPOILED = {
    "as they are": lambda picture, rng: picture,
    "blur, 0.5 pixels": blurred(0.5),
    "blur, 1 pixel": blurred(1.0),
    "blur, 2 pixels": blurred(2.0),
    "noise, 0.05": noised(0.05),
    "noise, 0.2": noised(0.2),
    "JPEG, quality 20": jpeg,
    "grey": grey,
}


@click.command()
@click.option("--data", default="data/emoji64", show_default=True)
@click.option("--pictures", "half", default=1400, show_default=True, help="On each side.")
@click.option("--out", default="bench/results/metrics.md", show_default=True)
def main(data, half, out):
    """Writes a table of metrics by what was done to pictures."""
    sources = [
        tfds("emoji/full", data, split, "image", "captions", "{}") for split in ("train", "heldout")
    ]
    records = [source[i] for source in sources for i in range(len(source))]
    order = np.random.default_rng(0).permutation(len(records))[: 2 * half]
    records = [records[i] for i in order]
    decoded = [decode(record["image"], (255, 255, 255)) for record in records]
    if any(picture.shape != (SIDE, SIDE, 3) for picture in decoded):
        raise click.UsageError(f"The drawings aren't {SIDE}×{SIDE}; build them as the header says.")
    names = [record["captions"][0] for record in records]
    pictures = np.stack(decoded)
    extractor = efficientnet_lite0(all_devices())
    known = extractor.all_of(pictures, "real")
    reference = scores.Reference(known[:half], extractor.name)
    rows = []

    def compare(what, drawn, asked=None):
        row = {"drawn": what, "pictures": len(drawn)} | reference.compare(drawn)[0]
        if asked is not None:
            rank = ranks(direction(drawn), asked, direction(known), names)
            row |= {f"top-{k}": among(rank, k) for k in scores.BEST}
        rows.append(row)

    for what, spoil in SPOILED.items():
        rng = np.random.default_rng(1)
        drawn = known[half:]
        if what != "as they are":
            spoiled = np.stack([spoil(picture, rng) for picture in pictures[half:]])
            drawn = extractor.all_of(spoiled, what)
        compare(what, drawn, names[half:])
    compare(f"{FEW} of them, again and again", known[np.resize(np.arange(half, half + FEW), half)])
    table = scores.markdown(*scores.table(rows))
    command = f"python bench/metrics.py --data {data} --pictures {half}"
    head = f"`{command}`: drawings of {SIDE}×{SIDE}, compared with {half} others."
    write_whole(Path(out), f"{head}\n\n{table}\n")
    click.echo(table)


if __name__ == "__main__":
    main()
