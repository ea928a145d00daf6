"""A 64×64 base stage that a CPU can train: 318 ideas drawn by twemoji, and scenes of them.

Squares of 4×4 pixels are folded into channels, so the network works at 16×16 and below. It predicts
the picture itself, weighing all noise alike: through so few channels it couldn't say what the noise
was, and with text that names one drawing of few, what is to be learnt is which.

    cascade data build emoji --variant small --out data/emoji
    cascade train --config configs/emoji/small_base.py --workdir runs/small_base

The teacher of the bundle that comes with the package: 20,000 updates of 16 in 3 h 31 min on one
core of two (AMD EPYC), the other one busy; training loss over the last thousand 0.0181, of held-out
scenes 0.0191. It had been trained to its end with 12,000 for steps and decay_steps first (0.0242
and 0.0194), and went on from there as below. cascade/shipped/README.md says what came of it.
"""

from ml_collections import ConfigDict

from cascade.configs import smoke
from cascade.configs.emoji import base64


def get_config(arg: str = "") -> ConfigDict:
    """The experiment; `arg` is "" or "smoke"."""
    config = base64.get_config()
    config.data.source = {
        "name": "mixture",
        "sources": {
            "singles": base64.emoji("small", "singles"),
            "scenes": base64.emoji("small", "scenes"),
        },
        "weights": {"singles": 0.7, "scenes": 0.3},
    }
    config.data.eval_source = base64.emoji("small", "heldout")
    config.data.cache_decoded = False  # a mixture's aren't

    stage = config.stage
    stage.network.update(
        patch=4,
        channels=48,
        channel_mults=(1, 2, 4),
        num_blocks=(2, 2, 2),
        strides=(1, 2, 2),
        resampling="shuffle",
        entry_skips=False,
        self_attention=(False, True, True),
        text_attention=(False, True, True),
        attention_per_block=False,
        head_channels=48,
        norm_groups=8,
        dtype="float32",
    )
    stage.output, stage.weighting = "x", ConfigDict({"name": "x"})
    stage.sampling.steps, stage.sampling.guidance = 30, 2.0

    train = config.train
    train.steps, train.batch_size = 20_000, 16
    train.learning_rate = {
        "name": "cosine",
        "peak": 1.2e-3,
        "warmup_steps": 200,
        "decay_steps": 20_000,
        "end": 2e-5,
    }
    train.ema_decay = 0.999
    train.log_every, train.checkpoint_every = 50, 500
    train.eval_every, train.eval_batches, train.sample_every = 1_000, 4, 1_000
    return smoke.variant(config, arg)
