"""`:smoke`: any experiment, shrunk to seconds on a CPU, with every kind of block still in it."""

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
    train.steps, train.batch_size, train.microbatches = 4, 4, 1
    train.learning_rate = {"name": "constant", "peak": 1e-3, "warmup_steps": 1}
    train.log_every = train.checkpoint_every = 2
    train.eval_every = train.sample_every = 4
    train.eval_batches, train.sample_count = 1, 2
    return config


def shrink_stage(stage: ConfigDict):
    """Narrows a stage's network and shrinks its pictures, keeping their ratios."""
    network = stage.network
    divisor = 1
    for stride in network.strides:
        divisor *= stride
    scale = stage.resolution // stage.lowres_resolution if stage.lowres_resolution else 1
    side = max(2 * divisor, 4 * scale)
    stage.resolution = side
    stage.lowres_resolution = side // scale if stage.lowres_resolution else 0
    stage.crop_resolution = side if stage.crop_resolution else 0
    network.channels, network.head_channels, network.norm_groups = 16, 8, 4
    network.num_blocks = tuple(min(blocks, 1) for blocks in network.num_blocks)
    network.dtype, network.remat = "float32", False
    stage.sampling.steps = 2
