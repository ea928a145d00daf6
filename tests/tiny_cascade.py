"""A cascade small enough to build in a test: 8×8 → 16×16, and a text encoder without weights."""

import zlib

import jax
import numpy as np
from ml_collections import ConfigDict

from cascade import config as configs
from cascade.bundle import TrainedStage
from cascade.stage import Stage
from cascade.text.interface import TextEncoder, Tokens, checked_text

TEXT = {"name": "words", "max_length": 4, "weights": ""}


class WordEncoder(TextEncoder):
    """A fixed random vector for each word; the null condition is an embedding, not zeros."""

    name, width, max_length = "words", 8, 4
    table = np.random.default_rng(0).normal(size=(1000, 8)).astype(np.float32)

    def __init__(self, fingerprint: str = "f" * 64):
        self._fingerprint = fingerprint

    @property
    def fingerprint(self):
        return self._fingerprint

    def tokenize(self, prompts):
        tokens = Tokens(
            np.zeros((len(prompts), 4), np.int32),
            np.zeros((len(prompts), 4), bool),
            np.zeros(len(prompts), bool),
        )
        for i, prompt in enumerate(prompts):
            words = [zlib.crc32(word.encode()) % 1000 for word in checked_text(prompt).split()]
            tokens.ids[i, : len(words[:4])] = words[:4]
            tokens.mask[i, : len(words[:4])] = True
            tokens.truncated[i] = len(words) > 4
        return tokens

    def embed(self, ids, mask):
        return np.where(np.asarray(mask)[..., None], self.table[ids], 0.0)

    def save_tokenizer(self, folder):
        (folder / "words.txt").write_text("crc32 of a word, mod 1000\n")
        return ["words.txt"]

    def null(self):
        return self.table[:4], np.array([True, False, False, False])


def stage_config(resolution: int, lowres: int, **changes) -> ConfigDict:
    """A complete stage section; `changes` replace its top-level keys."""
    cosine = {"name": "cosine", "logsnr_min": -20.0, "logsnr_max": 20.0}
    section = {
        "resolution": resolution,
        "channels": 3,
        "lowres_resolution": lowres,
        "crop_resolution": 0,
        "text_width": 8,
        "text_length": 4,
        "network": {
            "name": "unet",
            "patch": 1,
            "channels": 8,
            "channel_mults": (1,),
            "num_blocks": (1,),
            "strides": (2,),
            "resampling": "shuffle",
            "skips": "block",
            "entry_skips": False,
            "skip_scale": 1.0,
            "residual_scale": 1.0,
            "middle": False,
            "middle_attention": (False, False),
            "self_attention": (False,),
            "text_attention": (True,),
            "attention_per_block": False,
            "head_channels": 8,
            "attention_implementation": "xla",
            "text_channels": 0,
            "text_norm": "layer",
            "pool_heads": 2,
            "pool_projected": True,
            "noise_embedding": "logsnr",
            "embed_aug": True,
            "embed_guidance": False,
            "embedding_channels": 0,
            "embedding_activations": ("silu",),
            "norm_groups": 4,
            "activation": "silu",
            "dropout": 0.0,
            "dtype": "float32",
            "remat": "none",
            "scan_blocks": False,
        },
        "schedule": cosine,
        "output": "v",
        "learned_variance": False,
        "weighting": {"name": "v"},
        "text_drop": 0.1,
        "distilled": {"steps": 0, "guidance": ()},
        "lowres_upsampling": "after_noise",
        "aug_schedule": cosine,
        "sampling": {
            "sampler": {"name": "ancestral", "gamma": 0.3},
            "spacing": {"name": "uniform"},
            "steps": 3,
            "guidance": 2.0,
            "guidance_schedule": {"name": "constant"},
            "searched": (),
            "rescale": 0.0,
            "threshold": {"name": "dynamic", "percentile": 99.5, "cap": 1.5},
            "aug_level": 0.1,
            "tile": 0,
            "tile_overlap": 0,
        },
    }
    return ConfigDict({**section, **changes})


def trained(config: ConfigDict, steps: int = 7) -> TrainedStage:
    """A stage with random weights everywhere, so that every condition changes the picture."""
    stage = Stage(config)
    leaves, treedef = jax.tree.flatten(jax.eval_shape(stage.init, jax.random.key(0)))
    rng = np.random.default_rng(config.resolution)
    arrays = [rng.normal(size=leaf.shape, scale=0.2).astype(np.float32) for leaf in leaves]
    return TrainedStage(stage, jax.tree.unflatten(treedef, arrays), steps)


def tiny_stages() -> list[TrainedStage]:
    """A base stage of 8×8 and one that doubles it."""
    return [trained(stage_config(8, 0)), trained(stage_config(16, 8))]


def tiny_experiment() -> ConfigDict:
    """A complete config, unlocked, whose network of 8×8 pictures compiles in seconds."""
    config = configs.load("configs/emoji/base64.py:smoke")
    config.unlock()
    config.stage = stage_config(8, 0)
    config.text.max_length = config.stage.text_length
    config.train.batch_size = 16
    config.mesh = {"data": -1, "fsdp": 1, "tensor": 1}
    return config
