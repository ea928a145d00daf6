"""Pictures at the file edge: uint8 arrays, PNG files that remember their prompt, contact sheets.

Inside the program a picture is float32 in [-1, 1]; only here and in `data/` is it a file.
"""

import logging
import math
import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin, UnidentifiedImageError

from cascade.data.preprocess import BrokenPicture, area_resize, colour, decode, to_rgb
from cascade.errors import UserError

log = logging.getLogger(__name__)

MAX_ASPECT = 4.0  # of a picture to enlarge: its short side fills a stage's resolution


def to_uint8(x) -> np.ndarray:
    """Rounds pictures from [-1, 1] to 0...255: u = round(127.5 (x + 1)), clipped.

    Args:
      x: float array of any shape.

    Returns:
      uint8 array of the same shape.
    """
    x = np.asarray(x, np.float32)
    return np.rint(np.clip((x + 1.0) * 127.5, 0.0, 255.0)).astype(np.uint8)


def to_float(image) -> np.ndarray:
    """The inverse of `to_uint8`: x = u / 127.5 - 1, float32 in [-1, 1]."""
    return np.asarray(image, np.uint8).astype(np.float32) / 127.5 - 1.0


def writable_folder(folder: str | os.PathLike) -> Path:
    """Makes `folder` and proves that a file can be written there, before hours of sampling.

    Raises:
      UserError: the folder can't be made or written to.
    """
    folder = Path(folder)
    probe = folder / f".{uuid.uuid4().hex}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"\0")
        probe.unlink()
    except (OSError, ValueError) as error:  # a path with a NUL is a ValueError
        places = (folder, *folder.parents)
        file = next((p for p in places if os.path.exists(p) and not os.path.isdir(p)), None)
        reason = getattr(error, "strerror", None) or error
        if file is not None:
            reason = f"{str(file)!r} is a file, not a folder"
        raise UserError(
            f"Can't write to the folder {str(folder)!r} ({reason}); "
            "give a folder that you may write to, on a disk with free space."
        ) from error
    return folder


def check_png(path: str | os.PathLike) -> Path:
    """The path of a PNG file to write; touches nothing.

    Raises:
      UserError: its name doesn't end with .png, or a folder has that name.
    """
    if os.path.isdir(path):
        raise UserError(f"{os.fspath(path)!r} is a folder; give the name of a PNG file.")
    if Path(path).suffix.lower() != ".png":
        raise UserError(
            f"The output file is {os.fspath(path)!r}; PNG is written, so give a name that ends "
            "with .png."
        )
    return Path(path)


def save_png(path: str | os.PathLike, image, metadata: Mapping[str, str] | None = None) -> Path:
    """Writes one picture as PNG, all of it or nothing.

    Args:
      path: the file; its folder is made if it's missing and an old file is replaced.
      image: uint8 [H, W, 3].
      metadata: texts kept in the file as iTXt chunks (UTF-8): prompt, seed, settings.

    Raises:
      UserError: the file can't be written, or a text isn't valid Unicode.
    """
    path = Path(path)
    info = PngImagePlugin.PngInfo()
    for key, value in (metadata or {}).items():
        try:
            info.add_itxt(key, value)
        except UnicodeEncodeError as error:
            raise UserError(
                f"The text {key!r} for {path.name} isn't valid Unicode ({error.reason}); "
                "remove its lone surrogates."
            ) from error
    writable_folder(path.parent)
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        Image.fromarray(np.asarray(image, np.uint8)).save(temporary, "PNG", pnginfo=info)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(
            f"Can't write {str(path)!r} ({error.strerror or error}); "
            "free some space or give another place."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    return path


def read_image(path: str | os.PathLike, ground: str = "#ffffff") -> np.ndarray:
    """Reads a picture of any common format, upright, transparency laid over `ground`.

    Returns:
      uint8 [H, W, 3].

    Raises:
      UserError: no such file, or not a picture.
    """
    try:
        return decode(Path(path).read_bytes(), colour(ground))
    except BrokenPicture as error:
        raise UserError(
            f"{str(path)!r} isn't a picture that can be read ({error}); give a whole PNG or JPEG."
        ) from error
    except (OSError, ValueError) as error:  # a path with a NUL is a ValueError
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"Can't read the picture {str(path)!r} ({reason}); give a file that exists."
        ) from error


def read_metadata(path: str | os.PathLike) -> dict[str, str]:
    """The texts that `save_png` put into a file.

    Raises:
      UserError: the file can't be read as a picture.
    """
    try:
        with Image.open(path) as image:
            image.load()  # texts may follow the pixels
            return {key: str(value) for key, value in getattr(image, "text", {}).items()}
    except (OSError, ValueError, SyntaxError, UnidentifiedImageError) as error:
        raise UserError(
            f"Can't read {str(path)!r} as a picture ({error}); give a PNG file."
        ) from error


