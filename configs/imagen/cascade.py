"""Imagen's three stages together: 64×64 from text, 64 → 256, 256 → 1024.

Each stage is trained apart, so training names one:

    cascade describe --config configs/imagen/cascade.py
    cascade train --config configs/imagen/cascade.py:base --workdir runs/base
    cascade train --config configs/imagen/cascade.py:sr256 --workdir runs/sr256
    cascade train --config configs/imagen/cascade.py:sr1024 --workdir runs/sr1024
    cascade bundle --stages runs/base runs/sr256 runs/sr1024 --out imagen

`:smoke` shrinks all three, and `:sr256:smoke` gives that stage of the shrunken cascade. What is
the paper's and what is ours, each stage's own file says.
"""

from ml_collections import ConfigDict

from cascade.configs import smoke
from cascade.configs.imagen import base64_2b, sr256_600m, sr1024_400m

STAGES = {"base": base64_2b, "sr256": sr256_600m, "sr1024": sr1024_400m}


def get_config(arg: str = "") -> ConfigDict:
    """All stages' configs by name, or one's; `arg` is "", "smoke", or a name with either."""
    name, _, config = smoke.cascade(STAGES, arg)
    return config[name] if name else config
