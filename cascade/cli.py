"""`cascade <job>`: a thin dispatcher. Each command parses its options and calls one function.

Imports that are slow (jax and what needs it) happen inside the commands, so `--help` is instant.
"""

import functools
import logging
import os
import pathlib
import sys

import click

from cascade.errors import UserError


class Numbers(click.ParamType):
    """Comma-separated numbers, one a stage: `50,30`; one number serves every stage."""

    def __init__(self, kind: type):
        self.kind = kind
        self.name = "N[,N...]"

    def convert(self, value, param, ctx):
        """Text -> tuple of numbers, or a single number where there is no comma."""
        try:
            numbers = tuple(self.kind(part) for part in str(value).split(","))
        except ValueError:
            self.fail(f"{value!r} isn't a list of {self.kind.__name__}s such as 50,30.", param, ctx)
        return numbers if len(numbers) > 1 else numbers[0]


def one_sentence(command):
    """Turns a UserError into its sentence on stderr and exit code 2."""

    @functools.wraps(command)
    def run(*args, **kwargs):
        try:
            return command(*args, **kwargs)
        except UserError as error:
            click.echo(f"error: {error}", err=True)
            sys.exit(2)

    return run


class OneSentence(click.Group):
    """Says click's own complaints as ours: one line, exit code 2."""

    def main(self, *args, standalone_mode: bool = True, **kwargs):
        """Runs a command; see `click.Group.main`."""
        try:
            return super().main(*args, standalone_mode=False, **kwargs)
        except click.ClickException as error:
            click.echo(f"error: {' '.join(error.format_message().split())}", err=True)
            sys.exit(2)
        except (click.Abort, KeyboardInterrupt):
            click.echo("error: Interrupted; what was finished is kept.", err=True)
            sys.exit(130)


@click.group(
    cls=OneSentence,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(package_name="cascade-imagen")
def main():
    """Text-to-image cascades in JAX: build data, train, bundle, draw.

    Start with `cascade demo`: it does all of these, small, in about 15 minutes on two CPU cores.
    """
    # What was compiled once is read the next time; jax looks at this when it is imported.
    compiled = pathlib.Path.home() / ".cache" / "cascade" / "xla"
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(compiled))
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    # Orbax narrates every file it writes and traces every failure, which we say in a sentence.
    for chatty in ("absl", "asyncio"):
        logging.getLogger(chatty).setLevel(logging.CRITICAL)
    logging.getLogger("jax").setLevel(logging.WARNING)  # it names every backend it doesn't find


@main.command()
@click.option("--workdir", default="runs/demo", show_default=True, help="Where everything goes.")
@click.option(
    "--minutes",
    default=15.0,
    show_default=True,
    help="Training is scaled to take about this long on two CPU cores.",
)
@one_sentence
def demo(workdir, minutes):
    """Build a small emoji data set, train a two-stage cascade on it, draw, and write a report.

    A second run resumes what was interrupted and reuses what is done.

    Example: cascade demo --minutes 30
    """
    from cascade.demo import run

    run(workdir, minutes=minutes)


@main.group()
def data():
    """Prepare data sets."""


@data.command("build")
@click.argument("dataset", type=click.Choice(["emoji"]))
@click.option("--out", required=True, help="Folder for the record files.")
@click.option("--variant", default="full", show_default=True, type=click.Choice(["full", "demo"]))
@click.option("--resolution", type=int, help="Side of the stored pictures. [default: variant's]")
@click.option("--scenes", type=int, help="Number of composed scenes. [default: variant's]")
@click.option("--seed", default=0, show_default=True)
@one_sentence
def build(dataset, out, variant, resolution, scenes, seed):
    """Draw the emoji data set into ArrayRecord files; a finished one is reused.

    Example: cascade data build emoji --out data/emoji
    """
    from cascade.data.prepare import build_emoji

    build_emoji(out, variant=variant, resolution=resolution, scenes=scenes, seed=seed)


# `--config.train.steps=9` and its like are left for ml_collections to read.
CONFIG_COMMAND = {"ignore_unknown_options": True, "allow_extra_args": True}


@main.command(context_settings=CONFIG_COMMAND)
@click.option("--config", "spec", required=True, help="path/to/config.py[:arg]; :smoke is tiny.")
@click.option("--workdir", required=True, help="The run's folder; resumes what is in it.")
@click.pass_context
@one_sentence
def train(ctx, spec, workdir):
    """Train one stage. Any setting can be changed: --config.train.steps=1000.

    A run that is resumed may change its length, learning rate, intervals and mesh, but not what
    would make it another run: seed, stage, text, data, batch and optimiser.

    Example: cascade train --config configs/emoji/base64.py --workdir runs/base
    """
    from cascade import config
    from cascade.training.train import train as run

    run(config.load(spec, ctx.args), workdir)


