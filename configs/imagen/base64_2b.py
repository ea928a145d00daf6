"""Imagen's 64×64 base stage of 2B parameters, as its paper's appendix F.1 states it.

From the paper (Saharia et al. 2022): the U-Net of Improved DDPM and ADM, 512 channels times 1, 2,
3, 4, three blocks a level, BigGAN resampling, scale-shift norm, attention to pixels and text in one
softmax at 32, 16 and 8 pixels with 64 channels a head, text pooled by attention into the time
embedding, layer norm on text; eps-prediction with its plain error; the cosine schedule in
continuous time; texts zeroed 10 % of the time; T5-XXL, frozen; optax's own Adafactor, 10,000 steps
of warm-up to 1e-4, then half a cosine; batch 2048, 2.5M steps, 256 TPU-v4 chips; guidance 1.35 with
dynamic thresholding at 99.5 % for its COCO FID of 7.27.

What the paper leaves open, and our choice: tokens read of a prompt (128); the width text is
projected to before attention and pooling (2048, the embedding's, as NVIDIA's Imagen has it); where
the cosine ends (0: the printed end_value is the number of steps); the EMA's decay (0.9999);
clipping (none beside Adafactor's own); sampler and steps (256 ancestral, gamma 0.3); remat, scanned
blocks and FSDP over 8 devices, which change no result. For pictures to look at rather than FID,
guide more: 5 to 10. The paper's data is not public: name your own below.

2.26B parameters, 4.65 TFLOP a training picture; docs/full_size.md compares them with what was
published.

    cascade embed --config configs/imagen/base64_2b.py --out data/text_cache
    cascade train --config configs/imagen/base64_2b.py --workdir runs/base64
"""

from ml_collections import ConfigDict

from cascade.configs import smoke


def get_config(arg: str = "") -> ConfigDict:
    """The experiment; `arg` is "" or "smoke" (seconds on a CPU, with vendored parts only)."""
    config = ConfigDict()
    config.seed = 0

    config.stage = {
        "resolution": 64,
        "channels": 3,
        "lowres_resolution": 0,  # 0: draws from text alone
        "crop_resolution": 0,  # 0: trains on whole pictures
        "text_width": 4096,
        "text_length": 128,
        "network": {
            "name": "unet",
            "patch": 1,  # pixels a side folded into channels before the network; 1 folds none
            "channels": 512,
            "channel_mults": (1, 2, 3, 4),
            "num_blocks": (3, 3, 3, 3),
            "strides": (1, 2, 2, 2),
            "resampling": "block",
            "skips": "block",
            "entry_skips": True,
            "skip_scale": 1.0,
            "residual_scale": 1.0,
            "middle": True,
            "middle_attention": (True, True),
            "self_attention": (False, True, True, True),
            "text_attention": (False, True, True, True),
            "attention_per_block": True,
            "head_channels": 64,
            "attention_implementation": "auto",
            "text_channels": 2048,
            "text_norm": "layer",
            "pool_heads": 32,
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
            "remat": "blocks",
            "scan_blocks": True,
        },
        "schedule": {"name": "cosine", "logsnr_min": -20.0, "logsnr_max": 20.0},
        "output": "eps",
        "learned_variance": False,
        "weighting": {"name": "eps"},
        "text_drop": 0.1,
        "distilled": {"steps": 0, "guidance": ()},  # 0: not a student of few steps
        # Read by super-resolution stages alone: the noise put on their low-resolution input.
        "lowres_upsampling": "after_noise",
        "aug_schedule": {"name": "cosine", "logsnr_min": -20.0, "logsnr_max": 20.0},
        "sampling": {
            "sampler": {"name": "ancestral", "gamma": 0.3},
            "spacing": {"name": "uniform"},
            "steps": 256,
            "guidance": 1.35,
            "guidance_schedule": {"name": "constant"},
            "searched": (),  # (sampler, levels) pairs, as `cascade tune-steps` finds them
            "rescale": 0.0,
            "threshold": {
                "name": "dynamic",
                "percentile": 99.5,
                "cap": 1e6,
            },  # the paper has no cap
            "aug_level": 0.0,
            "tile": 0,  # 0: the whole picture goes through the network at once
            "tile_overlap": 0,
        },
    }

    config.text = {
        "name": "t5",
        "max_length": 128,
        # A folder, or a hub id: here T5 v1.1 XXL's encoder in safetensors, which google's own
        # repository has as a pickle alone.
        "weights": "mcmonkey/google_t5-v1_1-xxl_encoderonly",
        "null": "zeros",
        "keep_padding": False,
        "lower_case": False,
        "dtype": "bfloat16",
    }
    # A folder of "" encodes inside the training step's input path instead.
    config.text_cache = {"folder": "data/text_cache", "dtype": "bfloat16"}

    pictures = {"name": "array_record", "image_key": "image", "caption_key": "captions"}
    config.data = {
        "source": {**pictures, "files": "data/pictures/train-*.array_record"},
        "eval_source": {**pictures, "files": "data/pictures/heldout-*.array_record"},
        "filter": {"min_side": 64, "max_aspect": 4.0},  # pictures outside it are left out
        "ground": "#ffffff",  # what shows through transparent pictures
        "crop": "centre",
        "buckets": (),  # (height, width) of long pictures, for a stage that trains on crops
        "mirror": 0.0,  # chance of a training picture to be turned left for right
        "workers": 16,
        "max_broken_rate": 0.01,
        "cache_decoded": False,
    }

    config.train = {
        "steps": 2_500_000,
        "batch_size": 2048,
        "microbatches": 1,
        "optimizer": {
            "name": "adafactor",
            "decay_rate": 0.8,
            "clipping_threshold": 1.0,
            "b1": 0.0,
            "parameter_scale": True,
        },
        "learning_rate": {
            "name": "cosine",
            "peak": 1e-4,
            "warmup_steps": 10_000,
            "decay_steps": 2_500_000,
            "end": 0.0,
        },
        "clip_norm": 0.0,
        "ema_decay": 0.9999,
        "log_every": 100,
        "eval_every": 10_000,
        "eval_batches": 4,
        "sample_every": 50_000,
        "sample_count": 8,
        "checkpoint_every": 5_000,
        "keep_last": 2,
        "keep_every": 100_000,
    }

    config.mesh = {"data": -1, "fsdp": 8, "tensor": 1}
    config.sharding_rules = ()
    return smoke.variant(config, arg)
