"""Our U-Net with a DeepFloyd IF network's weights is diffusers' U-Net."""

import numpy as np
import pytest
from if_torch import randomised, unet_output
from tiny_if import CASES, inputs, output, read_stage


@pytest.mark.parametrize("name", CASES)
def test_outputs_agree(name, tmp_path):
    model = randomised(CASES[name], seed=len(name))
    model.save_pretrained(tmp_path)
    stage, params = read_stage(tmp_path, "linear" if "fixed" in name else "squaredcos_cap_v2")
    given = inputs(stage)
    ours, theirs = output(stage, params, given), unet_output(model, given)
    error = np.abs(ours - theirs).max() / np.abs(theirs).max()
    print(f"{name}: {error:.1e} of the output's scale")
    assert error < 1e-4
