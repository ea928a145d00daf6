"""The small cascade in a few steps: guidance folded in, then halvings 64 → 1 and 32 → 1.

    cascade train --config configs/emoji/small_base.py --workdir runs/small_base
    cascade train --config configs/emoji/small_sr.py --workdir runs/small_sr
    cascade bundle --stages runs/small_base runs/small_sr --out small-bundle
    cascade distill --cascade --config configs/emoji/small_distill.py --workdir runs/small_few
    cascade bundle --stages runs/small_few/base/students/8 runs/small_few/sr/students/4 \\
        --dtype bfloat16 --out few

What the last command makes comes with the package. To those students it took 18 min for the base
stage and 17 min for the other, each on one core of two (AMD EPYC), compiling left out; to the last
ones some 33 and 31. cascade/shipped/README.md has what they draw, and
bench/results/few-steps-base.md and few-steps-sr.md what all students do.

One stage alone is `configs/emoji/small_distill.py:base` or `:sr`, and `:smoke` shrinks either.
"""

from ml_collections import ConfigDict

from cascade.configs import distillation, smoke
from cascade.configs.emoji import small_base, small_sr

STAGES = {"base": small_base, "sr": small_sr}


def get_config(arg: str = "") -> ConfigDict:
    """Both stages' distillations by name, or one's; `arg` as in `configs/imagen/cascade.py`."""
    name, variant, config = smoke.cascade(STAGES, arg)
    alike = {"teacher": "small-bundle", "updates": 300, "updates_last": 500, "peak": 3e-4}
    distillation.of(config.base, steps=(64, 1), guidance=(1.0, 4.0), **alike)
    distillation.of(config.sr, steps=(32, 1), guidance=(1.0, 2.0), **alike)
    for each in config.values():
        each.stage.weighting = {"name": "x"}  # as their teachers were trained
        if variant == "smoke":
            distillation.shrink(each)
    return config[name] if name else config
