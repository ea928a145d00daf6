"""diffusers' networks with random weights, and its schedulers on our noise."""

from unittest import mock

import jax
import numpy as np
import pytest
from if_steps import SHAPE, network, start

from cascade.diffusion.process import picture_noise

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


def unet_output(model, inputs: dict) -> np.ndarray:
    """What a U-Net makes of `tiny_if.inputs`, [B, H, W, C]."""
    picture = inputs["z_t"]
    if "lowres" in inputs:
        picture = np.concatenate([picture, inputs["lowres"]], -1)
    with torch.no_grad():
        output = model(
            to_torch(picture),
            torch.from_numpy(inputs["timesteps"]),
            torch.from_numpy(inputs["text_emb"]),
            class_labels=torch.from_numpy(inputs["noise_levels"]),
        )
    return from_torch(output.sample)


def to_torch(picture: np.ndarray):
    """[B, H, W, C] as torch's [B, C, H, W]."""
    return torch.from_numpy(np.ascontiguousarray(picture.transpose(0, 3, 1, 2)))


def from_torch(picture) -> np.ndarray:
    """The inverse of `to_torch`."""
    return np.ascontiguousarray(picture.numpy().transpose(0, 2, 3, 1))


def their_steps(scheduler, learned: bool, **arguments) -> list[np.ndarray]:
    """z after each step of diffusers' scheduler, its noise taken from our keys.

    Args:
      learned: the network learned its variance.
      **arguments: of the scheduler's step.
    """
    z_1, keys = start()
    drawn = iter(range(10_000))

    def noise(shape, **_):
        step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, next(drawn))
        return to_torch(np.asarray(picture_noise(step_keys, SHAPE[1:])))

    cumulative = scheduler.alphas_cumprod.double()
    z_t, steps = to_torch(np.asarray(z_1)), []
    with mock.patch("diffusers.schedulers.scheduling_ddpm.randn_tensor", noise):
        for t in scheduler.timesteps:
            alpha = cumulative[t]
            logsnr = np.full(2, torch.log(alpha / (1 - alpha)))
            output = to_torch(network(from_torch(z_t), logsnr, learned))
            z_t = scheduler.step(output, t, z_t, return_dict=False, **arguments)[0]
            steps.append(from_torch(z_t))
    return steps
