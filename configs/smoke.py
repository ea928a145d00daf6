"""`:smoke`: any experiment, shrunk to seconds on a CPU, with every kind of block still in it."""

import math
from collections.abc import Iterable, Mapping
from itertools import pairwise
from types import ModuleType

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
    _embed_with_minilm(config)
    data = config.data
    data.source = {
        "name": "synthetic",
        "records": 64,
        "side": config.stage.resolution,
        "captions": 8,
        "seed": 0,
    }
    data.eval_source = data.source
    data.filter.min_side = 1
    data.workers = 0
    data.cache_decoded = False
    train = config.train
    train.steps, train.batch_size, train.microbatches = 4, 8, 1
    train.learning_rate = {"name": "constant", "peak": 1e-3, "warmup_steps": 1}
    train.log_every = train.checkpoint_every = 2
    train.eval_every = train.sample_every = 4
    train.eval_batches, train.sample_count = 1, 2
    config.mesh = {"data": -1, "fsdp": 1, "tensor": 1}
    return config


def cascade(stages: Mapping[str, ModuleType], arg: str) -> tuple[str, str, ConfigDict]:
    """What a cascade's config file is asked for: a stage's name or "", the variant, all stages.

    Args:
      stages: name -> its config's module, base first.
      arg: "", "smoke", or a name with either ("base:smoke").

    Raises:
      ValueError: any other arg.
    """
    name, _, variant = arg.partition(":") if arg.partition(":")[0] in stages else ("", "", arg)
    if variant not in ("", "smoke"):
        raise ValueError(
            f"this config takes one of {', '.join(stages)}, or smoke, or both in that order "
            f"(base:smoke), not {arg!r}"
        )
    config = ConfigDict({key: module.get_config(variant) for key, module in stages.items()})
    if variant == "smoke":
        chain(config[key].stage for key in stages)
    return name, variant, config


def chain(stages: Iterable[ConfigDict]):
    """Makes shrunken stages, base first, fit together: each takes what the one before now draws."""
    for before, after in pairwise(stages):
        scale = after.resolution // after.lowres_resolution
        after.lowres_resolution = before.resolution
        after.resolution = before.resolution * scale


def shrink_stage(stage: ConfigDict):
    """Narrows a stage's network, keeps its finest and coarsest level, and shrinks its pictures."""
    network = stage.network
    for field in ("num_blocks", "strides", "self_attention", "text_attention"):
        network[field] = (network[field][0], network[field][-1])
    network.channel_mults, network.num_blocks = (1, 2), (1, 1)
    network.channels, network.head_channels, network.norm_groups = 16, 8, 4
    network.text_channels = 48 if network.text_channels else 0
    network.pool_heads = 6 if network.pool_heads else 0
    network.dtype, network.remat, network.scan_blocks = "float32", "none", False
    scale = stage.resolution // stage.lowres_resolution if stage.lowres_resolution else 1
    side = max(2 * math.prod(network.strides), 4 * scale)
    stage.resolution = side
    stage.lowres_resolution = side // scale if stage.lowres_resolution else 0
    stage.crop_resolution = side if stage.crop_resolution else 0
    stage.sampling.steps = 2


def _embed_with_minilm(config: ConfigDict):
    """Takes the one text encoder whose weights come with the package."""
    if config.text.name != "minilm":
        config.stage.text_width, config.stage.text_length = 384, 48
        config.text = {"name": "minilm", "max_length": 48, "weights": ""}
