"""The 64 → 256 stage above `full_base.py`, trained on 128² crops.

cascade train --config configs/emoji/full_sr.py --workdir runs/full_sr

Of smaller crops the loader can't make as many as such a network can learn from on a GPU. It has
never been trained to its end, since no GPU was at hand.
"""

from ml_collections import ConfigDict

from cascade.configs import smoke
from cascade.configs.emoji import full_base, small_sr


def get_config(arg: str = "") -> ConfigDict:
    """The experiment; `arg` is "" or "smoke"."""
    config = small_sr.get_config()
    full_base.on_both_styles(config)
    config.stage.crop_resolution, config.train.batch_size = 128, 64
    config.stage.network.update(
        patch=2, channels=48, channel_mults=(1, 2, 3), head_channels=48, norm_groups=8
    )
    train = config.train
    train.steps = train.learning_rate.decay_steps = 5_000
    return smoke.variant(config, arg)
