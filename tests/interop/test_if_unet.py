"""Our U-Net with a DeepFloyd IF network's weights is diffusers' U-Net."""

import jax
import numpy as np
import pytest
from if_torch import randomised, read_stage, to_torch, torch
from tiny_if import CASES

from cascade.diffusion.schedules import timestep_logsnrs

TIMESTEPS, NOISE_LEVELS = np.array([990, 37]), np.array([250, 0])


@pytest.mark.parametrize("name", CASES)
def test_outputs_agree(name, tmp_path):
    model = randomised(CASES[name], seed=len(name))
    model.save_pretrained(tmp_path)
    betas = "linear" if "fixed" in name else "squaredcos_cap_v2"
    stage, params = read_stage(tmp_path, betas)

    rng = np.random.default_rng(0)
    later, size = not stage.is_base, stage.config.resolution
    z_t, lowres = rng.normal(size=(2, 2, size, size, 3)).astype(np.float32)
    text_emb = rng.normal(size=(2, 7, stage.config.text_width)).astype(np.float32)
    cond = {"text_emb": text_emb, "text_mask": np.ones((2, 7), bool)}
    logsnrs = timestep_logsnrs(betas, 1000)
    if later:
        cond |= {"lowres": lowres, "aug_logsnr": logsnrs[NOISE_LEVELS]}
    ours = jax.jit(stage.network.apply)({"params": params}, z_t, logsnrs[TIMESTEPS], cond)

    with torch.no_grad():
        theirs = model(
            to_torch(np.concatenate([z_t, lowres], -1) if later else z_t),
            torch.from_numpy(TIMESTEPS),
            torch.from_numpy(text_emb),
            class_labels=torch.from_numpy(NOISE_LEVELS),
        ).sample.numpy()
    theirs = theirs.transpose(0, 2, 3, 1)
    error = np.abs(ours - theirs).max() / np.abs(theirs).max()
    print(f"{name}: {error:.1e} of the output's scale")
    assert error < 1e-4
