"""CIFAR-10 in 4096, 2048, … 1 steps: what progressive distillation was first shown on.

Salimans & Ho 2022 (arxiv.org/abs/2202.00512), as their published code has it
(google-research/diffusion_distillation, config/cifar_distill.py): from 8192 steps, 50,000 updates a
halving (the paper: 100,000 for 2 steps and for 1, so 750,000 in all), batches of 128, Adam at 5e-5
annealed to 0 in a line within each halving, gradients clipped at 1, x predicted and weighed by the
truncated SNR, half of the pictures mirrored, no average and no dropout. Their students' FID:

    steps   8      4      2      1
    FID     2.57   3.00   4.51   9.12

Guidance isn't part of it. The teacher is what `configs/cifar10/base.py` trains, and differs from
theirs in what that file says.

    cascade train --config configs/cifar10/base.py --workdir runs/cifar10
    cascade distill --config configs/cifar10/distill.py --workdir runs/cifar10_few
    cascade sample --bundle runs/cifar10_few/students/4 --prompt ship --out pictures

A teacher that had less training needn't start at 8192: `--config.distill.start_steps=256`.
"""

from ml_collections import ConfigDict

from cascade.configs import distillation
from cascade.configs.cifar10 import base


def get_config(arg: str = "") -> ConfigDict:
    """The distillation; `arg` is "" or "smoke" (seconds on a CPU, on synthetic data)."""
    config = base.get_config(arg)
    distillation.of(config, teacher="runs/cifar10", steps=(8192, 1), guidance=(), peak=5e-5)
    config.train.optimizer = {"name": "adam", "b1": 0.9, "b2": 0.999, "eps": 1e-8}
    if arg == "smoke":
        distillation.shrink(config)
    return config
