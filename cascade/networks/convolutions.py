"""Convolution networks of others, for features alone: their weights read, checked and folded.

A network is a function `network(unit, x) -> features` that calls `unit` for each convolution and
the batch normalisation after it. What shapes it wants follows from running it once on no data.
"""

from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from cascade.errors import UserError

Params = dict[str, tuple[np.ndarray, np.ndarray]]  # convolution -> kernel [h, w, in, out], bias


def convolve(x, kernel, *, stride: int, padding: str, depthwise: bool) -> jax.Array:
    """[B, H, W, C] with a kernel [h, w, C, D], or [h, w, 1, C], in float32 on every device."""
    if depthwise:
        return _by_channel(x, kernel[:, :, 0], stride, padding)
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=jax.lax.Precision.HIGHEST,
    )


def _by_channel(x, kernel, stride: int, padding: str) -> jax.Array:
    """Each channel with its own [h, w], tap by tap.

    XLA's grouped convolution takes a CPU several times as long.
    """
    sides = x.shape[1:3]
    pads = jax.lax.padtype_to_pads(sides, kernel.shape[:2], (stride, stride), padding)
    x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    height, width = (
        (side - size) // stride * stride + 1
        for side, size in zip(x.shape[1:3], kernel.shape[:2], strict=True)
    )
    return sum(
        x[:, i : i + height : stride, j : j + width : stride] * kernel[i, j]
        for i in range(kernel.shape[0])
        for j in range(kernel.shape[1])
    )


def wanted(network: Callable, side: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Convolution -> its normalisation's name and its kernel's shape, [out, in, h, w]."""
    found = {}

    def unit(x, conv, norm, width, size, *, stride=1, padding="SAME", depthwise=False):
        depth = 1 if depthwise else x.shape[-1]
        found[conv] = norm, (width, depth, *size)
        kernel = jnp.zeros((*size, depth, width))
        return convolve(x, kernel, stride=stride, padding=padding, depthwise=depthwise)

    jax.eval_shape(
        lambda x: network(unit, x), jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    )
    return found


def fold(what: str, network: Callable, side: int, eps: float, tensors: Mapping) -> Params:
    """Each convolution with the normalisation after it as one: y = (k·g/s) ∗ x + (b − m·g/s).

    m is the running mean, s = √(running variance + eps), g and b the learned scale and shift; the
    sums are taken in float64 and rounded to float32.

    Args:
      what: whose weights, for messages: "EfficientNet-Lite0".
      network, side: what is run, and on squares of how many pixels.
      tensors: by PyTorch's names: `<convolution>.weight` [out, in, h, w], and of the normalisation
        `.weight`, `.bias`, `.running_mean`, `.running_var`, [out] each. Others are ignored.

    Raises:
      UserError: a tensor is missing, has another shape, or holds NaN or infinity.
    """
    params = {}
    for conv, (norm, shape) in wanted(network, side).items():

        def read(name, shape):
            if name not in tensors or tensors[name].shape != shape:
                fault = f"the shape {tensors[name].shape}" if name in tensors else "no such tensor"
                raise UserError(
                    f"The weights of {what} should hold {name!r} of shape {shape}, but there is "
                    f"{fault}; give the whole file of this very network."
                )
            value = np.asarray(tensors[name], np.float64)
            if not np.isfinite(value).all():
                raise UserError(f"{name!r} of {what} holds NaN or infinity; fetch it again.")
            return value

        kernel = read(f"{conv}.weight", shape).transpose(2, 3, 1, 0)
        scale, shift, mean, variance = (
            read(f"{norm}.{leaf}", shape[:1])
            for leaf in ("weight", "bias", "running_mean", "running_var")
        )
        scale = scale / np.sqrt(variance + eps)
        params[conv] = (np.float32(kernel * scale), np.float32(shift - mean * scale))
    return params


def run(network: Callable, params: Params, x: jax.Array) -> jax.Array:
    """The network's features of [B, side, side, 3]."""

    def unit(x, conv, norm, width, size, *, stride=1, padding="SAME", depthwise=False):
        kernel, bias = params[conv]
        return convolve(x, kernel, stride=stride, padding=padding, depthwise=depthwise) + bias

    return network(unit, x)


def joined(branches: Sequence[jax.Array]) -> jax.Array:
    """Branches of [B, H, W, C_i] as one [B, H, W, sum of C_i]."""
    return jnp.concatenate(branches, axis=-1)
