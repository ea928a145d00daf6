"""`cascade demo`: data, two trainings, a bundle, pictures and a report, from one command.

Every part is skipped where an earlier run finished it and resumed where one was interrupted.
"""

import contextlib
import json
import pathlib
import platform
import resource
import shlex
import time

import click
import jax
import numpy as np
from ml_collections import ConfigDict

from cascade import config as configs
from cascade.data.loader import make_source
from cascade.data.prepare import build_emoji
from cascade.data.preprocess import Preprocess, colour
from cascade.errors import UserError
from cascade.evaluation.report import Drawing, StageSummary, write_report
from cascade.evaluation.retrieval import nearest
from cascade.files import write_whole
from cascade.images import contact_sheet, save_png, writable_folder
from cascade.pipeline import Cascade, load
from cascade.training import metrics
from cascade.training.export import bundle_runs
from cascade.training.train import train

STAGES = ("base", "sr")
MINUTES = 15.0  # what the configs' numbers of steps take, all parts together, on two CPU cores
SEED = 0

# No caption of the training set says any of these: the first four put its words together anew, the
# others hold a word that no caption has.
RECOMBINED = ("a purple heart", "a blue star", "a green car", "a pink butterfly")
NEW_WORDS = ("a crimson heart", "a motorcar", "a hound", "a bungalow")


def run(workdir, *, minutes: float):
    """Runs the demo in `workdir` and prints the command that draws the user's own prompt.

    Args:
      minutes: scales the numbers of training steps; 15 is what the configs say.

    Raises:
      UserError: minutes aren't positive, or the folder can't be written.
    """
    if not 0 < minutes < float("inf"):
        raise UserError(f"--minutes is {minutes}; give a positive number.")
    workdir = writable_folder(workdir)
    parts = Parts(workdir / "parts.json")
    with parts.measured("build the data"):
        build_emoji(workdir / "data", variant="demo")
    experiments = {stage: experiment(stage, workdir, minutes) for stage in STAGES}
    for stage, config in experiments.items():
        click.echo(f"Training the {stage} stage for {config.train.steps} steps.")
        with parts.measured(f"train {stage}"):
            train(config, workdir / stage)

    trained = {stage: trained_steps(workdir / stage) for stage in STAGES}
    bundle, report = workdir / "bundle", workdir / "report.html"
    if parts.notes.get("drawn at") != trained or not report.is_file():
        bundle_runs([workdir / stage for stage in STAGES], bundle, overwrite=True)
        with parts.measured("sample", anew=True):
            known, unseen, settings = draw(load(bundle), experiments["sr"])
        save_pictures(workdir / "pictures", [*known, *unseen], settings)
        write_report(
            report,
            title="A cascade trained in a few minutes",
            introduction=introduction(len(known), minutes),
            command=own_prompt(bundle),
            known=known,
            unseen=unseen,
            stages=[summary(stage, config, workdir) for stage, config in experiments.items()],
            parts=parts.rows,
            facts=machine(),
        )
        recognised = sum(drawing.recognised for drawing in known)
        parts.note("drawn at", trained)
        parts.note("recognised", f"{recognised} of {len(known)}")
    click.echo(
        f"{parts.notes['recognised']} pictures are nearest to the drawing their prompt names.\n"
        f"Report: {report}\nDraw your own: {own_prompt(bundle)}"
    )


class Parts:
    """Seconds and memory of each part, kept in a file so that a resumed demo adds to them."""

    def __init__(self, path: pathlib.Path):
        self.path = path
        self.rows, self.notes = {}, {}
        if path.exists():
            try:
                kept = json.loads(path.read_text(encoding="utf-8"))
                self.rows, self.notes = dict(kept["rows"]), dict(kept["notes"])
            except (OSError, ValueError, TypeError, KeyError) as error:
                raise UserError(
                    f"{path} is damaged ({error}); remove it, and the times begin anew, or give "
                    "another --workdir."
                ) from error

    @contextlib.contextmanager
    def measured(self, name: str, anew: bool = False):
        """Adds the time spent inside `with` (`anew`: replaces it) and the process's peak memory."""
        began = time.perf_counter()
        try:
            yield
        finally:
            before = self.rows.get(name, {"seconds": 0.0, "peak_gib": 0.0})
            seconds = time.perf_counter() - began + (0.0 if anew else before["seconds"])
            gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            self.rows[name] = {"seconds": seconds, "peak_gib": max(gib, before["peak_gib"])}
            self._write()

    def note(self, name: str, value):
        """Keeps a fact beside the parts."""
        self.notes[name] = value
        self._write()

    def _write(self):
        write_whole(self.path, json.dumps({"rows": self.rows, "notes": self.notes}))


def trained_steps(workdir: pathlib.Path) -> int:
    """The last step that a run logged."""
    return max(row["step"] for row in metrics.read(workdir / "metrics.jsonl"))


