"""A 64×64 base stage on emoji drawings and composed scenes: every setting stated.

Sized for some hours of one modern GPU (2.6 EFLOP), and never trained to its end: none was at hand.
`configs/emoji/sr256.py` enlarges what it draws; `full_base.py` is for minutes.

    cascade data build emoji --out data/emoji
    cascade train --config configs/emoji/base64.py --workdir runs/base
"""

from ml_collections import ConfigDict

from cascade.configs import smoke


def emoji(variant: str, split: str) -> dict:
    """A split of what `cascade data build emoji --out data/emoji` makes, as a source."""
    return {
        "name": "tfds",
        "dataset": f"emoji/{variant}",
        "data_dir": "data/emoji",
        "image_key": "image",
        "caption_key": "captions",
        "template": "{}",
        "split": split,
    }


def get_config(arg: str = "") -> ConfigDict:
    """The experiment; `arg` is "" or "smoke" (seconds on a CPU, on synthetic data)."""
    config = ConfigDict()
    config.seed = 0

    config.stage = {
        "resolution": 64,
        "channels": 3,
        "lowres_resolution": 0,  # 0: draws from text alone
        "crop_resolution": 0,  # 0: trains on whole pictures
        "text_width": 384,
        "text_length": 48,
        "network": {
            "name": "unet",
            "patch": 1,  # pixels a side folded into channels before the network; 1 folds none
            "channels": 128,
            "channel_mults": (1, 2, 2, 3),
            "num_blocks": (2, 2, 2, 2),
            "strides": (1, 2, 2, 2),
            "resampling": "block",
            "skips": "block",
            "entry_skips": True,
            "skip_scale": 1.0,
            "residual_scale": 1.0,
            "middle": True,
            "middle_attention": (True, True),
            "self_attention": (False, False, True, True),
            "text_attention": (False, False, True, True),
            "attention_per_block": True,
            "head_channels": 64,
            "attention_implementation": "auto",
            "text_channels": 0,
            "text_norm": "layer",
            "pool_heads": 6,
            "pool_projected": True,
            "noise_embedding": "logsnr",
            "embed_aug": True,
            "embed_guidance": False,  # students of guided distillation do
            "embedding_channels": 0,  # 0: 4 times the finest level's
            "embedding_activations": ("silu",),
            "norm_groups": 32,
            "activation": "silu",
            "dropout": 0.0,
            "dtype": "bfloat16",
            "remat": "none",
            "scan_blocks": False,
        },
        "schedule": {"name": "cosine", "logsnr_min": -20.0, "logsnr_max": 20.0},
        "output": "v",
        "learned_variance": False,
        "weighting": {"name": "v"},
        "text_drop": 0.1,
        "distilled": {"steps": 0, "guidance": ()},  # 0: not a student of few steps
        # Read by super-resolution stages alone: the noise put on their low-resolution input.
        "lowres_upsampling": "after_noise",
        "aug_schedule": {"name": "cosine", "logsnr_min": -20.0, "logsnr_max": 20.0},
        "sampling": {
            "sampler": {"name": "ddim"},
            "spacing": {"name": "uniform"},
            "steps": 50,
            "guidance": 3.0,
            "guidance_schedule": {"name": "constant"},
            "searched": (),  # (sampler, levels) pairs, as `cascade tune-steps` finds them
            "rescale": 0.0,
            # Dynamic thresholding divides by what it clips at, which greys these white grounds.
            "threshold": {"name": "static"},
            "aug_level": 0.1,
            "tile": 0,  # 0: the whole picture goes through the network at once
            "tile_overlap": 0,
        },
    }

    config.text = {"name": "minilm", "max_length": 48, "weights": ""}
    config.text_cache = {"folder": "data/text_cache", "dtype": "float16"}

    config.data = {
        "source": emoji("full", "train"),
        "eval_source": emoji("full", "heldout"),
        "filter": {"min_side": 1, "max_aspect": 4.0},  # pictures outside it are left out
        "ground": "#ffffff",  # what shows through transparent pictures
        "crop": "centre",
        "buckets": (),  # (height, width) of long pictures, for a stage that trains on crops
        "mirror": 0.0,  # chance of a training picture to be turned left for right
        "workers": 0,
        "max_broken_rate": 0.01,
        "cache_decoded": True,
    }

    config.train = {
        "steps": 60_000,
        "batch_size": 256,
        "microbatches": 1,
        "optimizer": {"name": "adam", "b1": 0.9, "b2": 0.99, "eps": 1e-8},
        "learning_rate": {"name": "constant", "peak": 3e-4, "warmup_steps": 500},
        "clip_norm": 1.0,
        "ema_decay": 0.9995,
        "log_every": 100,
        "eval_every": 2_000,
        "eval_batches": 4,
        "sample_every": 5_000,
        "sample_count": 8,
        "checkpoint_every": 2_000,
        "keep_last": 2,
        "keep_every": 0,
    }

    config.mesh = {"data": -1, "fsdp": 1, "tensor": 1}
    config.sharding_rules = ()
    return smoke.variant(config, arg)
