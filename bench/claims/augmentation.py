"""Does noise on a super-resolution stage's input help a cascade? (Saharia et al. 2022)

    python bench/claims/augmentation.py --base runs/small_base
    python bench/claims/augmentation.py --base runs/small_base --steps 1500 --num 64 \\
      --config.stage.sampling.steps=10                                              # on a CPU

Two super-resolution stages are trained alike, one with noise conditioning augmentation and one on
clean input. Both enlarge real pictures, shrunk, and what the base stage drew for the same captions,
at several levels of noise (the clean one knows none), and all is compared with the real pictures.
The paper finds the augmented one better on drawn input, and little noise best at sampling.

Whatever follows changes the config: --config.seed=1.
"""

import itertools

from experiment import Judge, cascade_of, check_side, command, pictures, report, trained

from cascade import config as configs

CLEAN = {"name": "cosine", "logsnr_min": 19.9, "logsnr_max": 20.0}
LEVELS = (0.0, 0.1, 0.2, 0.3, 0.5)


@command("configs/emoji/small_sr.py", 5000, out="runs/claims/augmentation")
def main(base, config, steps, num, name, out, overrides):
    """Trains, draws, compares."""
    loaded = configs.load(config, overrides)
    drawing = cascade_of([base])
    check_side(drawing, loaded.stage.lowres_resolution)
    real = pictures(loaded, loaded.stage.resolution, num)
    inputs = {"real": real.images}  # which `upscale` shrinks as training did
    inputs["drawn"] = drawing(real.captions, seed=loaded.seed)
    changes = {"with": {}, "without": {"stage__aug_schedule": CLEAN}}
    runs = {
        way: trained(config, out / way, overrides, train__steps=steps, **change)
        for way, change in changes.items()
    }
    judge = Judge(real)
    rows = []
    for (way, run), (kind, lowres) in itertools.product(runs.items(), inputs.items()):
        pipe = cascade_of([base, run])
        for level in LEVELS if way == "with" else LEVELS[:1]:
            images = pipe.upscale(lowres, real.captions, aug_level=level, seed=loaded.seed)
            row = {"augmentation": way, "input": kind, "level": level, "pictures": len(images)}
            rows.append(row | judge(images, real.captions))
    report(name, rows, f"Super-resolution stages of {steps} steps each.")


if __name__ == "__main__":
    main()
