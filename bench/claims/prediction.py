"""Does super-resolution shift colours if it predicts noise? (Ho et al. 2022, Imagen Video)

    python bench/claims/prediction.py --base runs/small_base
    python bench/claims/prediction.py --base runs/small_base --steps 600 --num 48     # on a CPU

Super-resolution stages are trained alike to predict the noise (eps), the velocity (v) or the
picture (x), each weighed as its own mean squared error, and enlarge real pictures, shrunk. A
colour's shift is the difference of a picture's mean colour to the real one's, in levels of 255: its
mean over pictures is a cast, its mean size a wandering from picture to picture.

Whatever follows changes the config: --config.data.source.data_dir=elsewhere.
"""

from pathlib import Path

import click
import numpy as np
from experiment import Judge, cascade_of, pictures, report, trained

from cascade import config as configs


@click.command(context_settings={"ignore_unknown_options": True})
@click.option("--base", required=True, type=Path, help="A run or a bundle of the base stage.")
@click.option("--config", default="configs/emoji/small_sr.py", show_default=True)
@click.option("--steps", default=5000, show_default=True, help="Of training, each.")
@click.option("--num", default=1000, show_default=True, help="Pictures of each.")
@click.option("--out", default="runs/claims/prediction", type=Path, show_default=True)
@click.argument("overrides", nargs=-1, type=click.UNPROCESSED)
def main(base, config, steps, num, out, overrides):
    """Trains, enlarges, compares."""
    loaded = configs.load(config, overrides)
    real = pictures(loaded, loaded.stage.resolution, num)
    judge = Judge(real)
    rows = []
    for output in ("eps", "v", "x"):
        change = {"stage__output": output, "stage__weighting": {"name": output}}
        run = trained(config, out / output, overrides, train__steps=steps, **change)
        images = cascade_of([base, run]).upscale(real.images, real.captions)  # shrunk by it
        shift = np.mean(images, (1, 2)) - np.mean(real.images, (1, 2))  # [N, 3]
        row = {"predicts": output, "pictures": len(images), "cast": np.abs(shift.mean(0)).max()}
        rows.append(row | {"shift": np.abs(shift).mean()} | judge(images, real.captions))
    report("prediction", rows, f"Super-resolution stages of {steps} steps each.")


if __name__ == "__main__":
    main()