@main.command(context_settings=CONFIG_COMMAND)
@click.option("--config", "spec", required=True, help="path/to/config.py[:arg].")
@click.pass_context
@one_sentence
def describe(ctx, spec):
    """Print a stage's parameters and FLOPs, level by level. Takes overrides as train does.

    Example: cascade describe --config configs/emoji/base64.py
    """
    from cascade import config
    from cascade.describe import describe as table
    from cascade.stage import Stage

    click.echo(table(Stage(config.load(spec, ctx.args).stage)))


@main.command()
@click.option("--stages", required=True, multiple=True, help="A run's folder; base first.")
@click.argument("more", nargs=-1, metavar="[RUN]...")
@click.option("--out", required=True, help="Folder of the bundle.")
@click.option(
    "--dtype",
    default="float32",
    show_default=True,
    type=click.Choice(["float32", "bfloat16"]),
    help="How weights are stored.",
)
@click.option("--overwrite", is_flag=True, help="Replace a bundle that is there.")
@one_sentence
def bundle(stages, more, out, dtype, overwrite):
    """Put trained stages (their EMA weights) together into one folder to share and to draw with.

    Example: cascade bundle --stages runs/base runs/sr256 --out my-bundle
    """
    from cascade.training.export import bundle_runs

    bundle_runs([*stages, *more], out, dtype=dtype, overwrite=overwrite)
    click.echo(f"Wrote {out}. Draw with: cascade sample --bundle {out} --prompt '...'")


def drawing_options(command):
    """The options that `sample` and `upscale` share."""
    for option in reversed(
        [
            click.option("--bundle", required=True, help="A bundle's folder."),
            click.option(
                "--steps",
                type=Numbers(int),
                help="Sampling steps: one, or (sample) one a stage. [default: the bundle's]",
            ),
            click.option(
                "--guidance",
                type=Numbers(float),
                help="Guidance weight: one, or (sample) one a stage. [default: the bundle's]",
            ),
            click.option("--negative-prompt", default="", help="What to lead away from."),
            click.option(
                "--aug-level",
                type=float,
                help="Noise on the low-resolution input, 0 to 1. [default: the bundle's]",
            ),
            click.option(
                "--sampler", help="ddim, ancestral, heun or dpmpp_2m. [default: the bundle's]"
            ),
            click.option("--seed", default=0, show_default=True),
            click.option(
                "--batch-size",
                type=int,
                help="Pictures drawn at once. [default: 1 on a CPU, else 8]",
            ),
        ]
    ):
        command = option(command)
    return command


@main.command()
@drawing_options
@click.option("--prompt", required=True, multiple=True, help="What to draw; may be repeated.")
@click.option("--num", default=4, show_default=True, help="Pictures a prompt.")
@click.option(
    "--first-index",
    default=0,
    show_default=True,
    help="Index of the first picture: 5 with --num 1 draws the sixth alone.",
)
@click.option("--size", help="HEIGHTxWIDTH of the base picture. [default: the bundle's]")
@click.option("--out", default="out", show_default=True, help="Folder for the PNG files.")
@one_sentence
def sample(bundle, prompt, num, out, **options):
    """Draw pictures from a prompt.

    Example: cascade sample --bundle my-bundle --prompt "a red apple" --steps 50,30 --guidance 5,2
    """
    from cascade.sample import sample_to_folder

    for path in sample_to_folder(bundle, list(prompt), out, num_images=num, **options):
        click.echo(path)


@main.command()
@drawing_options
@click.option("--image", required=True, help="The picture to enlarge.")
@click.option("--prompt", default="", help="What it shows.")
@click.option("--stage", default=1, show_default=True, help="Which stage enlarges; 1 is the first.")
@click.option("--out", default="upscaled.png", show_default=True, help="The PNG file to write.")
@one_sentence
def upscale(bundle, image, out, **options):
    """Enlarge a picture with a super-resolution stage.

    Example: cascade upscale --bundle my-bundle --image photo.png --prompt "a cat" --out big.png
    """
    from cascade.sample import upscale_to_file

    click.echo(upscale_to_file(bundle, image, out, **options))
