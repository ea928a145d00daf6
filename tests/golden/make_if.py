"""Makes tests/golden/if: what diffusers computes, for tests that run without it.

    PYTHONPATH=tests python tests/golden/make_if.py

It needs the `parity` extra. Weights are float16, so that they are small, and are those that both
sides compute with, in float32.
"""

from pathlib import Path

import diffusers
import numpy as np
import torch
from if_steps import IF
from if_torch import randomised, their_steps, unet_output
from safetensors.numpy import save_file
from tiny_if import GOLDEN, inputs, read_stage

FOLDER = Path(__file__).parent / "if"


def main():
    for name, config in GOLDEN.items():
        model = randomised(config, seed=0).half()
        model.save_pretrained(FOLDER / name)
        given = inputs(read_stage(FOLDER / name)[0])
        expected = unet_output(model.float(), given)
        save_file({"output": expected}, FOLDER / name / "expected.safetensors")
    scheduler = diffusers.DDPMScheduler(**IF)
    scheduler.set_timesteps(10)
    steps = np.stack(their_steps(scheduler, learned=True))
    save_file({"z": steps}, FOLDER / "ddpm_10_steps.safetensors")
    print(f"made with diffusers {diffusers.__version__} and torch {torch.__version__}")


if __name__ == "__main__":
    main()
