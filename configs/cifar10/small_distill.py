"""What `configs/cifar10/small.py` trains, in 8, 4, 2 and 1 steps, in minutes of a processor core.

    cascade distill --config configs/cifar10/small_distill.py --workdir runs/cifar10_small_few

`bench/results/cifar10.md` has what came out of it. Who has longer distils from 64 steps and gives
each student more updates: `--config.distill.start_steps=64 --config.train.steps=1000
--config.train.learning_rate.decay_steps=1000 --config.distill.updates_last=2000`.
"""

from ml_collections import ConfigDict

from cascade.configs import distillation
from cascade.configs.cifar10 import small

UPDATES = 40


def get_config(arg: str = "") -> ConfigDict:
    """The distillation; `arg` is "" or "smoke" (seconds on a CPU, on synthetic data)."""
    config = small.get_config(arg)
    distillation.of(
        config,
        teacher="runs/cifar10_small",
        steps=(16, 1),
        guidance=(),
        updates=UPDATES,
        updates_last=UPDATES,
        peak=3e-4,
    )
    if arg == "smoke":
        distillation.shrink(config)
    return config
