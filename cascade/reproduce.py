"""`cascade reproduce emoji`: a distilled cascade of emoji, from nothing, by one command.

Data, two trainings, two distillations, a bundle, its evaluation. Every part is skipped where an
earlier run finished it and resumed where one was interrupted.
"""

import contextlib
import pathlib
import shlex
from collections.abc import Mapping
from typing import NamedTuple

import click
import jax

from cascade import config as configs
from cascade.bundle import PLACE
from cascade.data.prepare import build_emoji
from cascade.errors import UserError
from cascade.evaluation.evaluate import Against, score_bundles
from cascade.files import write_whole
from cascade.images import writable_folder
from cascade.training.distill import distill_cascade
from cascade.training.export import bundle_runs
from cascade.training.loop import FINISHED
from cascade.training.train import train


class Recipe(NamedTuple):
    """What a size of the emoji cascade is made of.

    Attributes:
      variant: of the emoji data set; see docs/data.md.
      stages: name -> spec of its config, base first.
      distill: spec of the config that distils them, under the same names.
      students: of each stage, in how many steps the one draws that the bundle is made of.
      pictures: how many of each split are drawn to score it.
    """

    variant: str
    stages: Mapping[str, str]
    distill: str
    students: Mapping[str, int]
    pictures: int


RECIPES = {
    "small": Recipe(
        "small",
        {"base": "configs/emoji/small_base.py", "sr": "configs/emoji/small_sr.py"},
        "configs/emoji/small_distill.py",
        {"base": 8, "sr": 4},
        200,
    ),
    "full": Recipe(
        "full",
        {"base": "configs/emoji/full_base.py", "sr": "configs/emoji/full_sr.py"},
        "configs/emoji/full_distill.py",
        {"base": 8, "sr": 4},
        2000,
    ),
    # A check of the whole way, in minutes.
    "smoke": Recipe(
        "demo",
        {"base": "configs/emoji/small_base.py:smoke", "sr": "configs/emoji/small_sr.py:smoke"},
        "configs/emoji/small_distill.py:smoke",
        {"base": 2, "sr": 1},
        16,
    ),
}


def run(workdir, recipe: str):
    """Makes everything in `workdir` that isn't there yet, and prints how to draw with it.

    It works inside of that folder, where the configs' own relative paths then lie.

    Args:
      recipe: of `RECIPES`; "" takes "full" on an accelerator, and "small" on a CPU.

    Raises:
      UserError: no such recipe, a folder that can't be written, or one begun by another recipe.
      Stopped: SIGTERM came, and all is saved.
    """
    name = recipe or ("small" if jax.default_backend() == "cpu" else "full")
    if name not in RECIPES:
        raise UserError(f"There is no recipe {name!r}; choose from {', '.join(RECIPES)}.")
    workdir = writable_folder(workdir).absolute()
    begin(workdir, name)
    with contextlib.chdir(workdir):
        make(RECIPES[name])
    words = shlex.join(["cascade", "sample", "--bundle", str(workdir / "bundle")])
    click.echo(f"Draw with it: {words} --prompt 'a red apple'")


def begin(workdir: pathlib.Path, name: str):
    """Writes down which recipe a folder is for, or checks that it is this one."""
    told = workdir / "recipe.txt"
    try:
        if not told.exists():
            write_whole(told, name)
        before = told.read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        raise UserError(
            f"{told} can't be read or written ({error}); give another --workdir."
        ) from error
    if before not in RECIPES:
        raise UserError(f"{told} names no recipe; give another --workdir.")
    if before != name:
        raise UserError(
            f"{workdir} was begun by the recipe {before!r}, not {name!r}; go on with "
            f"--recipe {before}, or give another --workdir."
        )


def make(recipe: Recipe):
    """All parts in order, in the current folder."""
    build_emoji("data/emoji", variant=recipe.variant)
    for stage, spec in recipe.stages.items():
        if not pathlib.Path(stage, FINISHED).is_file():
            click.echo(f"Training the {stage} stage.")
            train(configs.load(spec), stage)
    if not pathlib.Path("teachers", PLACE["mark"]).is_file():
        bundle_runs(list(recipe.stages), "teachers")
    if not pathlib.Path("few", FINISHED).is_file():
        click.echo("Distilling every stage.")
        lessons = configs.load_cascade([recipe.distill])
        for stage, lesson in lessons.items():
            lesson.distill.teacher = "teachers"
            lesson.distill.end_steps = recipe.students[stage]  # fewer aren't drawn with
        distill_cascade(lessons, "few")
    if not pathlib.Path("bundle", PLACE["mark"]).is_file():
        students = [f"few/{stage}/students/{steps}" for stage, steps in recipe.students.items()]
        bundle_runs(students, "bundle", dtype="bfloat16")
    *_, last = recipe.stages.values()  # whose pictures are as large as those drawn
    for split in ("train", "heldout"):
        click.echo(f"Evaluating it on the {split} split.")
        against = Against(last, f"evaluation/{split}", split, among_all=True)
        click.echo(score_bundles(against, ["bundle"], num=recipe.pictures))
