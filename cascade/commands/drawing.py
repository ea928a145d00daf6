"""What draws pictures: `cascade sample` and `cascade upscale`."""

import click

from cascade.commands.parameters import Name, Numbers, process_options


def shipped():
    """The bundle that comes with the package; asked for where it's needed, for it imports jax."""
    from cascade.bundle import SHIPPED

    return SHIPPED


def drawing_options(command):
    """The options that `sample` and `upscale` share."""
    for option in reversed(
        [
            click.option(
                "--bundle",
                default=shipped,
                show_default="the one that comes with the package",
                help="A bundle's folder.",
            ),
            click.option(
                "--text-weights",
                default="",
                help="Folder or hub id of the text encoder, if the bundle was made without it.",
            ),
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
                "--sampler",
                help="ddim, heun, dpmpp_2m, addim, or by chance: ancestral, dpmpp_2m_sde, "
                "stochastic. docs/samplers.md says which is for what. [default: the bundle's]",
            ),
            click.option(
                "--spacing",
                help="Where the steps are: uniform, uniform_logsnr or karras. "
                "[default: as tune-steps found for sampler and steps, else the bundle's]",
            ),
            click.option(
                "--tile",
                type=Numbers(int),
                help="Predict larger pictures in tiles of so many pixels a side, for less memory; "
                "0: whole. One, or (sample) one a stage. [default: the bundle's]",
            ),
            click.option(
                "--tile-overlap",
                type=Numbers(int),
                help="Pixels by which tiles overlap, likewise. [default: the bundle's]",
            ),
            click.option("--seed", default=0, show_default=True),
            click.option(
                "--batch-size",
                type=int,
                help="Pictures drawn at once, on all devices together; at least 1 on each. "
                "[default: up to 8; on a CPU up to 4, beyond 256 pixels a side 1]",
            ),
            click.option(
                "--mesh",
                help="How devices share the work, like data=4,fsdp=2: pictures are split over data "
                "and fsdp, weights over fsdp and tensor. [default: pictures over all devices]",
            ),
            process_options,
        ]
    ):
        command = option(command)
    return command


def joined(mesh, coordinator, processes, process):
    """The mesh that was asked for, or None, once the other processes are there."""
    from cascade.parallel.mesh import make_mesh, parse_mesh
    from cascade.parallel.processes import connect

    sizes = None if mesh is None else parse_mesh(mesh)
    connect(coordinator, processes, process)
    return None if sizes is None else make_mesh(**sizes)


@click.command()
@drawing_options
@click.option(
    "--prompt",
    required=True,
    multiple=True,
    help='What to draw; may be repeated. "" draws without text.',
)
@click.option("--num", default=4, show_default=True, help="Pictures a prompt.")
@click.option(
    "--first-index",
    default=0,
    show_default=True,
    help="Index of the first picture: 5 with --num 1 draws the sixth alone.",
)
@click.option("--size", help="HEIGHTxWIDTH of the base picture. [default: the bundle's]")
@click.option(
    "--out", type=Name(), default="out", show_default=True, help="Folder for the PNG files."
)
def sample(bundle, prompt, num, out, mesh, coordinator, processes, process, **options):
    """Draw pictures from a prompt.

    Several processes, each started with the same command, draw together and each write a part of
    the pictures; docs/drawing_at_scale.md says how.

    Example: cascade sample --prompt "a red apple" --num 4 --out out

    With a bundle of your own: cascade sample --bundle my-bundle --prompt "a red apple" --steps
    50,30 --guidance 5,2
    """
    options["mesh"] = joined(mesh, coordinator, processes, process)
    from cascade.sample import sample_to_folder

    for path in sample_to_folder(bundle, list(prompt), out, num_images=num, **options):
        click.echo(path)


@click.command()
@drawing_options
@click.option("--image", required=True, help="The picture to enlarge.")
@click.option("--prompt", default="", help="What it shows.")
@click.option("--stage", default=1, show_default=True, help="Which stage enlarges; 1 is the first.")
@click.option(
    "--out", type=Name(), default="upscaled.png", show_default=True, help="The PNG file to write."
)
def upscale(bundle, image, out, mesh, coordinator, processes, process, **options):
    """Enlarge a picture with a super-resolution stage.

    Example: cascade upscale --image photo.png --prompt "a cat" --out big.png
    """
    options["mesh"] = joined(mesh, coordinator, processes, process)
    from cascade.parallel.roll import is_first
    from cascade.sample import upscale_to_file

    written = upscale_to_file(bundle, image, out, **options)
    if is_first():
        click.echo(written)


COMMANDS = (sample, upscale)
