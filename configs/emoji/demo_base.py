"""`cascade demo`'s base stage: 64 drawings at 32×32, memorised in minutes on two CPU cores.

cascade data build emoji --variant demo --out data/emoji
cascade train --config configs/emoji/demo_base.py --workdir runs/demo_base

1,200 updates of 32 in 7 min 55 s on two cores of a 2.6 GHz x86-64 machine; with `demo_sr.py` all 64
captions draw what is nearest, by pixels, to the drawing that they name (README,
"From nothing to a picture").
"""

from ml_collections import ConfigDict

from cascade.configs import smoke
from cascade.configs.emoji import base64


def get_config(arg: str = "") -> ConfigDict:
    """The experiment; `arg` is "" (a CPU), "accelerator" (wider, longer), or "smoke"."""
    config = base64.get_config()
    config.text.max_length = config.stage.text_length = 32
    config.data.source = base64.emoji("demo", "train")
    config.data.eval_source = base64.emoji("demo", "heldout")

    stage = config.stage
    stage.resolution = 32
    stage.network.update(
        channels=32,
        channel_mults=(1, 2, 4),
        num_blocks=(2, 2, 2),
        # The first stride folds 2×2 pixels into channels: a 32×32 picture at the cost of 16×16.
        strides=(2, 2, 2),
        resampling="shuffle",
        entry_skips=False,
        self_attention=(False, True, True),
        text_attention=(False, True, True),
        attention_per_block=False,
        head_channels=16,
        norm_groups=8,
        dtype="float32",
    )
    stage.sampling.steps = 30

    train = config.train
    train.steps, train.batch_size = 1_200, 32
    train.learning_rate = {
        "name": "cosine",
        "peak": 1.5e-3,
        "warmup_steps": 50,
        "decay_steps": 1_200,
        "end": 5e-5,
    }
    train.ema_decay = 0.99
    train.log_every, train.checkpoint_every = 10, 300
    train.eval_every, train.eval_batches, train.sample_every = 300, 1, 0
    if arg == "accelerator":
        stage.network.update(channels=128, head_channels=64, norm_groups=32, dtype="bfloat16")
        train.steps = train.learning_rate.decay_steps = 10_000
        train.batch_size, train.learning_rate.peak = 128, 6e-4
        train.ema_decay = 0.999
        return config
    return smoke.variant(config, arg)
