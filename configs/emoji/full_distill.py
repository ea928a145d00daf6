"""The full emoji cascade in a few steps: guidance folded in, then halvings 32 → 8 and 16 → 4.

    cascade train --config configs/emoji/full_base.py --workdir runs/full_base
    cascade train --config configs/emoji/full_sr.py --workdir runs/full_sr
    cascade bundle --stages runs/full_base runs/full_sr --out full-bundle
    cascade distill --cascade --config configs/emoji/full_distill.py --workdir runs/full_few

`cascade reproduce emoji --recipe full` is these and what follows in one command. It has never been
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
    alike = {"teacher": "full-bundle", "updates": 1_000, "peak": 2e-4}
    distillation.of(config.base, steps=(32, 8), guidance=(1.0, 4.0), **alike)
    distillation.of(config.sr, steps=(16, 4), guidance=(1.0, 2.0), **alike)
    for each in config.values():
        each.stage.weighting = {"name": "x"}  # as their teachers were trained
        if variant == "smoke":
            distillation.shrink(each)
    return config[name] if name else config
