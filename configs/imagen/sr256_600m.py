"""Imagen's 64 → 256 stage, an Efficient U-Net, as its paper's appendices B and F.2 state it.

From the paper (Saharia et al. 2022): 128, 256, 512 and 1024 channels in 2, 4, 8 and 8 blocks, each
level strided by 2, downsampling before and upsampling after its convolutions; on the last level
attention to pixels and text in one softmax, 8 heads, after its blocks; one skip a level (figure
A.29); skip connections times 1/√2; text pooled by attention; whole 256×256 pictures; the low
resolution noised to a level drawn for each example and told to the network; the base stage's
diffusion and learning rate; Adam (0.9, 0.999, 1e-8), since Adafactor did worse here; batch 2048,
2.5M steps, 128 TPU-v4 chips; guidance 8 and no noise on the low resolution for its FID; for
pictures to look at, noise of 0.1 to 0.3 (`aug_level`).

What the paper leaves open, and our choice: which skip connections are scaled (the residual blocks',
as in the works that the paper cites for it, NVIDIA's Imagen and DeepFloyd IF; `skip_scale` would be
the other reading); how it upsamples (convolution and pixel shuffle); the width text is projected to
for attention (1024, NVIDIA's; pooled before that, as NVIDIA and IF do); clipping (1.0); the EMA's
decay (0.9999); sampler and steps (ancestral, 100). Figure A.28's attention is twice as wide inside
as ours and figure A.27's blocks have a 1×1 convolution on every shortcut, where ours have one only
where the width changes.

533M parameters (the paper says 600M), 1.58 TFLOP a training picture; docs/full_size.md compares.

    cascade train --config configs/imagen/sr256_600m.py --workdir runs/sr256
"""

from ml_collections import ConfigDict

from cascade.configs import smoke
from cascade.configs.imagen import base64_2b


def get_config(arg: str = "") -> ConfigDict:
    """The experiment; `arg` is "" or "smoke"."""
    config = base64_2b.get_config()
    stage = config.stage
    stage.resolution, stage.lowres_resolution = 256, 64
    stage.network.update(
        channels=128,
        channel_mults=(1, 2, 4, 8),
        num_blocks=(2, 4, 8, 8),
        strides=(2, 2, 2, 2),
        resampling="shuffle",
        skips="level",
        entry_skips=False,
        residual_scale=2**-0.5,
        middle=False,
        self_attention=(False, False, False, True),
        text_attention=(False, False, False, True),
        attention_per_block=False,
        head_channels=128,
        text_channels=1024,
        pool_heads=64,
        pool_projected=False,
    )
    stage.sampling.steps, stage.sampling.guidance = 100, 8.0
    config.data.filter.min_side = 256
    config.train.optimizer = ConfigDict({"name": "adam", "b1": 0.9, "b2": 0.999, "eps": 1e-8})
    config.train.clip_norm = 1.0
    config.mesh.fsdp = 1
    return smoke.variant(config, arg)
