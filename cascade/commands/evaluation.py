"""How good pictures are: `cascade evaluate`."""

import click

from cascade.commands import CONFIG_COMMAND
from cascade.commands.drawing import joined
from cascade.commands.parameters import Name, Ways, process_options
from cascade.errors import UserError


@click.command(context_settings=CONFIG_COMMAND)
@click.option("--bundle", multiple=True, help="A bundle to draw with; may be repeated; or")
@click.option(
    "--pictures", type=Name(), multiple=True, help="a folder made elsewhere; may be repeated."
)
@click.option(
    "--source",
    type=Name(),
    required=True,
    help="Real pictures with captions: a config, path/to/config.py[:arg], a pattern of ArrayRecord "
    "files, or a folder.",
)
@click.option(
    "--split",
    default="heldout",
    show_default=True,
    type=click.Choice(["heldout", "train"]),
    help="Which of a config's two sources.",
)
@click.option(
    "--out",
    type=Name(),
    required=True,
    help="Folder of the evaluation; what is in it is gone on with.",
)
@click.option("--num", type=int, help="Pictures a setting. [default: 1000; of --pictures, all]")
@click.option("--real", type=int, help="Real pictures. [default: all of the source]")
@click.option("--guidance", type=Ways(float), help="Guidance weights to try. [default: bundle's]")
@click.option("--steps", type=Ways(int), help="Sampling steps to try. [default: the bundle's]")
@click.option("--sampler", type=Ways(str), help="Samplers to try. [default: the bundle's]")
@click.option("--aug-level", type=Ways(float), help="Noise on what is enlarged, likewise.")
@click.option(
    "--stage",
    type=int,
    help="Score this super-resolution stage alone: it enlarges the real pictures, shrunk.",
)
@click.option("--resolution", type=int, help="Side to compare at. [default: the pictures']")
@click.option(
    "--among-all",
    is_flag=True,
    help="Find the named drawing among those of both of a config's splits.",
)
@click.option(
    "--inception",
    default="",
    help="FID's weights, to measure on those too: pytorch-fid's file, one of safetensors, or "
    "'download'.",
)
@click.option(
    "--inception-resize",
    default="antialiased",
    show_default=True,
    type=click.Choice(["antialiased", "bilinear"]),
    help="As clean-fid does, or as pytorch-fid.",
)
@click.option("--seed", default=0, show_default=True)
@click.option("--batch-size", type=int, help="As in `cascade sample`; s/picture depends on it.")
@click.option("--text-weights", help="As in `cascade sample`.")
@click.option("--mesh", help="As in `cascade sample`.")
@process_options
@click.pass_context
def evaluate(ctx, bundle, pictures, mesh, coordinator, processes, process, **options):
    """Score what bundles draw against real pictures.

    Commas part settings to try, slashes the stages of one: --steps 64/30,8/4 draws twice. Measures
    Fréchet and kernel distances, precision and recall on EfficientNet-Lite0's features, whether
    pictures show what was asked for, and seconds a picture; writes metrics.json, metrics.md,
    sheet.png and report.html. docs/evaluation.md says what each number is. An evaluation that was
    stopped goes on where it was.

    Of a config, settings can be changed as train does: --config.data.eval_source.data_dir=data.

    Example: cascade evaluate --bundle my-bundle --source configs/emoji/base64.py --out eval
    --guidance 1,2,4 --steps 8,50 --num 1000
    """
    drawing = ("guidance", "steps", "sampler", "aug_level", "stage", "batch_size", "text_weights")
    given = {name: options.pop(name) for name in drawing}
    given = {name: value for name, value in given.items() if value is not None}
    num = options.pop("num")
    if bool(bundle) == bool(pictures):
        raise UserError("Give what to score: either --bundle, or --pictures; not both.")
    if pictures and given:
        option = next(iter(given)).replace("_", "-")
        raise UserError(f"--{option} says how a --bundle draws; leave it out with --pictures.")
    options["mesh"] = joined(mesh, coordinator, processes, process)
    from cascade.evaluation.evaluate import Against, score_bundles, score_folders
    from cascade.parallel.roll import is_first

    against = Against(overrides=ctx.args, **options)
    if bundle:
        if "sampler" in given:
            given["samplers"] = given.pop("sampler")
        given |= {} if num is None else {"num": num}
        table = score_bundles(against, bundle, **given)
    else:
        table = score_folders(against, pictures, num=num)
    if is_first():
        click.echo(f"{table}\nWrote {options['out']}/report.html.")


COMMANDS = (evaluate,)
