"""A 64×64 base stage that a GPU trains in minutes: all ideas by twemoji and openmoji, and scenes.

A wider `small_base.py` in bfloat16 that folds squares of 2×2 pixels. Pictures come unweighted: of
13,647, 3,647 are drawings alone, the others scenes. Sized so that the arithmetic of `cascade
reproduce emoji --recipe full` leaves half of half an hour of a GPU like NVIDIA's H200 for data,
compiling and evaluation, and that its weights stay below 60 MB; tests/test_reproduce.py counts. It
has never been trained to its end, since no GPU was at hand.

    cascade data build emoji --out data/emoji
    cascade train --config configs/emoji/full_base.py --workdir runs/full_base
"""

from ml_collections import ConfigDict

from cascade.configs import smoke
from cascade.configs.emoji import base64, small_base


def get_config(arg: str = "") -> ConfigDict:
    """The experiment; `arg` is "" or "smoke"."""
    config = small_base.get_config()
    on_both_styles(config)
    config.stage.network.update(
        patch=2, channels=64, channel_mults=(2, 3, 4), head_channels=64, norm_groups=16
    )
    train = config.train
    train.steps = train.learning_rate.decay_steps = 10_000
    return smoke.variant(config, arg)


def on_both_styles(config: ConfigDict):
    """Changes a config of the small set to the full one, and to batches for a GPU."""
    config.data.source = base64.emoji("full", "train")
    config.data.eval_source = base64.emoji("full", "heldout")
    config.data.cache_decoded = True
    config.stage.network.dtype = "bfloat16"
    train = config.train
    train.batch_size = 256
    train.learning_rate.peak, train.learning_rate.warmup_steps = 8e-4, 500
    train.eval_every = train.sample_every = 2_500
    train.checkpoint_every = 1_000
