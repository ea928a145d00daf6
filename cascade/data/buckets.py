"""Aspect buckets: long pictures keep their shape when a super-resolution stage trains on crops."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from cascade.data.preprocess import SPARE, PairCrop, check_shape, cut, open_picture, resized
from cascade.errors import UserError


class Bucketed(NamedTuple):
    """A picture file or uint8 array -> uint8 [h, w, 3] of the bucket (h, w) nearest to it in shape.

    Nearest is least |log(H / W) - log(h / w)|, the first of equals. The picture is cut to the
    bucket's shape, which keeps as much of it as can be, and brought to its size. Called with a
    picture and a generator (None takes the centre); raises BrokenPicture or Filtered.
    """

    sizes: Sequence[tuple[int, int]]
    ground: tuple[int, int, int]
    min_side: int
    max_aspect: float

    def check(self, pair: PairCrop) -> "Bucketed":
        """Returns itself.

        Raises:
          UserError: buckets that aren't pairs, whose sides `pair` can't crop, or without a crop,
            since a batch has one shape.
        """
        if not pair.crop_resolution:
            raise UserError(
                "Buckets need a stage with a crop_resolution, since a batch has one shape; set it, "
                "or set data.buckets to ()."
            )
        for size in self.sizes:
            sound = isinstance(size, tuple | list) and len(size) == 2
            if not sound or not all(
                isinstance(side, int) and side >= pair.crop_resolution and side % pair.factor == 0
                for side in size
            ):
                raise UserError(
                    f"The bucket {size!r} must be (height, width), each at least crop_resolution "
                    f"{pair.crop_resolution} and a multiple of {pair.factor}, the ratio of "
                    "resolution to lowres_resolution."
                )
        return self

    def nearest(self, height: int, width: int) -> tuple[int, int]:
        """The bucket for a picture."""
        shape = math.log(height / width)
        return min(self.sizes, key=lambda size: abs(shape - math.log(size[0] / size[1])))

    def __call__(
        self, image: bytes | np.ndarray, rng: np.random.Generator | None = None
    ) -> np.ndarray:
        """Decodes, filters, cuts and resizes."""
        if isinstance(image, bytes):
            least = SPARE * max(max(size) for size in self.sizes)
            picture, size = open_picture(image, self.ground, least)
        else:
            picture, size = image, image.shape[:2]
        check_shape(*size, self.min_side, self.max_aspect)
        height, width = self.nearest(*size)
        scale = min(picture.shape[0] / height, picture.shape[1] / width)
        rows, columns = max(1, round(height * scale)), max(1, round(width * scale))
        return resized(cut(picture, rows, columns, rng), height, width)
