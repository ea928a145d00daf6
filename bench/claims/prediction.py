"""Does super-resolution shift colours if it predicts noise? (Ho et al. 2022, Imagen Video)

    python bench/claims/prediction.py
    python bench/claims/prediction.py --config configs/emoji/demo_sr.py --steps 2000 --num 64  # CPU

Super-resolution stages are trained alike to predict the noise (eps), the velocity (v) or the
picture (x), each weighed as its own mean squared error, and enlarge real pictures, shrunk. A
colour's shift is the difference of a picture's mean colour to the real one's, in levels of 255: its
mean over pictures is a cast, its mean size a wandering from picture to picture.

The second takes the demo's drawings (`cascade data build emoji --variant demo --out data/emoji`).

Whatever follows changes the config: --config.seed=1.
"""

import numpy as np
from experiment import Judge, cascade_of, command, pictures, report, trained

from cascade import config as configs
from cascade.errors import UserError


@command("configs/emoji/small_sr.py", 5000, base=False, out="runs/claims/prediction")
def main(config, steps, num, name, out, overrides):
    """Trains, enlarges, compares."""
    loaded = configs.load(config, overrides)
    if loaded.stage.lowres_resolution == 0:
        raise UserError(f"{config} is of a base stage; give one of super-resolution.")
    real = pictures(loaded, loaded.stage.resolution, num)
    judge = Judge(real)
    rows = []
    for output in ("eps", "v", "x"):
        change = {"stage__output": output, "stage__weighting": {"name": output}}
        run = trained(config, out / output, overrides, train__steps=steps, **change)
        images = cascade_of([run]).upscale(real.images, real.captions, 0, seed=loaded.seed)
        shift = np.mean(images, (1, 2)) - np.mean(real.images, (1, 2))  # [N, 3]
        row = {"predicts": output, "pictures": len(images), "cast": np.abs(shift.mean(0)).max()}
        rows.append(row | {"shift": np.abs(shift).mean()} | judge(images, real.captions))
    report(name, rows, f"Super-resolution stages of {steps} steps each.")


if __name__ == "__main__":
    main()
