"""What finds noise levels: `cascade tune-steps`."""

import click


@click.command("tune-steps")
@click.option("--bundle", required=True, help="A bundle's folder.")
@click.option("--prompt", required=True, multiple=True, help="What to draw; repeat it, varied.")
@click.option("--stage", default=0, show_default=True, help="Which stage; 0 is the base.")
@click.option("--steps", type=int, help="Steps to find levels for. [default: the bundle's]")
@click.option(
    "--sampler", help="ddim, heun, dpmpp_2m or addim, to find them for. [default: the bundle's]"
)
@click.option(
    "--pictures", default=16, show_default=True, help="To search on; as many more to judge by."
)
@click.option(
    "--reference-steps", default=128, show_default=True, help="Of Heun's method, the reference."
)
@click.option("--rounds", default=12, show_default=True, help="Rounds of the search, at most.")
@click.option("--seed", default=0, show_default=True)
@click.option("--batch-size", type=int, help="Pictures drawn at once. [default: up to 8]")
@click.option(
    "--text-weights",
    default="",
    help="Folder or hub id of the text encoder, if the bundle was made without it.",
)
@click.option("--out", help="Folder of a new bundle. [default: written into the one that is read]")
@click.option("--overwrite", is_flag=True, help="Replace a bundle that is at --out.")
def tune_steps(bundle, prompt, **options):
    """Search the noise levels that are best for a few steps.

    Pictures are drawn once in many steps, and levels are searched at which few steps come near to
    them. They are kept in the bundle, and `cascade sample` uses them wherever sampler and number
    of steps are the same. Run again, it goes on from what it found.

    Example: cascade tune-steps --bundle my-bundle --sampler dpmpp_2m --steps 8 --prompt "a red
    apple" --prompt "a blue car"
    """
    from cascade.tune_steps import tune_steps

    found = tune_steps(bundle, list(prompt), **options)
    click.echo(
        f"{found.steps} steps of {found.sampler}, over noises that weren't searched on, are "
        f"{found.before:.5f} from the reference at the levels before and {found.after:.5f} at "
        "those found."
    )
    click.echo("logsnr " + ", ".join(f"{level:.3f}" for level in found.levels))
    place = options["out"] or bundle
    click.echo(
        f"They are in {place}; draw with --sampler {found.sampler} --steps {found.steps}."
        if found.stored
        else "They are no better, so nothing was written; try more --pictures or --rounds."
    )


COMMANDS = (tune_steps,)
