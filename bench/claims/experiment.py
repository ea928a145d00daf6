"""What the claims have in common: variants of a config, trained; pictures of its source; scores."""

import itertools
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from cascade import config as configs
from cascade.bundle import TrainedStage
from cascade.data.loader import make_source
from cascade.data.preprocess import Preprocess, colour
from cascade.evaluation import scores
from cascade.evaluation.features import efficientnet_lite0
from cascade.evaluation.retrieval import among, direction, ranks
from cascade.files import write_whole
from cascade.parallel.mesh import all_devices
from cascade.pipeline import Cascade
from cascade.registry import build
from cascade.stage import Stage
from cascade.text.encoders import ENCODERS
from cascade.training.export import read_trained
from cascade.training.train import train

RESULTS = Path(__file__).parents[1] / "results"


class Pictures(NamedTuple):
    """Pictures uint8 [N, S, S, 3], and what each shows."""

    images: np.ndarray
    captions: list[str]


def pictures(config, side: int, count: int) -> Pictures:
    """So many of a config's training pictures, any, with their plainest captions."""
    source = make_source(config.data, train=True)
    order = np.random.default_rng(0).permutation(len(source))[:count]
    shrink = Preprocess(side, colour(config.data.ground), **config.data.filter)
    records = [source[int(i)] for i in order]
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
    train(config, workdir)
    return workdir


def cascade_of(folders: Sequence[Path], **sampling: Any) -> Cascade:
    """Stages of runs and bundles, base first, as one cascade.

    Args:
      sampling: changes of every stage's sampling section.
    """
    read = [read_trained(folder) for folder in folders]
    encoder = build("text encoder", ENCODERS, read[0].text)
    stages = []
    for stage, *weights in itertools.chain.from_iterable(each.stages for each in read):
        section = configs.to_json(stage.config)
        section["sampling"] |= sampling
        null = tuple(stage.null_cond.values())
        stages.append(TrainedStage(Stage(configs.from_json(section), null), *weights))
    return Cascade(stages, read[0].text, encoder)


class Judge:
    """Compares pictures with real ones, by EfficientNet-Lite0's features."""

    def __init__(self, real: Pictures):
        self.extractor = efficientnet_lite0(all_devices())
        self.known = self.extractor.all_of(real.images, "real")
        self.names = real.captions
        self.reference = scores.Reference(self.known, self.extractor.name)

    def __call__(self, images: np.ndarray, prompts: Sequence[str]) -> dict[str, float | None]:
        """Distances, and the share of pictures that are nearest to the drawing that is named."""
        drawn = self.extractor.all_of(images)
        rank = ranks(direction(drawn), prompts, direction(self.known), self.names)
        found = {f"top-{k}": among(rank, k) for k in scores.BEST}
        return self.reference.compare(drawn)[0] | found


def report(name: str, rows: Sequence[Mapping[str, Any]], said: str):
    """Writes bench/results/claims-<name>.md and .json (command, summary, rows), and prints them."""
    command = f"`python {shlex.join([f'bench/claims/{Path(sys.argv[0]).name}', *sys.argv[1:]])}`"
    table = scores.markdown(*scores.table(rows))
    write_whole(RESULTS / f"claims-{name}.md", f"{command}\n\n{said}\n\n{table}\n")
    write_whole(RESULTS / f"claims-{name}.json", json.dumps(rows, indent=1))
    print(f"{said}\n\n{table}")
