"""What makes a cascade: `cascade demo`, `reproduce`, `train`, `describe` and `bundle`."""

import click

from cascade.commands import CONFIG_COMMAND
from cascade.commands.parameters import Name, process_options


@click.command()
@click.option(
    "--workdir", type=Name(), default="runs/demo", show_default=True, help="Where everything goes."
)
@click.option(
    "--minutes",
    default=15.0,
    show_default=True,
    help="Training is scaled to take about this long on two CPU cores.",
)
def demo(workdir, minutes):
    """Build emoji data, train a two-stage cascade, draw, and report.

    The data is small. A second run resumes what was interrupted and reuses what is done.

    Example: cascade demo --minutes 30
    """
    from cascade.demo import run

    run(workdir, minutes=minutes)


@click.command()
@click.argument("what", type=click.Choice(["emoji"]))
@click.option(
    "--workdir", type=Name(), default="runs/emoji", show_default=True, help="Where everything goes."
)
@click.option(
    "--recipe",
    default="",
    help="small, for a CPU; full, for an accelerator; smoke, a check of minutes. [default: small "
    "on a CPU, else full]",
)
def reproduce(what, workdir, recipe):
    """Make the emoji cascade of few steps, from nothing.

    A second run resumes what was interrupted and reuses what is done. The small recipe, that of the
    bundle in the package, takes some four and a half hours of a CPU core. The full one is sized for
    half an hour of a GPU like NVIDIA's H200, by arithmetic: it has not been run yet.

    Example: cascade reproduce emoji --workdir runs/emoji
    """
    from cascade.reproduce import run

    run(workdir, recipe)


@click.command(context_settings=CONFIG_COMMAND)
@click.option("--config", "spec", required=True, help="path/to/config.py[:arg]; :smoke is tiny.")
@click.option(
    "--workdir", type=Name(), required=True, help="The run's folder; resumes what is in it."
)
@process_options
@click.pass_context
def train(ctx, spec, workdir, **cluster):
    """Train one stage. Any setting can be changed: --config.train.steps=1000.

    A run that is resumed may change its length, learning rate, intervals, mesh and number of
    processes, but not what would make it another run: seed, stage, text, data, batch and optimiser.
    SIGTERM saves and stops it.

    Example: cascade train --config configs/emoji/base64.py --workdir runs/base
    """
    from cascade import config
    from cascade.parallel.processes import connect
    from cascade.training.train import train as run

    loaded = config.load(spec, ctx.args)
    connect(**cluster, saves_when_terminated=True)
    run(loaded, workdir)


@click.command(context_settings=CONFIG_COMMAND)
@click.option("--config", "spec", required=True, help="path/to/config.py[:arg].")
@click.option(
    "--mesh", help="data=4,fsdp=64: print what such a mesh would split, and how, instead."
)
@click.pass_context
def describe(ctx, spec, mesh):
    """Print a stage's parameters and FLOPs, level by level.

    With --mesh, how they lie on one: what is split over which axis, and what stays whole and why.
    Of a cascade's config, it prints every stage's and what they sum to. Takes overrides as train
    does; a cascade's begin with the stage: --config.sr256.stage.network.channels=64.

    Example: cascade describe --config configs/emoji/base64.py --config.stage.network.channels=64
    """
    from cascade import config
    from cascade.describe import describe as tables
    from cascade.parallel.mesh import parse_mesh
    from cascade.parallel.placement import describe_placement

    stages = config.load_stages(spec, ctx.args)
    if mesh is None:
        click.echo(tables(stages))
        return
    sizes = parse_mesh(mesh)
    for name, stage in stages.items():
        click.echo((f"{name}: " if name else "") + describe_placement(stage, sizes))


@click.command()
@click.option(
    "--stages", required=True, multiple=True, help="A run's folder, or a bundle's; base first."
)
@click.argument("more", nargs=-1, metavar="[RUN]...")
@click.option("--out", type=Name(), required=True, help="Folder of the bundle.")
@click.option(
    "--dtype",
    default="float32",
    show_default=True,
    type=click.Choice(["float32", "bfloat16"]),
    help="How weights are stored.",
)
@click.option(
    "--without-text-weights",
    is_flag=True,
    help="Leave the text encoder's weights out (T5-XXL: 9.5 GB); drawing then names them.",
)
@click.option(
    "--text-weights",
    default="",
    help="Folder or hub id of the text encoder, if the first stage is a bundle made without it.",
)
@click.option("--overwrite", is_flag=True, help="Replace a bundle that is there.")
def bundle(stages, more, out, dtype, without_text_weights, text_weights, overwrite):
    """Put trained stages into one folder, to share and to draw with.

    Of each run, its EMA weights; of each bundle, such as a student, its stages as they are. One
    --stages is enough: the runs after it are later stages.

    Example: cascade bundle --stages runs/base runs/sr256 --out my-bundle
    """
    from cascade.training.export import bundle_runs

    bundle_runs(
        [*stages, *more],
        out,
        encoder_weights=text_weights,
        dtype=dtype,
        text_weights=not without_text_weights,
        overwrite=overwrite,
    )
    click.echo(f"Wrote {out}. Draw with: cascade sample --bundle {out} --prompt '...'")


COMMANDS = (demo, reproduce, train, describe, bundle)
