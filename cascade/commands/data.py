"""What comes before training: `cascade data build` and `cascade embed`."""

import click

from cascade.commands import CONFIG_COMMAND


@click.group()
def data():
    """Prepare data sets."""


@data.command("build")
@click.argument("dataset", type=click.Choice(["emoji"]))
@click.option("--out", required=True, help="Folder for the record files.")
@click.option("--variant", default="full", show_default=True, type=click.Choice(["full", "demo"]))
@click.option("--resolution", type=int, help="Side of the stored pictures. [default: variant's]")
@click.option("--scenes", type=int, help="Number of composed scenes. [default: variant's]")
@click.option("--seed", default=0, show_default=True)
def build(dataset, out, variant, resolution, scenes, seed):
    """Draw the emoji data set into ArrayRecord files; a finished one is reused.

    Example: cascade data build emoji --out data/emoji
    """
    from cascade.data.prepare import build_emoji

    build_emoji(out, variant=variant, resolution=resolution, scenes=scenes, seed=seed)


@click.command(context_settings=CONFIG_COMMAND)
@click.option("--config", "spec", required=True, help="path/to/config.py[:arg].")
@click.option("--out", required=True, help="Folder of the cache; an unfinished one is resumed.")
@click.option(
    "--dtype",
    type=click.Choice(["float16", "bfloat16", "int8"]),
    help="How states are stored. [default: the config's text_cache.dtype]",
)
@click.pass_context
def embed(ctx, spec, out, dtype):
    """Embed all captions of a config's data ahead of training. Takes overrides as train does.

    Example: cascade embed --config configs/emoji/base64.py --out data/emoji-text --dtype int8
    """
    from cascade import config
    from cascade.embed import embed as run

    loaded = config.load(spec, ctx.args)
    click.echo(run(loaded, out, dtype=dtype))


COMMANDS = (data, embed)