def as_lowres(
    images, lowres: int, resolution: int, divisor: int
) -> tuple[np.ndarray, tuple[int, int]]:
    """Pictures that someone has, as what a super-resolution stage enlarges.

    Each is resized until its short side is `lowres`: by area averages on the way down, as in
    training, and linearly on the way up. Its long side follows, rounded to what can be drawn.

    Args:
      images: uint8 or float in [-1, 1], [H, W, 3] or [N, H, W, 3]; a PIL picture; a list of these.
      lowres, resolution: the sides of the squares that the stage was trained to enlarge and draw.
      divisor: what the sides of a drawn picture must be multiples of.

    Returns:
      uint8 [N, h, w, 3], and the (height, width) that the stage draws from it.

    Raises:
      UserError: no picture, one of another shape, dtype or range, one far from square, or pictures
        that come out in different shapes.
    """
    if isinstance(images, Image.Image) or getattr(images, "ndim", 0) == 3:
        images = [images]
    unit = math.lcm(divisor, resolution // math.gcd(resolution, lowres))
    results, sizes = [], set()
    for picture in map(_as_picture, images):
        sides = picture.shape[:2]
        short, long = sorted(sides)
        if long > MAX_ASPECT * short:
            raise UserError(
                f"A picture of {sides[1]}×{sides[0]} is more than {MAX_ASPECT:g} times as long as "
                "wide; cut it into pieces."
            )
        if short > resolution:
            log.warning(
                "A picture of %d×%d is larger than the %d that is drawn; it will be shrunk.",
                sides[1],
                sides[0],
                resolution,
            )
        size = tuple(round(side * resolution / short / unit) * unit for side in sides)
        small = (side * lowres // resolution for side in size)
        results.append(np.rint(area_resize(picture, *small)).astype(np.uint8))
        sizes.add(size)
    if len(sizes) != 1:
        fault = "differ in shape" if sizes else "are missing"
        raise UserError(f"The pictures to enlarge {fault}; give one or more of the same shape.")
    return np.stack(results), sizes.pop()


def _as_picture(image) -> np.ndarray:
    """uint8 [H, W, 3] from an array or a PIL picture, which is turned upright and laid on white."""
    if isinstance(image, Image.Image):
        return to_rgb(ImageOps.exif_transpose(image), (255, 255, 255))
    array = np.asarray(image)
    if array.ndim != 3 or array.shape[2] != 3 or 0 in array.shape:
        raise UserError(f"A picture has the shape {array.shape}; give [height, width, 3].")
    if np.issubdtype(array.dtype, np.floating):
        if not (np.abs(array) <= 1.0).all():
            raise UserError("A picture of floats has values outside [-1, 1]; scale it to that.")
        array = to_uint8(array)
    if array.dtype != np.uint8:
        raise UserError(f"A picture has dtype {array.dtype}; give uint8, or floats in [-1, 1].")
    return array


def contact_sheet(
    images: Sequence[np.ndarray],
    captions: Sequence[str] | None = None,
    *,
    columns: int = 0,
    cell: int = 128,
    margin: int = 8,
) -> np.ndarray:
    """Pictures in a grid on white, each with its caption below, for people to look at.

    Args:
      images: uint8 pictures [h, w, 3], of any sizes; each is fitted into a square cell, by whole
        factors and without smoothing where it's smaller, so that small pictures show their pixels.
      captions: one text a picture, cut off where it's longer than two lines.
      columns: pictures a row; 0 chooses a sheet about as wide as high.
      cell: side of a cell, pixels.
      margin: white around a cell, pixels.

    Returns:
      uint8 [H, W, 3].

    Raises:
      UserError: no pictures, or captions that aren't one a picture.
    """
    if len(images) == 0:
        raise UserError("A contact sheet needs at least one picture; none was given.")
    if captions is not None and len(captions) != len(images):
        raise UserError(
            f"{len(images)} pictures have {len(captions)} captions; give one a picture."
        )
    columns = min(columns, len(images)) if columns > 0 else math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    font = ImageFont.load_default(max(10, cell // 11))
    line = math.ceil(font.size * 1.3)
    height = cell + (2 * line if captions is not None else 0)
    sheet = Image.new(
        "RGB", (columns * (cell + margin) + margin, rows * (height + margin) + margin), "white"
    )
    draw = ImageDraw.Draw(sheet)
    for i, image in enumerate(images):
        left = margin + (i % columns) * (cell + margin)
        top = margin + (i // columns) * (height + margin)
        picture = _fit(Image.fromarray(np.asarray(image, np.uint8)), cell)
        sheet.paste(
            picture, (left + (cell - picture.width) // 2, top + (cell - picture.height) // 2)
        )
        if captions is not None:
            for row, text in enumerate(_wrap(captions[i], font, cell)):
                draw.text((left, top + cell + row * line), text, fill="black", font=font)
    return np.asarray(sheet)


def _fit(picture: Image.Image, cell: int) -> Image.Image:
    """Scales a picture to fit a square cell: up by a whole factor, or down smoothly."""
    longest = max(picture.size)
    if longest > cell:
        size = tuple(max(1, round(side * cell / longest)) for side in picture.size)
        return picture.resize(size, Image.Resampling.LANCZOS)
    factor = cell // longest
    return picture.resize(
        (picture.width * factor, picture.height * factor), Image.Resampling.NEAREST
    )


def _wrap(text: str, font, width: int, lines: int = 2) -> list[str]:
    """Breaks a caption into at most `lines` lines that fit `width` pixels, with … at a cut."""
    text = " ".join(text[:200].split())
    wrapped = []
    while text and len(wrapped) < lines:
        end = len(text)
        while end > 1 and font.getlength(text[:end]) > width:
            end -= 1
        space = text.rfind(" ", 0, end + 1)
        if end < len(text) and space > 0:
            end = space
        wrapped.append(text[:end])
        text = text[end:].lstrip()
    if text:
        wrapped[-1] = wrapped[-1][:-1] + "…"
    return wrapped
