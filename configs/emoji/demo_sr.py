"""`cascade demo`'s super-resolution stage, 32 → 128, trained on 64² crops.

cascade train --config configs/emoji/demo_sr.py --workdir runs/demo_sr

900 updates of 16 in 5 min 44 s on two cores of a 2.6 GHz x86-64 machine; `demo_base.py` says what
both draw.
"""

from ml_collections import ConfigDict

from cascade.configs import smoke
from cascade.configs.emoji import demo_base


def get_config(arg: str = "") -> ConfigDict:
    """The experiment; `arg` is "" (a CPU), "accelerator" (wider, longer), or "smoke"."""
    config = demo_base.get_config("accelerator" if arg == "accelerator" else "")
    stage = config.stage
    stage.resolution, stage.lowres_resolution, stage.crop_resolution = 128, 32, 64
    stage.network.update(
        channels=24,
        channel_mults=(1, 2, 4, 4),
        num_blocks=(1, 1, 2, 2),
        strides=(2, 2, 2, 2),
        middle=False,
        skip_scale=2**-0.5,
        self_attention=(False, False, False, True),
        text_attention=(False, False, False, True),
        head_channels=24,
    )
    # In so few steps the picture itself is learned sooner than the noise in it.
    stage.output, stage.weighting = "x", ConfigDict({"name": "x"})
    # Noise on the low-resolution input up to SNR 1: beyond it nothing of the input is left to use.
    stage.aug_schedule.logsnr_min = 0.0
    stage.sampling.steps, stage.sampling.guidance, stage.sampling.aug_level = 20, 1.0, 0.3
    train = config.train
    train.steps = 900
    train.batch_size = 16
    if arg == "accelerator":
        stage.network.update(channels=64, head_channels=64)
        train.steps, train.batch_size = 6_000, 64
    train.learning_rate.decay_steps = train.steps
    return config if arg == "accelerator" else smoke.variant(config, arg)
