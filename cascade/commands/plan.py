"""`cascade plan`: what training or drawing would take, before it is paid for."""

import click

from cascade.commands import CONFIG_COMMAND
from cascade.errors import UserError


@click.command(context_settings=CONFIG_COMMAND)
@click.option("--config", "spec", required=True, help="path/to/config.py[:arg], one stage's.")
@click.option(
    "--topology",
    required=True,
    help="v4-, v5e-, v5p- or v6e-SIZE such as v5p-512, or local for the devices that are here.",
)
@click.option("--slices", default=1, show_default=True, help="TPU slices; 2xv5p-512 says the same.")
@click.option("--batch", type=int, help="Pictures a step, on all chips. [default: the config's]")
@click.option("--mesh", help="Axis sizes, like data=4,fsdp=64. [default: the config's]")
@click.option("--sample", is_flag=True, help="Plan the stage's sampler instead of its training.")
@click.option(
    "--machine-code",
    is_flag=True,
    help="Compile to the end, for the size of the machine code; up to ten times as long.",
)
@click.option("--search", is_flag=True, help="Vary batch, mesh and remat; print what fits best.")
@click.option("--tries", default=12, show_default=True, help="--search: compilations at most.")
@click.option(
    "--utilisation",
    default=0.4,
    show_default=True,
    help="Share of the chips' peak arithmetic that is assumed of useful work.",
)
@click.option(
    "--host-memory",
    type=float,
    help="GiB of this machine's memory that compiling may take. [default: 9/10 of what is free]",
)
@click.pass_context
def plan(
    ctx,
    spec,
    topology,
    slices,
    batch,
    mesh,
    sample,
    machine_code,
    search,
    tries,
    utilisation,
    host_memory,
):
    """Compile a stage's step for devices that needn't be here.

    Prints what it would take: memory, what chips send each other, lower bounds on time, speed and
    days. All are estimates.
    Takes overrides as train does. docs/plan.md says what each number means.

    Example: cascade plan --config configs/imagen/base64_2b.py --topology v5p-512
    """
    from cascade import config
    from cascade.parallel import plan as plans
    from cascade.parallel.estimate import report
    from cascade.parallel.search import search as search_for
    from cascade.parallel.search import table
    from cascade.parallel.topology import LOCAL, parse

    if not 0 < utilisation <= 1:
        raise UserError(f"--utilisation is {utilisation:g}; give a share above 0 and at most 1.")
    if host_memory is not None and not host_memory > 0:
        raise UserError(f"--host-memory is {host_memory:g}; give GiB above 0.")
    given = ctx.get_parameter_source("tries") == click.core.ParameterSource.COMMANDLINE
    if given and not search:
        raise UserError("--tries limits --search; give both, or neither.")
    if tries < 1:
        raise UserError(f"--tries is {tries}; give at least 1.")
    if sample and search:
        raise UserError("--search varies training; leave out --sample.")
    if topology == LOCAL and slices != 1:
        raise UserError("--slices counts a TPU topology's; leave it out with --topology local.")
    where = topology if topology == LOCAL else parse(topology, slices).name
    loaded = plans.changed(config.load(spec, ctx.args), batch=batch, mesh=mesh)
    options = {
        "machine_code": machine_code,
        "host_limit": None if host_memory is None else host_memory * 2**30,
    }
    if search:
        found = search_for(loaded, where, tries=tries, utilisation=utilisation, **options)
        click.echo(f"Training {spec} on {where}, estimates at {utilisation:.0%} utilisation:")
        click.echo(table(found))
        return
    measured = plans.measure(loaded, where, sample=sample, **options)
    text = report(
        measured,
        what=f"{'Drawing with' if sample else 'Training'} {spec}",
        where=where,
        batch=loaded.train.batch_size,
        steps=None if sample else loaded.train.steps,
        utilisation=utilisation,
    )
    click.echo(text)


COMMANDS = (plan,)
