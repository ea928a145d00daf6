"""What makes a cascade quick: `cascade distill`."""

import click

from cascade.commands import CONFIG_COMMAND
from cascade.commands.parameters import Name, process_options


@click.command(context_settings=CONFIG_COMMAND)
@click.option(
    "--config",
    "specs",
    required=True,
    multiple=True,
    help="path/to/config.py[:arg], with a `distill` section; :smoke is tiny. With --cascade, of a "
    "cascade, or several times, one a stage.",
)
@click.option(
    "--workdir",
    type=Name(),
    required=True,
    help="The distillation's folder; resumes what is in it.",
)
@click.option("--cascade", is_flag=True, help="Distill every stage, and write one bundle of all.")
@process_options
@click.pass_context
def distill(ctx, specs, workdir, cascade, **cluster):
    """Turn a trained stage into one that draws in a few steps.

    Halving after halving, each student learns to do in one step what took its teacher two; every
    one is kept as a bundle, WORKDIR/students/8, …/4, …. Any setting can be changed:
    --config.distill.end_steps=4. The same command goes on where it was interrupted; SIGTERM saves
    and stops it.

    Example: cascade distill --config configs/emoji/distill.py:base --workdir runs/few
    """
    from cascade import config
    from cascade.errors import UserError
    from cascade.parallel import roll
    from cascade.parallel.processes import connect
    from cascade.training import distill as job

    if cascade:
        stages = config.load_cascade(specs, ctx.args)
    elif len(specs) > 1:
        raise UserError(
            f"{len(specs)} configs were given, and one stage is distilled at a time; add --cascade "
            "to distill all of them, or give one."
        )
    else:
        stages = config.load(specs[0], ctx.args)
    connect(**cluster, saves_when_terminated=True)
    made = (job.distill_cascade if cascade else job.distill)(stages, workdir)
    if roll.is_first():
        click.echo(f"Wrote {made}.")


COMMANDS = (distill,)
