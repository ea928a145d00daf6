"""A 64×64 base stage a fifth of Imagen's in size, for those with fewer chips.

The paper trains smaller base stages, from 300M parameters on, but gives no layout. This is
DeepFloyd IF-I-M's: 192 channels times 1, 2, 3, 4 with all else as Imagen's 2B, text projected to
768 for attention, and pooled before that. The layout is inferred: with 192, 320 and 704 channels it
has 0.37B, 0.94B and 4.30B parameters, and IF-I's are named 400M, 900M and 4.3B. (NVIDIA's small
base has 256 channels and 0.52B.) Everything else is `base64_2b.py`'s, from the paper or open as
its header says; parameters are few enough to be whole on every device.

0.37B parameters, 0.71 TFLOP a training picture.

    cascade train --config configs/imagen/base64_400m.py --workdir runs/base64
"""

from ml_collections import ConfigDict

from cascade.configs import smoke
from cascade.configs.imagen import base64_2b


def get_config(arg: str = "") -> ConfigDict:
    """The experiment; `arg` is "" or "smoke"."""
    config = base64_2b.get_config()
    config.stage.network.update(
        channels=192, text_channels=768, pool_heads=64, pool_projected=False
    )
    config.mesh.fsdp = 1
    return smoke.variant(config, arg)
