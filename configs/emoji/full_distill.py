"""The full emoji cascade in a few steps: guidance folded in, then halvings 32 → 8 and 16 → 4.

    cascade train --config configs/emoji/full_base.py --workdir runs/full_base
    cascade train --config configs/emoji/full_sr.py --workdir runs/full_sr
    cascade bundle --stages runs/full_base runs/full_sr --out full-bundle
    cascade distill --cascade --config configs/emoji/full_distill.py --workdir runs/full_few

The last of four commands that `cascade reproduce emoji --recipe full` makes one; it has never been
run to its end, since no GPU was at hand. One stage alone is `configs/emoji/full_distill.py:base` or
`:sr`, and `:smoke` shrinks either.
"""

from ml_collections import ConfigDict

from cascade.configs import distillation, smoke
from cascade.configs.emoji import full_base, full_sr

STAGES = {"base": full_base, "sr": full_sr}


def get_config(arg: str = "") -> ConfigDict:
    """Both stages' distillations by name, or one's; `arg` as in `configs/imagen/cascade.py`."""
    name, variant, config = smoke.cascade(STAGES, arg)
    distillation.of(config.base, teacher="full-bundle", steps=(32, 8), guidance=(1.0, 4.0))
    distillation.of(config.sr, teacher="full-bundle", steps=(16, 4), guidance=(1.0, 2.0))
    for each in config.values():
        each.stage.weighting = {"name": "x"}  # as their teachers were trained
        each.train.steps = each.train.learning_rate.decay_steps = 1_000
        each.train.learning_rate.peak = 2e-4
        if variant == "smoke":
            distillation.shrink(each)
    return config[name] if name else config
