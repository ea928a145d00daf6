"""What a U-Net costs, counted by hand: closed formulas of its parts, from its config alone.

Each part is an array (parameters, FLOPs of one picture's forward pass); a product of [n, i] with
[i, o] is 2·n·i·o, whatever runs it.
"""

import math

import numpy as np


def dense(rows, i, o):
    """A matrix and a bias."""
    return np.array([i * o + o, 2 * rows * i * o])


def conv3(pixels, i, o):
    """Nine taps, and `pixels` of output."""
    return np.array([9 * i * o + o, 2 * pixels * 9 * i * o])


def norm(channels):
    """Scale and shift, elementwise."""
    return np.array([2 * channels, 0])


def scores(queries, keys, channels):
    """Of all heads together: q kᵀ, and its softmax times v."""
    return np.array([0, 2 * 2 * queries * keys * channels])


def residual(pixels, i, o, embedding):
    """Norm, convolution, norm shifted and scaled by the embedding, convolution; a shortcut."""
    cost = norm(i) + conv3(pixels, i, o) + dense(1, embedding, 2 * o) + norm(o)
    return cost + conv3(pixels, o, o) + (dense(pixels, i, o) if i != o else 0)


def attention(pixels, channels, over_pixels, over_text, words, width):
    """Queries, keys and values of pixels; keys and values of words; scores; output."""
    if not (over_pixels or over_text):
        return np.array([0, 0])
    cost = norm(channels) + dense(pixels, channels, (3 if over_pixels else 1) * channels)
    keys = pixels if over_pixels else 0
    if over_text:
        cost, keys = cost + norm(width) + dense(words, width, 2 * channels), keys + words
    return cost + scores(pixels, keys, channels) + dense(pixels, channels, channels)


def pool(words, width, embedding):
    """One query, the mean and a vector, looks at itself and at all words."""
    cost = norm(width) + np.array([width, 0]) + dense(1, width, width)
    cost = cost + dense(words + 1, width, 2 * width) + scores(1, words + 1, width)
    return cost + dense(1, width, embedding) + norm(embedding)


def whole(stage, side) -> np.ndarray:
    """(parameters, FLOPs) of a stage's network on a picture of `side`²."""
    n = stage.network
    widths = [n.channels * mult for mult in n.channel_mults]
    finest, embedding = widths[0], 4 * widths[0]
    words, states = stage.text_length, stage.text_width
    width = n.text_channels or states
    text = (words, width)

    lowres = stage.lowres_resolution > 0
    cost = conv3(side**2, 6 if lowres else 3, finest)
    cost = cost + (1 + lowres) * (dense(1, finest, embedding) + dense(1, embedding, embedding))
    cost = cost + (dense(words, states, width) if n.text_channels else 0)
    cost = cost + pool(words, width if n.pool_projected else states, embedding)

    def blocks(level, pixels, channels, skips):
        """Residual blocks with attention after each, or after the last."""
        cost, o = 0, widths[level]
        for j, skip in enumerate(skips):
            cost = cost + residual(pixels, channels + skip, o, embedding)
            channels = o
            if n.attention_per_block or j == len(skips) - 1:
                cost = cost + attention(
                    pixels, o, n.self_attention[level], n.text_attention[level], *text
                )
        return cost

    channels, pixels, sizes, entries = finest, side**2, [], []
    for level, (stride, o) in enumerate(zip(n.strides, widths, strict=True)):
        pixels //= stride**2
        if stride > 1 and n.resampling == "block":
            cost = cost + residual(pixels, channels, channels, embedding)
        elif stride > 1:
            cost, channels = cost + conv3(pixels, channels, o), o
        sizes.append(pixels)
        entries.append(channels)
        cost = cost + blocks(level, pixels, channels, [0] * n.num_blocks[level])
        channels = o
    if n.middle:
        cost = cost + 2 * residual(pixels, channels, channels, embedding)
        cost = cost + attention(pixels, channels, *n.middle_attention, *text)
    for level in reversed(range(len(widths))):
        o, outer, pixels = widths[level], widths[max(level - 1, 0)], sizes[level]
        skips = [o] + [0 if n.skips == "level" else o] * (n.num_blocks[level] - 1)
        skips += [entries[level]] if n.entry_skips else []
        cost = cost + blocks(level, pixels, channels, skips)
        channels = o
        if n.strides[level] > 1 and n.resampling == "block":
            cost = cost + residual(4 * pixels, o, o, embedding)
        elif n.strides[level] > 1:
            cost, channels = cost + conv3(pixels, o, 4 * outer), outer
    assert math.prod(n.strides) ** 2 * sizes[-1] == side**2
    return cost + norm(channels) + conv3(side**2, channels, 3)
