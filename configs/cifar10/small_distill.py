"""What `configs/cifar10/small.py` trains, in 8, 4, 2 and 1 steps, as quickly.

cascade distill --config configs/cifar10/small_distill.py --workdir runs/cifar10_small_few
"""

from ml_collections import ConfigDict

from cascade.configs import distillation
from cascade.configs.cifar10 import small

UPDATES = 40


def get_config(arg: str = "") -> ConfigDict:
    """The distillation; `arg` is "" or "smoke" (seconds on a CPU, on synthetic data)."""
    config = small.get_config(arg)
    distillation.of(config, teacher="runs/cifar10_small", steps=(16, 1), guidance=())
    config.train.steps = config.train.learning_rate.decay_steps = UPDATES
    config.train.learning_rate.peak = 3e-4
    config.distill.updates_last = UPDATES
    if arg == "smoke":
        distillation.shrink(config)
    return config
