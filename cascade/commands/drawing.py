"""What draws pictures: `cascade sample` and `cascade upscale`."""

import click

from cascade.commands.parameters import Numbers


def drawing_options(command):
    """The options that `sample` and `upscale` share."""
    for option in reversed(
        [
            click.option("--bundle", required=True, help="A bundle's folder."),
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
                "--sampler", help="ddim, ancestral, heun or dpmpp_2m. [default: the bundle's]"
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
                help="Pictures drawn at once. [default: 1 on a CPU, else 8]",
            ),
        ]
    ):
        command = option(command)
    return command


@click.command()
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
def sample(bundle, prompt, num, out, **options):
    """Draw pictures from a prompt.

    Example: cascade sample --bundle my-bundle --prompt "a red apple" --steps 50,30 --guidance 5,2
    """
    from cascade.sample import sample_to_folder

    for path in sample_to_folder(bundle, list(prompt), out, num_images=num, **options):
        click.echo(path)


@click.command()
@drawing_options
@click.option("--image", required=True, help="The picture to enlarge.")
@click.option("--prompt", default="", help="What it shows.")
@click.option("--stage", default=1, show_default=True, help="Which stage enlarges; 1 is the first.")
@click.option("--out", default="upscaled.png", show_default=True, help="The PNG file to write.")
def upscale(bundle, image, out, **options):
    """Enlarge a picture with a super-resolution stage.

    Example: cascade upscale --bundle my-bundle --image photo.png --prompt "a cat" --out big.png
    """
    from cascade.sample import upscale_to_file

    click.echo(upscale_to_file(bundle, image, out, **options))


COMMANDS = (sample, upscale)
