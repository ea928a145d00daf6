"""What the claims have in common: variants of a config, trained; pictures of its source; scores."""

import itertools
import json
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
from tqdm import tqdm

from cascade import config as configs
from cascade.bundle import TrainedStage
from cascade.cli import OneSentence
from cascade.data.loader import make_source
from cascade.data.preprocess import Preprocess, colour
from cascade.errors import UserError
from cascade.evaluation import scores
from cascade.evaluation.features import efficientnet_lite0
from cascade.evaluation.retrieval import among, direction, pixels, ranks
from cascade.files import write_whole
from cascade.parallel.mesh import all_devices
from cascade.pipeline import Cascade
from cascade.registry import build
from cascade.stage import Stage
from cascade.text.encoders import ENCODERS
from cascade.training.export import read_trained
from cascade.training.train import train

RESULTS = Path(__file__).parents[1] / "results"


def command(config: str, steps: int, *, base: bool = True, out: str = "") -> Callable:
    """Makes a claim's `main(config, steps, num, name, overrides)` a command, its text the help.

    `base` and `out` are further arguments where they are asked for.

    Args:
      config: the one whose stage is looked at, where no other is named.
      steps: of training each stage, or, where nothing is trained, of drawing.
      base: it takes `--base`, a trained base stage.
      out: it takes `--out`, a folder for what it trains, here by default.
    """
    options = [
        click.option("--config", default=config, show_default=True, help="Of the stage looked at."),
        click.option(
            "--steps",
            default=steps,
            type=click.IntRange(min=1),
            show_default=True,
            help="Of training, each." if out else "Of drawing.",
        ),
        click.option(
            "--num",
            default=1000,
            type=click.IntRange(min=2),
            show_default=True,
            help="Pictures of each, at most.",
        ),
        click.argument("overrides", nargs=-1, type=click.UNPROCESSED),
    ]
    if base:
        said = "A run or a bundle of the base stage."
        options.insert(0, click.option("--base", required=True, type=Path, help=said))
    if out:
        said = "Folder of what is trained; again with the same one goes on."
        options.append(click.option("--out", default=out, type=Path, show_default=True, help=said))

    def decorate(main: Callable) -> click.Command:
        about = "\n\n".join(f"\b\n{part}" for part in main.__globals__["__doc__"].split("\n\n"))
        name = f"claims-{Path(main.__globals__['__file__']).stem}"
        said = "Of the results' files."
        main = click.option("--name", default=name, show_default=True, help=said)(main)
        for option in reversed(options):
            main = option(main)
        settings = {"ignore_unknown_options": True}
        return click.command(cls=OneSentence, help=about, context_settings=settings)(main)

    return decorate


class Pictures(NamedTuple):
    """Pictures uint8 [N, S, S, 3], and what each shows."""

    images: np.ndarray
    captions: list[str]


def pictures(config, side: int, count: int, scenes: bool = True) -> Pictures:
    """So many of a config's training pictures, any, or all, with their plainest captions.

    Args:
      scenes: those of several drawings too.
    """
    source = make_source(config.data, train=True)
    shrink = Preprocess(side, colour(config.data.ground), **config.data.filter)
    taken = (source[int(i)] for i in np.random.default_rng(0).permutation(len(source)))
    kept = (record for record in taken if scenes or not record.get("scene"))
    records = list(itertools.islice(kept, count))
    images = np.stack([shrink(record["image"]) for record in tqdm(records, "real pictures")])
    return Pictures(images, [record["captions"][0] for record in records])


def trained(spec: str, workdir: Path, overrides: Sequence[str], **changes: Any) -> Path:
    """Trains a variant of a config, or goes on with it; returns its folder.

    Args:
      changes: of the config, with "__" for dots: train__steps=900, stage__output="eps".
    """
    config = configs.load(spec, overrides)
    for path, value in changes.items():
        *sections, key = path.split("__")
        section = config
        for name in sections:
            section = section[name]
        section[key] = value
    rate = config.train.learning_rate
    if "decay_steps" in rate:
        rate.decay_steps = config.train.steps
    configs.check(config)
    train(config, workdir)
    return workdir


def cascade_of(folders: Sequence[Path], **sampling: Any) -> Cascade:
    """Runs' stages, and the first ones of bundles, as one cascade in this order.

    Args:
      sampling: changes of every stage's sampling section.
    """
    read = [read_trained(folder) for folder in folders]
    encoder = build("text encoder", ENCODERS, read[0].text)
    stages = []
    for stage, *weights in (each.stages[0] for each in read):
        section = configs.to_json(stage.config)
        section["sampling"] |= sampling
        null = tuple(stage.null_cond.values())
        stages.append(TrainedStage(Stage(configs.from_json(section), null), *weights))
    return Cascade(stages, read[0].text, encoder)


def check_side(pipe: Cascade, side: int):
    """Refuses a base stage that draws pictures of another size than is needed."""
    drawn = pipe.stages[0].config.resolution
    if drawn != side:
        raise UserError(f"--base draws {drawn}×{drawn}, and {side}×{side} is needed; give another.")


class Judge:
    """Compares pictures with real ones by EfficientNet-Lite0's features, and by what is nearest."""

    def __init__(self, real: Pictures):
        self.extractor = efficientnet_lite0(all_devices())
        self.names = real.captions
        features = self.extractor.all_of(real.images, "real")
        self.reference = scores.Reference(features, self.extractor.name)
        self.known = {"features": direction(features), "pixels": pixels(real.images)}

    def __call__(self, images: np.ndarray, prompts: Sequence[str]) -> dict[str, float | None]:
        """Distances, and the share of pictures that are nearest to the drawing that is named."""
        found = self.extractor.all_of(images)
        row = self.reference.compare(found)[0]
        for by, drawn in {"features": direction(found), "pixels": pixels(images)}.items():
            rank = ranks(drawn, prompts, self.known[by], self.names)
            row |= {f"top-{k}, {by}": among(rank, k) for k in scores.BEST}
        return row


def report(name: str, rows: Sequence[Mapping[str, Any]], said: str):
    """Writes bench/results/<name>.md (command, summary, table) and .json (rows); prints them."""
    command = f"`python {shlex.join([f'bench/claims/{Path(sys.argv[0]).name}', *sys.argv[1:]])}`"
    table = scores.markdown(*scores.table(rows))
    write_whole(RESULTS / f"{name}.md", f"{command}\n\n{said}\n\n{table}\n")
    write_whole(RESULTS / f"{name}.json", json.dumps(rows, indent=1))
    print(f"{said}\n\n{table}")
