"""Does the package's cascade draw what is named, by words that it has read and by others?

    python bench/new_words.py                       # the bundle that comes with the package
    python bench/new_words.py --bundle runs/emoji/bundle --guidance 3,1

Drawn are the plainest captions of all single drawings in `emoji/small`, and what
`bench/claims/new_words.tsv` lists: things called by words that no caption holds ("a tomcat"),
beside the caption of the drawing that is meant ("a cat"). A picture counts as right where the
drawing that is meant is the nearest of all: by EfficientNet-Lite0's features, or by the pixels of
64×64. Results go to bench/results/new-words.{md,png}.
"""

import csv
import shlex
import sys
from pathlib import Path

import click

from cascade.bundle import SHIPPED
from cascade.cli import OneSentence
from cascade.commands.parameters import Numbers
from cascade.data.emoji.builder import single_drawings
from cascade.data.preprocess import all_resized
from cascade.evaluation import scores
from cascade.evaluation.features import efficientnet_lite0
from cascade.evaluation.retrieval import among, direction, nearest, pixels, ranks
from cascade.files import write_whole
from cascade.images import contact_sheet, save_png
from cascade.parallel.mesh import all_devices
from cascade.pipeline import load

NEW_WORDS = Path(__file__).parent / "claims" / "new_words.tsv"
RESULTS = Path(__file__).parent / "results"


@click.command(cls=OneSentence)
@click.option("--bundle", default=SHIPPED, type=Path, help="[default: the package's own]")
@click.option("--guidance", type=Numbers(float), help="One a stage. [default: the bundle's]")
@click.option("--batch-size", default=8, show_default=True)
@click.option("--name", default="new-words", show_default=True, help="Of the results' files.")
def main(bundle, guidance, batch_size, name):
    """Draws, counts and writes."""
    with open(NEW_WORDS, encoding="utf-8") as file:
        asked = list(csv.DictReader(file, delimiter="\t"))
    pipe, extractor = load(bundle), efficientnet_lite0(all_devices())
    known, names = single_drawings("small", pipe.stages[-1].config.resolution)
    prompts = [row["prompt"] for row in asked] + names
    meant = [row["caption"] for row in asked] + names
    images = pipe(prompts, guidance=guidance, batch_size=batch_size)
    seen_by = {
        "features": lambda pictures: direction(extractor.all_of(pictures, "features")),
        "pixels": pixels,
    }
    rows, each = [], [dict(row) for row in asked]
    for by, see in seen_by.items():
        drawn, real = see(images), see(known)
        found = ranks(drawn, meant, real, names)
        of = {"words of no caption": found[: len(asked)], "captions": found[len(asked) :]}
        for kind, rank in of.items():
            best = {f"top-{k}": among(rank, k) for k in scores.BEST}
            rows.append({"prompts": kind, "number": len(rank), "by": by, **best})
        for row, place, near in zip(each, found, nearest(drawn, real), strict=False):
            row |= {f"rank by {by}": int(place) + 1, f"nearest by {by}": names[near]}
    tables = "\n\n".join(scores.markdown(*scores.table(part)) for part in (rows, each))
    command = shlex.join(["python", "bench/new_words.py", *sys.argv[1:]])
    write_whole(RESULTS / f"{name}.md", f"`{command}`\n\n{tables}\n")
    told = [row["prompt"] for row in asked]
    new = all_resized(images[: len(asked)], 64)
    save_png(RESULTS / f"{name}.png", contact_sheet(new, told, cell=64))
    click.echo(tables)


if __name__ == "__main__":
    main()
