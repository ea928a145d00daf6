"""From any picture file to uint8 RGB of a known size: decode, crop, antialiased area resize."""

import io
import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageColor, ImageOps, UnidentifiedImageError

from cascade.errors import UserError

CROPS = ("centre", "random")
# A JPEG's shortcut to smaller sizes may leave this many times the pixels a side that are wanted, so
# that the rest of the way down, an area average, decides what the result looks like.
SPARE = 2
BLOCK_BYTES = 2**18
# By these, Pillow's `reduce` gives the exact mean of an area; by others it is off by one at times.
EXACT_FACTORS = (2, 4, 8)


class BrokenPicture(Exception):
    """A record that can't be read or decoded; the message says why."""


class Filtered(Exception):
    """A sound picture that the config's filter leaves out; the message says why."""


def colour(text: str) -> tuple[int, int, int]:
    """'#ffffff' or 'white' -> (255, 255, 255).

    Raises:
      UserError: no such colour.
    """
    try:
        return ImageColor.getrgb(text)[:3]
    except (ValueError, AttributeError, TypeError) as error:
        raise UserError(f"Unknown colour {text!r}; give one like '#ffffff' or 'white'.") from error


def decode(data: bytes, ground: tuple[int, int, int], least: int = 0) -> np.ndarray:
    """Decodes a picture file to uint8 RGB [H, W, 3].

    The camera's EXIF turn is applied, transparency is laid over `ground`, 16-bit grey keeps its
    high byte, palettes, grey and CMYK become RGB, and of an animation the first frame counts.

    Args:
      least: where this is above 0, a JPEG may be decoded to a half, a quarter or an eighth of its
        size (which its format has a shortcut for), as long as no side falls below this.

    Raises:
      BrokenPicture: not a picture, cut short, or too large to be one.
    """
    return open_picture(data, ground, least)[0]


def open_picture(
    data: bytes, ground: tuple[int, int, int], least: int = 0
) -> tuple[np.ndarray, tuple[int, int]]:
    """What `decode` gives, and the height and width that the file itself has."""
    try:
        picture = Image.open(io.BytesIO(data))
        width, height = picture.size
        if least:
            share = least / min(width, height)
            picture.draft(None, (math.ceil(width * share), math.ceil(height * share)))
        picture.load()
        lying = picture.size
        ImageOps.exif_transpose(picture, in_place=True)
        turned = picture.size != lying
        return to_rgb(picture, ground), (width, height) if turned else (height, width)
    except UnidentifiedImageError as error:
        raise BrokenPicture("not a picture") from error
    except Exception as error:  # Pillow's readers fail in many ways on damaged files
        raise BrokenPicture(f"{type(error).__name__}: {error}") from error


def to_rgb(picture: Image.Image, ground: tuple[int, int, int]) -> np.ndarray:
    """uint8 [H, W, 3] of a picture of any mode, laid over `ground` where it is transparent.

    Raises:
      ValueError: floating-point pixels, whose range nobody knows.
    """
    if picture.mode.startswith("I"):  # 16 bits a pixel; Pillow's own conversion would clip
        wide = np.asarray(picture).astype(np.int64)
        grey = np.clip(wide >> 8, 0, 255).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=-1)
    if picture.mode == "F":
        raise ValueError("floating-point pixels have no known range")
    if picture.has_transparency_data:
        rgba = picture.convert("RGBA")
        base = Image.new("RGBA", rgba.size, (*ground, 255))
        return np.asarray(Image.alpha_composite(base, rgba).convert("RGB"))
    return np.asarray(picture if picture.mode == "RGB" else picture.convert("RGB"))


