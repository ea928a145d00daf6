"""The 64 → 256 stage above `base64.py`: an Efficient U-Net trained on 128² crops.

cascade train --config configs/emoji/sr256.py --workdir runs/sr256

Sized for one modern GPU, and never trained to its end: none was at hand.
"""

from ml_collections import ConfigDict

from cascade.configs import smoke
from cascade.configs.emoji import base64


def get_config(arg: str = "") -> ConfigDict:
    """The experiment; `arg` is "" or "smoke"."""
    config = base64.get_config()
    stage = config.stage
    stage.resolution, stage.lowres_resolution, stage.crop_resolution = 256, 64, 128
    stage.network.update(
        channels=32,
        channel_mults=(1, 2, 4, 8),
        num_blocks=(1, 2, 3, 3),
        strides=(2, 2, 2, 2),
        resampling="shuffle",
        entry_skips=False,
        skip_scale=2**-0.5,
        middle=False,
        self_attention=(False, False, False, True),
        text_attention=(False, False, False, True),
        attention_per_block=False,
        head_channels=32,
        norm_groups=8,
    )
    stage.sampling.steps = 30
    stage.sampling.guidance = 1.5
    train = config.train
    train.steps, train.batch_size = 40_000, 128
    train.learning_rate.peak = 4e-4
    return smoke.variant(config, arg)