def own_prompt(bundle: pathlib.Path) -> str:
    """The command that draws the user's own prompt."""
    return f"cascade sample --bundle {shlex.quote(str(bundle))} --num 4 --prompt 'a red apple'"


def experiment(stage: str, workdir: pathlib.Path, minutes: float) -> ConfigDict:
    """A stage's config for the hardware that is here, its files below `workdir`."""
    hardware = "" if jax.default_backend() == "cpu" else ":accelerator"
    config = configs.load(f"configs/emoji/demo_{stage}.py{hardware}")
    for source in (config.data.source, config.data.eval_source):
        source.data_dir = str(workdir / "data")
    config.text_cache.folder = str(workdir / "text_cache")
    config.train.steps = max(round(config.train.steps * minutes / MINUTES), 2)
    rate = config.train.learning_rate
    rate.decay_steps = config.train.steps
    rate.warmup_steps = min(rate.warmup_steps, config.train.steps // 2)
    return config


def draw(pipe: Cascade, config) -> tuple[list[Drawing], list[Drawing], tuple]:
    """Draws every caption of the training set, and the unseen prompts, in one go.

    Returns:
      Drawings of known captions, of unseen prompts, and the settings of each stage.
    """
    source = make_source(config.data, train=True)
    side = config.stage.resolution
    shrink = Preprocess(side, colour(config.data.ground), **config.data.filter)
    records = [source[index] for index in range(len(source))]
    prompts = [record["captions"][0] for record in records]
    unseen_prompts = [*RECOMBINED, *NEW_WORDS]
    real = np.stack([shrink(record["image"]) for record in records])
    stages = pipe([*prompts, *unseen_prompts], seed=SEED, batch_size=24, return_stages=True)
    rows = list(zip(*stages, strict=True))
    hits = nearest(stages[-1][: len(real)], real) == np.arange(len(real))
    known = [
        Drawing(prompt, row, picture, bool(hit))
        for prompt, row, picture, hit in zip(prompts, rows, real, hits, strict=False)
    ]
    unseen = [
        Drawing(prompt, row) for prompt, row in zip(unseen_prompts, rows[len(real) :], strict=True)
    ]
    return known, unseen, pipe.settings()


def save_pictures(folder: pathlib.Path, drawings: list[Drawing], settings: tuple):
    """Every final picture as a PNG with what made it inside, and one sheet of all."""
    stages = json.dumps([configs.to_json(stage) for stage in settings])
    for index, drawing in enumerate(drawings):
        words = "-".join("".join(c if c.isalnum() else " " for c in drawing.prompt).split())
        metadata = {
            "prompt": drawing.prompt, "seed": str(SEED), "index": str(index), "stages": stages
        }  # fmt: skip
        save_png(folder / f"{index:02d}-{words}.png", drawing.stages[-1], metadata)
    sheet = contact_sheet(
        [drawing.stages[-1] for drawing in drawings], [drawing.prompt for drawing in drawings]
    )
    save_png(folder / "sheet.png", sheet)


def introduction(ideas: int, minutes: float) -> list[str]:
    """What the report says of itself first."""
    return [
        f"Two diffusion models were trained on {ideas} twemoji drawings with captions, one drawing "
        "an idea: a base stage that draws from a frozen language model's reading of the prompt, "
        "and a super-resolution stage that enlarges what the base stage drew. "
        f"Training was scaled to --minutes {minutes:g}.",
        "What this is: a check that data, training, checkpoints, bundling and sampling work "
        "together on your machine, with a result that one can recognise.",
        "What this isn't: a model of the world. With one drawing an idea it has memorised its "
        f"training set; prompts outside the {ideas} ideas give mixtures of what it knows, as the "
        "second grid shows.",
    ]


def summary(stage: str, config, workdir: pathlib.Path) -> StageSummary:
    """A stage's section of the report, from what its training logged."""
    rows = metrics.read(workdir / stage / "metrics.jsonl")
    rates = [row["pictures_per_second"] for row in rows if "pictures_per_second" in row]
    speed = f", {np.median(rates):.0f} pictures a second" if rates else ""
    size = config.stage.resolution
    below = f"{config.stage.lowres_resolution} → " if config.stage.lowres_resolution else ""
    steps, batch = trained_steps(workdir / stage), config.train.batch_size
    headline = f"{below}{size}×{size}; {steps} steps of {batch} pictures{speed}."
    return StageSummary(stage, headline, rows, configs.to_json(config))


def machine() -> dict[str, str]:
    """The hardware and the versions."""
    return {
        "device": f"{jax.device_count()} × {jax.devices()[0].device_kind}",
        "Python and jax": f"{platform.python_version()}, {jax.__version__}",
    }
