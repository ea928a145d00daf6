"""`:smoke`: any experiment, shrunk to seconds on a CPU, with every kind of block still in it."""

import math

from ml_collections import ConfigDict


def variant(config: ConfigDict, arg: str) -> ConfigDict:
    """The config itself for arg "", its smoke version for "smoke".

    Raises:
      ValueError: any other arg.
    """
    if arg == "":
        return config
    if arg != "smoke":
        raise ValueError(f"this config takes the argument 'smoke', not {arg!r}")
    shrink_stage(config.stage)
    data = config.data
    data.source = {
        "name": "synthetic",
        "records": 64,
        "side": config.stage.resolution,
        "captions": 8,
        "seed": 0,
    }
    data.eval_source = data.source
    data.workers = 0
    data.cache_decoded = False
    train = config.train
    train.steps, train.batch_size, train.microbatches = 4, 8, 1
    train.learning_rate = {"name": "constant", "peak": 1e-3, "warmup_steps": 1}
    train.log_every = train.checkpoint_every = 2
    train.eval_every = train.sample_every = 4
    train.eval_batches, train.sample_count = 1, 2
    return config


def shrink_stage(stage: ConfigDict):
    """Narrows a stage's network, keeps its finest and coarsest level, and shrinks its pictures."""
    network = stage.network
    for field in ("num_blocks", "strides", "self_attention", "text_attention"):
        network[field] = (network[field][0], network[field][-1])
    network.channel_mults, network.num_blocks = (1, 2), (1, 1)
    network.channels, network.head_channels, network.norm_groups = 16, 8, 4
    network.dtype, network.remat = "float32", False
    scale = stage.resolution // stage.lowres_resolution if stage.lowres_resolution else 1
    side = max(2 * math.prod(network.strides), 4 * scale)
    stage.resolution = side
    stage.lowres_resolution = side // scale if stage.lowres_resolution else 0
    stage.crop_resolution = side if stage.crop_resolution else 0
    stage.sampling.steps = 2
