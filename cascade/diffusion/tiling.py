"""A network call in overlapping tiles, blended smoothly: memory is one tile's, not the picture's.

A picture too large for the device is predicted tile by tile at every sampling step, and the
predictions are averaged where tiles overlap (Bar-Tal et al. 2023, MultiDiffusion, with smooth
weights). Tiles as large as the training crops are what the network has seen.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from cascade.errors import UserError

Predict = Callable[[Array, Array, dict], Array]


def starts(side: int, tile: int, overlap: int) -> tuple[int, ...]:
    """Where tiles begin along a side: `tile - overlap` apart, the last one moved back to fit."""
    last = max(side - tile, 0)
    return (*range(0, last, tile - overlap), last)


def windows(side: int, tile: int, overlap: int) -> Array:
    """Each tile's weight at each of its pixels along a side, [tiles, min(tile, side)].

    A weight rises as sin² over the first `overlap` pixels of a tile and falls over the last, but
    not at the picture's own border. Divided by their sum, weights sum to one at every pixel.
    """

    def ramp(pixels: int) -> float:
        """The weight `pixels` within a tile's edge."""
        return math.sin(0.5 * math.pi * min((pixels + 0.5) / max(overlap, 1), 1.0)) ** 2

    begins = starts(side, tile, overlap)
    tile = min(tile, side)
    last = tile - 1
    weights = [
        [
            (ramp(p) if begin else 1.0) * (ramp(last - p) if begin + tile < side else 1.0)
            for p in range(tile)
        ]
        for begin in begins
    ]
    total = [0.0] * side
    for begin, row in zip(begins, weights, strict=True):
        for p, weight in enumerate(row, begin):
            total[p] += weight
    return jnp.array(
        [
            [weight / total[p] for p, weight in enumerate(row, begin)]
            for begin, row in zip(begins, weights, strict=True)
        ]
    )


def tiled(predict: Predict, tile: int, overlap: int) -> Predict:
    """`predict` in tiles of `tile`² pixels that overlap by at least `overlap`.

    A tile sees its part of z_t and of `lowres`, which may be smaller by a whole factor; other
    conditions are the whole picture's. One tile of all the batch is computed at a time. A picture
    no larger than a tile is predicted whole.

    Raises:
      UserError: when called: `overlap` isn't below `tile`, or `tile` or `overlap` isn't a multiple
        of the factor between z_t and `lowres`.
    """

    def blended(z_t: Array, logsnr: Array, cond: dict) -> Array:
        size = z_t.shape[1:3]
        if max(size) <= tile:
            return predict(z_t, logsnr, cond)
        factors = _factors(size, cond)
        _check(tile, overlap, factors)
        sides = [min(tile, side) for side in size]
        tops, lefts = (jnp.array(starts(side, tile, overlap)) for side in size)
        down, across = (windows(side, tile, overlap) for side in size)
        output = jax.eval_shape(predict, *_part(z_t, logsnr, cond, (0, 0), sides, factors))

        def add(canvas, index):
            row, column = index // len(lefts), index % len(lefts)
            corner = tops[row], lefts[column]
            predicted = predict(*_part(z_t, logsnr, cond, corner, sides, factors))
            weight = down[row][:, None, None] * across[column][:, None]
            at = (0, *corner, 0)
            so_far = jax.lax.dynamic_slice(canvas, at, predicted.shape)
            return jax.lax.dynamic_update_slice(canvas, so_far + weight * predicted, at), None

        canvas = jnp.zeros((*z_t.shape[:3], output.shape[-1]), output.dtype)
        return jax.lax.scan(add, canvas, jnp.arange(len(tops) * len(lefts)))[0]

    return blended


def _factors(size: tuple[int, int], cond: dict) -> tuple[int, int]:
    """How many times larger z_t is than `lowres`, down and across; 1 where there is none."""
    if "lowres" not in cond:
        return 1, 1
    low = cond["lowres"].shape[1:3]
    if any(side % small for side, small in zip(size, low, strict=True)):
        raise UserError(
            f"A picture of {size[1]}×{size[0]} can't be drawn in tiles from one of "
            f"{low[1]}×{low[0]}, which isn't smaller by a whole factor; set tile to 0."
        )
    return size[0] // low[0], size[1] // low[1]


def _check(tile: int, overlap: int, factors: tuple[int, int]):
    if not 0 <= overlap < tile:
        raise UserError(
            f"Tiles of {tile} pixels can't overlap by {overlap}; give an overlap below the tile."
        )
    for name, value in (("tile", tile), ("tile_overlap", overlap)):
        if any(value % factor for factor in factors):
            raise UserError(
                f"{name} is {value}, not a multiple of {max(factors)}, by which this stage "
                "enlarges; choose one that is."
            )


def _part(z_t, logsnr, cond, corner, sides, factors):
    """The arguments of `predict` for the tile whose top left pixel is `corner`."""

    def cut(array, scale):
        begin = (0, *(at // by for at, by in zip(corner, scale, strict=True)), 0)
        cut_sides = (side // by for side, by in zip(sides, scale, strict=True))
        return jax.lax.dynamic_slice(array, begin, (array.shape[0], *cut_sides, array.shape[-1]))

    if "lowres" in cond:
        cond = {**cond, "lowres": cut(cond["lowres"], factors)}
    return cut(z_t, (1, 1)), logsnr, cond
