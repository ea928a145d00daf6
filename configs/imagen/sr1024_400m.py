"""Imagen's 256 → 1024 stage, trained on 256×256 crops, as its paper's appendix F.3 states it.

From the paper (Saharia et al. 2022): the 64 → 256 stage without attention between pixels, so that
what was trained on crops draws whole pictures; attention to text alone on the last level, 8 heads;
256×256 crops of 1024×1024 pictures, 64×64 of their low resolution; DDPM's linear schedule, 1e-4 to
0.02 over a thousand steps, in continuous time; all else as `sr256_600m.py`, its choices included.

What the paper leaves open, and our choice: guidance and steps of this stage (8, as the other's;
100); where pictures are cropped (anywhere, on the grid of the low resolution's pixels).

529M parameters: the paper says 400M, yet gives the 600M stage's layout less one attention layer's
keys and values, which are 4M. 1.57 TFLOP a training crop, 8.22 an evaluation at 1024×1024.
Drawing whole pictures needs memory that docs/full_size.md states; where it lacks, draw with
`--tile 256 --tile-overlap 64`.

    cascade train --config configs/imagen/sr1024_400m.py --workdir runs/sr1024
"""

from ml_collections import ConfigDict

from cascade.configs import smoke
from cascade.configs.imagen import sr256_600m


def get_config(arg: str = "") -> ConfigDict:
    """The experiment; `arg` is "" or "smoke"."""
    config = sr256_600m.get_config()
    stage = config.stage
    stage.resolution, stage.lowres_resolution, stage.crop_resolution = 1024, 256, 256
    stage.network.self_attention = (False, False, False, False)
    stage.schedule = ConfigDict({"name": "linear", "start": 1e-4, "growth": 10.0})
    config.data.filter.min_side = 1024
    return smoke.variant(config, arg)
