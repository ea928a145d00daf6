"""Weights of others in, ours out: `cascade import` and `cascade export`."""

import click

from cascade.commands.parameters import Name, Numbers
from cascade.errors import UserError


@click.group("import")
def import_():
    """Make a bundle of somebody else's weights."""


@import_.command()
@click.option(
    "--source",
    "sources",
    type=Name(),
    required=True,
    multiple=True,
    help="A diffusers pipeline's folder or hub id; repeat it for stages II and III.",
)
@click.option("--out", type=Name(), required=True, help="Folder of the bundle.")
@click.option(
    "--dtype",
    default="float32",
    show_default=True,
    type=click.Choice(["float32", "bfloat16"]),
    help="How weights are stored, and what the networks and T5 compute in.",
)
@click.option("--overwrite", is_flag=True, help="Replace a bundle that is there.")
def deepfloyd(sources, out, dtype, overwrite):
    """Import DeepFloyd IF from diffusers' folders.

    Stage I alone, or I and II, or all three.

    Example: cascade import deepfloyd --source IF-I-M-v1.0 --source IF-II-M-v1.0 --out if-bundle
    """
    from cascade.interop.deepfloyd import import_deepfloyd

    import_deepfloyd(list(sources), out, dtype=dtype, overwrite=overwrite)
    click.echo(f"Wrote {out}. Draw with: cascade sample --bundle {out} --prompt '...'")


TAKES = {  # target -> options that only some targets take
    "diffusers": ("dtype", "text_weights"),
    "safetensors": ("dtype",),
    "stablehlo": (
        "stage",
        "steps",
        "sampler",
        "tile",
        "tile_overlap",
        "size",
        "prompt",
        "text_weights",
    ),
}


@click.command()
@click.option("--to", "target", required=True, type=click.Choice(list(TAKES)))
@click.option("--bundle", required=True, help="The bundle's folder.")
@click.option("--out", type=Name(), required=True, help="Folder to write.")
@click.option("--overwrite", is_flag=True, help="Replace an earlier export that is there.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16"]),
    help="diffusers, safetensors: how weights are stored. [default: float32]",
)
@click.option(
    "--text-weights",
    help="diffusers, stablehlo: folder or hub id of the text encoder, if the bundle was made "
    "without it.",
)
@click.option(
    "--stage",
    type=int,
    multiple=True,
    help="stablehlo: a stage to export, 0 the base; may be repeated. [default: all]",
)
@click.option(
    "--steps",
    type=Numbers(int),
    help="stablehlo: sampling steps: one, or one a stage. [default: the bundle's]",
)
@click.option("--sampler", help="stablehlo: as in `cascade sample`. [default: the bundle's]")
@click.option(
    "--tile",
    type=Numbers(int),
    help="stablehlo: as in `cascade sample`, one, or one a stage. [default: the bundle's]",
)
@click.option("--tile-overlap", type=Numbers(int), help="stablehlo: likewise.")
@click.option("--size", help="stablehlo: HEIGHTxWIDTH of the base picture. [default: the bundle's]")
@click.option(
    "--prompt",
    multiple=True,
    help="stablehlo: a text whose embedding is stored too; may be repeated.",
)
def export(target, bundle, out, overwrite, **options):
    """Write a bundle's stages for other programs.

    diffusers: a pipeline folder that diffusers loads. safetensors: the weights alone, named as in
    docs/parameter_names.md. stablehlo: programs that run without this package, on CPU, GPU and
    TPU, see docs/stablehlo.md.

    Example: cascade export --to stablehlo --bundle my-bundle --out exported --prompt "a red apple"
    """
    given = {name: value for name, value in options.items() if value not in (None, ())}
    for name in given:
        if name not in TAKES[target]:
            option = name.replace("_", "-")
            owners = " or ".join(owner for owner, takes in TAKES.items() if name in takes)
            raise UserError(
                f"--{option} means nothing to --to {target}; leave it out, or export --to {owners}."
            )
    if target == "stablehlo":
        from cascade.arguments import parsed_size
        from cascade.interop.stablehlo import export_stablehlo as write

        given["stages"], given["prompts"] = given.pop("stage", ()), given.pop("prompt", ())
        given["size"] = parsed_size(options["size"])
    elif target == "safetensors":
        from cascade.interop.weights import export_safetensors as write
    else:
        from cascade.interop.diffusers_folder import export_diffusers as write
    write(bundle, out, overwrite=overwrite, **given)
    click.echo(f"Wrote {out}.")


COMMANDS = (import_, export)
