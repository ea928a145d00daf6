"""The emoji cascade in a few steps: guidance folded into both stages, then halvings down to 4.

    cascade train --config configs/emoji/base64.py --workdir runs/base
    cascade train --config configs/emoji/sr256.py --workdir runs/sr256
    cascade bundle --stages runs/base runs/sr256 --out my-bundle
    cascade distill --cascade --config configs/emoji/distill.py --workdir runs/few
    cascade sample --bundle runs/few/bundle --prompt 'a red apple' --out pictures

Sized for one modern GPU, and never run to its end: none was at hand.

One stage alone is `configs/emoji/distill.py:base` or `:sr256`, of which
`--config.distill.teacher=runs/base` names the teacher. `:smoke` shrinks both, and
`:base:smoke` one.
"""

from ml_collections import ConfigDict

from cascade.configs import distillation, smoke
from cascade.configs.emoji import base64, sr256

STAGES = {"base": base64, "sr256": sr256}


def get_config(arg: str = "") -> ConfigDict:
    """Both stages' distillations by name, or one's; `arg` as in `configs/imagen/cascade.py`."""
    name, variant, config = smoke.cascade(STAGES, arg)
    alike = {"teacher": "my-bundle", "updates": 8_000}
    distillation.of(config.base, steps=(64, 4), guidance=(1.0, 6.0), **alike)
    distillation.of(config.sr256, steps=(32, 4), guidance=(1.0, 3.0), **alike)
    for each in config.values():
        if variant == "smoke":
            distillation.shrink(each)
    return config[name] if name else config
