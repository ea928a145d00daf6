"""Does the package's cascade draw what is named, by words that it has read and by others?

    python bench/new_words.py                       # the bundle that comes with the package
    python bench/new_words.py --bundle runs/emoji/bundle --guidance 3,1

Drawn are the plainest captions of all single drawings in `emoji/small`, which are twemoji's; the
same in the words for openmoji's style, pairs of idea and style that it never saw; and what
`bench/claims/new_words.tsv` lists: things called by words that no caption holds ("a tomcat"),
beside the caption of the drawing that is meant ("a cat"). A picture counts as right where the
drawing that is meant is the nearest of all in a style: by EfficientNet-Lite0's features, or by the
pixels of 64×64. Twemoji's drawings themselves among openmoji's say how near the styles are.
Results go to bench/results/new-words.{md,png}.
"""

import csv
import shlex
import sys
from pathlib import Path
from typing import NamedTuple

import click
import numpy as np

from cascade.bundle import SHIPPED
from cascade.cli import OneSentence
from cascade.commands.parameters import Numbers
from cascade.data.emoji.builder import single_drawings
from cascade.data.emoji.captions import STYLE_WORDS
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


class Drawings(NamedTuple):
    """Pictures [N, S, S, 3] and what each shows."""

    images: np.ndarray
    names: list[str]

    def called(self, names: list[str]) -> "Drawings":
        """Those that show what `names` say, in their order."""
        return Drawings(self.images[[self.names.index(name) for name in names]], names)


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
    side = pipe.stages[-1].config.resolution
    styles = {style: Drawings(*single_drawings("small", side, style)) for style in STYLE_WORDS}
    names = {style: known.names for style, known in styles.items()}
    other = [f"{each}, {STYLE_WORDS['openmoji']}" for each in names["openmoji"]]
    told = [row["prompt"] for row in asked]
    images = pipe(told + names["twemoji"] + other, guidance=guidance, batch_size=batch_size)
    new, same, foreign = np.split(images, np.cumsum([len(told), len(names["twemoji"])]))
    meant = [row["caption"] for row in asked]
    asked_in_other = Drawings(foreign, names["openmoji"])
    drawn = {  # and in which style it is looked for
        "words of no caption": (Drawings(new, meant), "twemoji"),
        "captions": (Drawings(same, names["twemoji"]), "twemoji"),
        "captions in openmoji's style": (asked_in_other, "openmoji"),
        "the same, among the other's": (asked_in_other, "twemoji"),
        "none: twemoji's drawings": (styles["twemoji"].called(names["openmoji"]), "openmoji"),
    }
    seen_by = {
        "features": lambda pictures: direction(extractor.all_of(pictures, "features")),
        "pixels": pixels,
    }
    rows, each = [], [dict(row) for row in asked]
    for by, see in seen_by.items():
        real = {style: see(known.images) for style, known in styles.items()}
        for prompts, (pictures, style) in drawn.items():
            seen = see(pictures.images)
            found = ranks(seen, pictures.names, real[style], names[style])
            best = {f"top-{k}": among(found, k) for k in scores.BEST}
            row = {"prompts": prompts, "number": len(found), "among": f"{style}'s", "by": by}
            rows.append(row | best)
            if pictures.images is not new:
                continue
            near = [names[style][index] for index in nearest(seen, real[style])]
            for row, place, name_of in zip(each, found, near, strict=True):
                row |= {f"rank by {by}": int(place) + 1, f"nearest by {by}": name_of}
    tables = "\n\n".join(scores.markdown(*scores.table(part)) for part in (rows, each))
    command = shlex.join(["python", "bench/new_words.py", *sys.argv[1:]])
    write_whole(RESULTS / f"{name}.md", f"`{command}`\n\n{tables}\n")
    save_png(RESULTS / f"{name}.png", contact_sheet(all_resized(new, 64), told, cell=64))
    click.echo(tables)


if __name__ == "__main__":
    main()
