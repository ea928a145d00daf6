"""What diffusers computed, kept in files, is what we compute: parity without torch.

tests/golden/make_if.py made the files.
"""

from pathlib import Path

import numpy as np
import pytest
from if_steps import IF, ddpm_steps
from safetensors.numpy import load_file
from tiny_if import GOLDEN, inputs, output, read_stage

from cascade.interop import if_scheduler

FOLDER = Path(__file__).parents[1] / "golden" / "if"


@pytest.mark.parametrize("name", GOLDEN)
def test_unet(name):
    stage, params = read_stage(FOLDER / name)
    ours = output(stage, params, inputs(stage))
    theirs = load_file(FOLDER / name / "expected.safetensors")["output"]
    assert np.abs(ours - theirs).max() < 1e-4 * np.abs(theirs).max()


def test_ddpm_steps():
    ours = ddpm_steps(if_scheduler.read("config", IF, True), True, 10)
    theirs = load_file(FOLDER / "ddpm_10_steps.safetensors")["z"]
    np.testing.assert_allclose(ours, theirs, atol=5e-5)