def area_resize(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    """Antialiased resize of [H, W, C] to float32 [height, width, C], one axis after the other.

    Smaller: each new pixel is the mean of the area that it covers, old pixels at its border counted
    by the share covered. Larger: linear interpolation between pixel centres, edges repeated.
    """
    old_height, old_width, channels = picture.shape
    flat = picture.reshape(old_height, -1)
    down, across = _taps(old_height, height), _taps(old_width, width)
    result = np.empty((height, width, channels), np.float32)
    some = max(1, BLOCK_BYTES // (4 * flat.shape[1]))  # rows at a time, so that they stay in cache
    for top in range(0, height, some):
        block = slice(top, top + some)
        rows = _weighted(flat, [(at[block], weights[block]) for at, weights in down])
        columns = rows.reshape(-1, old_width, channels).transpose(1, 2, 0).reshape(old_width, -1)
        columns = _weighted(columns, across).reshape(width, channels, -1)
        result[block] = columns.transpose(2, 0, 1)
    return result


def _taps(size: int, new_size: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Of each new row, the t-th old row that it is made of and its weight, for t = 0, 1, …."""
    if new_size > size:
        centres = np.clip((np.arange(new_size) + 0.5) * (size / new_size) - 0.5, 0, size - 1)
        near = centres.astype(int)
        share = (centres - near).astype(np.float32)
        return [(near, 1 - share), (np.minimum(near + 1, size - 1), share)]
    # In units of 1/new_size old rows, new row i reaches from edges[i] to edges[i + 1].
    edges = np.arange(new_size + 1) * size
    start, end = edges[:-1], edges[1:]
    first, last = start // new_size, (end - 1) // new_size
    taps = []
    for t in range(int((last - first).max()) + 1):
        row = first + t
        covered = np.minimum(end, (row + 1) * new_size) - np.maximum(start, row * new_size)
        weight = (np.maximum(covered, 0) / size).astype(np.float32)
        taps.append((np.minimum(row, size - 1), weight))
    return taps


def _weighted(rows: np.ndarray, taps: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Sums of [N, K] rows as float32.

    No matrix product: BLAS threads would fight the training step's.
    """
    total = None
    for at, weights in taps:
        term = np.multiply(rows[at], weights[:, None], dtype=np.float32)
        total = term if total is None else np.add(total, term, out=total)
    return total


def resized(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 [H, W, 3] -> uint8 [height, width, 3]: `area_resize`, rounded, halves up."""
    factor = picture.shape[0] // height
    if factor in EXACT_FACTORS and picture.shape[:2] == (factor * height, factor * width):
        return np.asarray(Image.fromarray(picture).reduce(factor))
    pixels = area_resize(picture, height, width)
    pixels += 0.5
    return pixels.astype(np.uint8)


def all_resized(pictures: Iterable[np.ndarray], side: int) -> np.ndarray:
    """uint8 [N, side, side, 3] of squares uint8 [S, S, 3]: each `resized`."""
    return np.stack([resized(picture, side, side) for picture in pictures])


def square_crop(picture: np.ndarray, rng: np.random.Generator | None) -> np.ndarray:
    """The largest square of [H, W, C]: in the centre, or anywhere `rng` likes."""
    side = min(picture.shape[:2])
    return cut(picture, side, side, rng)


def cut(
    picture: np.ndarray, height: int, width: int, rng: np.random.Generator | None
) -> np.ndarray:
    """[height, width, C] of a picture [H, W, C]: in the centre, or anywhere `rng` likes."""
    top, left = picture.shape[0] - height, picture.shape[1] - width
    if rng is None:
        top, left = top // 2, left // 2
    else:
        top, left = int(rng.integers(top + 1)), int(rng.integers(left + 1))
    return picture[top : top + height, left : left + width]


def check_shape(height: int, width: int, min_side: int, max_aspect: float):
    """Raises Filtered for a picture that is too small or too long."""
    if min(height, width) < min_side:
        raise Filtered(f"{width}x{height} has a side below {min_side}")
    if max(height, width) > max_aspect * min(height, width):
        raise Filtered(f"{width}x{height} is longer than {max_aspect:g}:1")


class Preprocess(NamedTuple):
    """A picture file or uint8 array -> uint8 [resolution, resolution, 3].

    Called with a picture and a generator (None takes the centre); raises BrokenPicture or Filtered.
    """

    resolution: int
    ground: tuple[int, int, int]
    min_side: int
    max_aspect: float

    def __call__(
        self, image: bytes | np.ndarray, rng: np.random.Generator | None = None
    ) -> np.ndarray:
        """Decodes, filters, crops to a square and resizes."""
        if isinstance(image, bytes):
            picture, size = open_picture(image, self.ground, SPARE * self.resolution)
        else:
            picture, size = image, image.shape[:2]
        check_shape(*size, self.min_side, self.max_aspect)
        picture = square_crop(picture, rng)
        if picture.shape[0] == self.resolution:
            return picture
        return resized(picture, self.resolution, self.resolution)


class PairCrop(NamedTuple):
    """Picture -> the pair (crop, its lowres) that a super-resolution stage learns from.

    With f = resolution / lowres_resolution, the crop starts at a multiple of f, so that each lowres
    pixel is the mean of exactly its own f x f pixels: both crops show the same place, to the pixel,
    and the lowres crop equals the same crop of the whole picture's lowres.

    resolution: side of the whole picture; lowres_resolution: of its lowres, 0 for a stage without;
    crop_resolution: of the crop, 0 for the whole picture.
    """

    resolution: int
    lowres_resolution: int
    crop_resolution: int

    def check(self) -> "PairCrop":
        """Returns itself.

        Raises:
          UserError: sizes that don't divide.
        """
        whole, low, crop = self
        if low and whole % low:
            raise UserError(
                f"The resolution {whole} is not a multiple of lowres_resolution {low}; choose one."
            )
        if crop and (crop > whole or (low and crop % (whole // low))):
            raise UserError(
                f"crop_resolution {crop} must be at most {whole} and a multiple of "
                f"{whole // low if low else 1}, the ratio of resolution to lowres_resolution."
            )
        return self

    @property
    def factor(self) -> int:
        """Pixels of the picture to one of its lowres, along a side."""
        return self.resolution // self.lowres_resolution if self.lowres_resolution else 1

    def offset(
        self, rng: np.random.Generator | None, size: tuple[int, int] | None = None
    ) -> tuple[int, int]:
        """Top left pixel of the crop: the centre's, or where `rng` likes; a multiple of f.

        size: of the picture, where it isn't resolution × resolution.
        """
        side = self.crop_resolution or self.resolution
        whole = np.array(size or (self.resolution, self.resolution))
        places = (whole - side) // self.factor
        top, left = places // 2 if rng is None else rng.integers(places + 1)
        return int(top) * self.factor, int(left) * self.factor

    def __call__(self, picture: np.ndarray, offset: tuple[int, int]) -> dict[str, np.ndarray]:
        """Cuts uint8 [H, W, 3] into {"image": uint8 [c, c, 3], "lowres": float32 0..255}."""
        side = self.crop_resolution or self.resolution
        top, left = offset
        crop = picture[top : top + side, left : left + side]
        if not self.lowres_resolution:
            return {"image": crop}
        return {"image": crop, "lowres": area_resize(crop, *(side // self.factor,) * 2)}
