"""DeepFloyd IF networks of diffusers with random weights, and ours read from their files."""

import jax
import numpy as np
import pytest

from cascade.interop.deepfloyd import stage_section
from cascade.interop.folders import open_weights, read_json
from cascade.interop.if_weights import read_params
from cascade.stage import Stage

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")


def randomised(config: dict, seed: int):
    """diffusers' U-Net with random weights everywhere: no norm is idle, no output zero."""
    torch.manual_seed(seed)
    model = diffusers.UNet2DConditionModel(**config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
            else:
                parameter.normal_(mean=float(name.endswith("weight")), std=0.2)
    return model


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


def to_torch(picture: np.ndarray):
    """[B, H, W, C] as torch's [B, C, H, W]."""
    return torch.from_numpy(np.ascontiguousarray(picture.transpose(0, 3, 1, 2)))
