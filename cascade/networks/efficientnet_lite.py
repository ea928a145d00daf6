"""EfficientNet-Lite0 (Tan and Le 2019; its Lite variants: Google 2020), for its pooled features."""

from collections.abc import Callable

import jax

SIDE = 224
WIDTH = 1280
EPS = 1e-3  # of its batch normalisation
STEM = 32
# Repeats, kernel, stride of the first, expansion and width of each group of inverted bottlenecks.
GROUPS = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


def lite0(unit: Callable, x: jax.Array) -> jax.Array:
    """Pooled features of EfficientNet-Lite0, which has ReLU6 and no squeeze-and-excitation.

    A block is project(relu6(depthwise(relu6(expand(x))))), each followed by batch normalisation,
    plus x where the shape stays. Names are those of the weights' PyTorch origin, padding is
    TensorFlow's "SAME": what is odd goes to the right and below.

    Args:
      unit: see `cascade.networks.convolutions`.
      x: [B, 224, 224, 3], (RGB in [0, 1] - mean) / deviation by ImageNet's constants.

    Returns:
      [B, 1280], means over the 7×7 places of the last layer, at least 0 and at most 6.
    """
    x = jax.nn.relu6(unit(x, "_conv_stem", "_bn0", STEM, (3, 3), stride=2))
    index = 0
    for repeats, kernel, first_stride, expansion, width in GROUPS:
        for repeat in range(repeats):
            stride = first_stride if repeat == 0 else 1
            at, shortcut, inner = f"_blocks.{index}", x, x.shape[-1] * expansion
            if expansion > 1:
                x = jax.nn.relu6(unit(x, f"{at}._expand_conv", f"{at}._bn0", inner, (1, 1)))
            depthwise = {"stride": stride, "depthwise": True}
            size = (kernel, kernel)
            x = unit(x, f"{at}._depthwise_conv", f"{at}._bn1", inner, size, **depthwise)
            x = unit(jax.nn.relu6(x), f"{at}._project_conv", f"{at}._bn2", width, (1, 1))
            if x.shape == shortcut.shape:
                x = x + shortcut
            index += 1
    return jax.nn.relu6(unit(x, "_conv_head", "_bn1", WIDTH, (1, 1))).mean((1, 2))
