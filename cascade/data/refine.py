"""A record of any source -> what `cascade data prepare` stores of it, or why it stores nothing."""

import io
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from cascade.data.duplicates import Look, look
from cascade.data.preprocess import (
    SPARE,
    Filtered,
    check_shape,
    colour,
    open_picture,
    resized,
    square_crop,
)
from cascade.data.sources import read_record

ENCODINGS = ("jpeg", "png", "raw")


class Refined(NamedTuple):
    """A record fit for training: the example to store, its look, and what statistics count."""

    example: dict[str, Any]
    look: Look
    numbers: dict[str, int]  # width, height (as it was), characters, tokens (first caption's)


def refine(source, index: int, encoder, settings: Mapping[str, Any]) -> Refined:
    """Reads a record, filters, resizes and encodes its picture, and makes its captions' tokens.

    Args:
      encoder: the text encoder whose tokens are stored.
      settings: a config of `cascade.schema.PREPARATION`.

    Raises:
      BrokenPicture: it can't be read or decoded, or has no caption.
      Filtered: the filter leaves it out.
    """
    record = read_record(source, index)
    limits, form = settings["filter"], settings["picture"]
    shortest, longest = limits["min_caption"], limits["max_caption"]
    captions = [c for c in record["captions"] if shortest <= len(c) <= longest]
    if not captions:
        raise Filtered(f"no caption of {shortest} to {longest} characters")
    picture, (height, width) = _pixels(record["image"], form)
    check_shape(height, width, limits["min_side"], limits["max_aspect"])
    picture = _shrunk(picture, form["side"], form["square"])
    tokens = encoder.tokenize(captions)
    ids = [row[mask].tolist() for row, mask in zip(tokens.ids, tokens.mask, strict=True)]
    example = {
        "image": encode(picture, form["encoding"], form["quality"]),
        "captions": captions,
        "key": record["key"],
        "token_ids": [number for row in ids for number in row],
        "token_counts": [len(row) for row in ids],  # of each caption, to take token_ids apart
        "height": picture.shape[0],
        "width": picture.shape[1],
        "source_height": height,
        "source_width": width,
        "source_index": index,
    }
    numbers = {
        "width": width,
        "height": height,
        "characters": len(captions[0]),
        "tokens": len(ids[0]),
    }
    return Refined(example, look(picture), numbers)


def _pixels(image: bytes | np.ndarray, form: Mapping) -> tuple[np.ndarray, tuple[int, int]]:
    if isinstance(image, np.ndarray):
        return image, image.shape[:2]
    return open_picture(image, colour(form["ground"]), SPARE * form["side"])


def _shrunk(picture: np.ndarray, side: int, square: bool) -> np.ndarray:
    """The shorter side brought down to `side`; what is smaller stays."""
    picture = square_crop(picture, None) if square else picture
    height, width = picture.shape[:2]
    share = side / min(height, width)
    if share >= 1:
        return picture
    return resized(picture, round(height * share), round(width * share))


def encode(picture: np.ndarray, encoding: str, quality: int) -> bytes:
    """A picture file: "jpeg" at full colour resolution, "png", or "raw", an uncompressed PPM."""
    buffer, image = io.BytesIO(), Image.fromarray(picture)
    if encoding == "jpeg":
        image.save(buffer, "JPEG", quality=quality, subsampling=0)
    else:
        image.save(buffer, {"png": "PNG", "raw": "PPM"}[encoding])
    return buffer.getvalue()


def reason_of(error: Exception) -> str:
    """An error's words without what differs from record to record: paths and numbers."""
    words = re.sub(r"\S*/\S*", "its file", str(error))
    return re.sub(r"\d+(\.\d+)?", "#", words)[:120]
