"""DeepFloyd IF narrowed: U-Net configs of diffusers that between them have every option.

Attention's group norm over text has 32 groups in diffusers, so no text is less than 32 wide.
"""

import jax
import numpy as np

from cascade.diffusion.schedules import timestep_logsnrs
from cascade.interop.deepfloyd import stage_section
from cascade.interop.folders import open_weights, read_json
from cascade.interop.if_weights import read_params
from cascade.stage import Stage

RESNET = ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D")
ATTENDS = ("SimpleCrossAttnDownBlock2D", "SimpleCrossAttnUpBlock2D")


def unet(attends: str, **changes) -> dict:
    """A stage I of levels "r" (residual blocks alone) and "a" (with attention), finest first."""
    blocks = [ATTENDS if level == "a" else RESNET for level in attends]
    return {
        "sample_size": 16,
        "in_channels": 3,
        "out_channels": 6,
        "block_out_channels": [32 * (i + 1) for i in range(len(attends))],
        "down_block_types": [down for down, _ in blocks],
        "up_block_types": [up for _, up in reversed(blocks)],
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "layers_per_block": 1,
        "act_fn": "gelu",
        "attention_head_dim": 16,
        "resnet_time_scale_shift": "scale_shift",
        "cross_attention_norm": "group_norm",
        "cross_attention_dim": 64,
        "encoder_hid_dim": 96,
        "addition_embed_type": "text",
        "addition_embed_type_num_heads": 8,
        **changes,
    }


def super_resolution(attends: str, **changes) -> dict:
    """A stage II: noise level embedded, scaled residuals, text alone attended to."""
    later = {
        "in_channels": 6,
        "class_embed_type": "timestep",
        "time_embedding_act_fn": "gelu",
        "resnet_skip_time_act": True,
        "resnet_out_scale_factor": 1 / 0.7071,
        "mid_block_scale_factor": 1 / 0.7071,
        "only_cross_attention": True,
        "time_embedding_dim": 64,
    }
    return unet(attends, **{**later, **changes})


CASES = {
    # 704 × [1, 2, 3, 4] with 3 blocks a level, narrowed to 32 ×.
    "stage I, XL's blocks": unet("raaa", layers_per_block=3),
    "stage II": super_resolution("rraa", layers_per_block=[1, 2, 1, 1], time_embedding_dim=128),
    "stage III": super_resolution(
        "rra",
        sample_size=32,
        block_out_channels=[16, 32, 64],
        norm_num_groups=16,
        layers_per_block=[1, 1, 2],
        encoder_hid_dim=None,
        addition_embed_type=None,
        class_embed_type=None,
    ),
    "SiLU, no norm of text, fixed variance": unet(
        "ra", act_fn="silu", cross_attention_norm=None, out_channels=3, sample_size=8
    ),
    "pixels attended to at some levels": unet(
        "aa",
        only_cross_attention=[True, False],
        mid_block_only_cross_attention=True,
        attention_head_dim=[32, 32],
        sample_size=8,
    ),
    "text pooled as it comes, two activations": super_resolution(
        "ra",
        encoder_hid_dim=None,
        time_embedding_act_fn="silu",
        resnet_skip_time_act=False,
        only_cross_attention=False,
        sample_size=8,
    ),
    "embedding not activated": unet(
        "ar", resnet_skip_time_act=True, attention_head_dim=32, sample_size=8
    ),
}


SMALLEST = {
    "sample_size": 8,
    "block_out_channels": [8, 16],
    "norm_num_groups": 4,
    "attention_head_dim": 8,
    "cross_attention_dim": 32,
    "encoder_hid_dim": 32,
    "time_embedding_dim": 16,
    "addition_embed_type_num_heads": 4,
}
GOLDEN = {"stage_1": unet("ra", **SMALLEST), "stage_2": super_resolution("ra", **SMALLEST)}


def read_stage(folder, betas="squaredcos_cap_v2", text_length=7) -> tuple[Stage, dict]:
    """Our stage of a folder that diffusers' U-Net was saved to, and its parameters."""
    description = read_json(folder, "config.json")
    later = description["in_channels"] == 6
    variance = "learned_range" if description["out_channels"] == 6 else "fixed_small"
    descriptions = {"unet": description, "scheduler": {"variance_type": variance}}
    if later:
        descriptions["image_noising_scheduler"] = {}
    for name in descriptions:
        if "scheduler" in name:
            descriptions[name]["beta_schedule"] = betas
    section = stage_section(
        "folder",
        descriptions,
        lowres_resolution=description["sample_size"] // 4 if later else 0,
        text_length=text_length,
        dtype="float32",
    )
    stage = Stage(section)
    template = jax.eval_shape(stage.init, jax.random.key(0))
    levels = len(section.network.channel_mults)
    params = read_params(open_weights(folder), template, levels)
    return stage, jax.tree.map(np.asarray, params)


def inputs(stage: Stage) -> dict[str, np.ndarray]:
    """What a U-Net is given: two pictures at two timesteps, and texts."""
    rng = np.random.default_rng(0)
    size, text = stage.config.resolution, (stage.config.text_length, stage.config.text_width)
    given = {
        "z_t": rng.normal(size=(2, size, size, 3)).astype(np.float32),
        "timesteps": np.array([990, 37]),
        "noise_levels": np.array([250, 0]),
        "text_emb": rng.normal(size=(2, *text)).astype(np.float32),
    }
    if not stage.is_base:
        given["lowres"] = rng.normal(size=(2, size, size, 3)).astype(np.float32)
    return given


def output(stage: Stage, params, given: dict) -> np.ndarray:
    """What our network makes of `inputs`."""
    logsnrs = timestep_logsnrs(stage.config.network.noise_embedding, 1000)
    text_emb = given["text_emb"]
    cond = {"text_emb": text_emb, "text_mask": np.ones(text_emb.shape[:2], bool)}
    if not stage.is_base:
        cond |= {"lowres": given["lowres"], "aug_logsnr": logsnrs[given["noise_levels"]]}
    apply = jax.jit(stage.network.apply)
    return np.asarray(apply({"params": params}, given["z_t"], logsnrs[given["timesteps"]], cond))
