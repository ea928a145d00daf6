"""The jobs `cascade sample` and `cascade upscale`: from a bundle and words to PNG files."""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cascade.errors import UserError
from cascade.images import check_writable, contact_sheet, read_image, save_png
from cascade.pipeline import Cascade, load


def sample_to_folder(
    folder: str | os.PathLike,
    prompts: Sequence[str],
    out: str | os.PathLike,
    *,
    num_images: int = 1,
    seed: int = 0,
    size: str | None = None,
    **options,
) -> list[Path]:
    """Draws prompts with a bundle into PNG files and, for several, a contact sheet.

    Args:
      folder: the bundle.
      out: a folder; files of the same prompt, seed and number in it are replaced.
      size: "HEIGHTxWIDTH" of the base picture.
      **options: of `Cascade.__call__`.

    Returns:
      The files, one a picture, then the sheet.

    Raises:
      UserError: as `cascade.load` and `Cascade.__call__`; an `out` that can't be written is found
        before anything is drawn.
    """
    out = check_writable(out)
    pipe = load(folder)
    images = pipe(list(prompts), num_images, seed, size=_parsed_size(size), **options)
    captions = np.repeat(np.array(prompts, object), num_images)
    paths = []
    for i, (image, prompt) in enumerate(zip(images, captions, strict=True)):
        words = re.sub(r"\W+", "-", prompt)[:40].strip("-_").lower() or "unconditional"
        paths.append(
            save_png(
                out / f"{words}-{seed}-{i}.png",
                image,
                _metadata(pipe, prompt, seed, i, size=size, **options),
            )
        )
    if len(images) > 1:
        sheet = contact_sheet(images, captions, cell=max(128, max(images.shape[1:3])))
        paths.append(save_png(out / f"sheet-{seed}.png", sheet))
    return paths


def upscale_to_file(
    folder: str | os.PathLike,
    image: str | os.PathLike,
    out: str | os.PathLike,
    *,
    prompt: str = "",
    stage: int = 1,
    seed: int = 0,
    **options,
) -> Path:
    """Enlarges a picture file with one stage of a bundle into a PNG file.

    Args:
      folder: the bundle.
      image: the picture's file.
      out: the PNG file, replaced if it's there.
      stage: which stage enlarges; 1 is the first that can.
      **options: of `Cascade.upscale`.

    Raises:
      UserError: as `cascade.load`, `read_image` and `Cascade.upscale`; a folder that can't be
        written is found before anything is drawn.
    """
    out = Path(out)
    check_writable(out.parent)
    picture = read_image(image)
    pipe = load(folder)
    drawn = pipe.upscale(picture, prompt, stage, seed, **options)
    return save_png(out, drawn[0], _metadata(pipe, prompt, seed, 0, stage=stage, **options))


def _parsed_size(size: str | None) -> tuple[int, int] | None:
    """(height, width) from "HEIGHTxWIDTH"."""
    if size is None:
        return None
    match = re.fullmatch(r"(\d{1,6})[x×](\d{1,6})", size)
    if not match:
        raise UserError(f"The size is {size!r}; give HEIGHTxWIDTH of the base picture, like 64x96.")
    return int(match[1]), int(match[2])


def _metadata(pipe: Cascade, prompt: str, seed: int, index: int, **options) -> dict[str, str]:
    """What must be known to draw a picture again: its texts and each stage's settings."""
    changes = {
        key: options.pop(key)
        for key in ("steps", "guidance", "aug_level", "sampler")
        if key in options
    }
    settings = [stage.to_dict() for stage in pipe.settings(**changes)]
    return {
        "Software": "cascade",
        "prompt": prompt,
        "seed": str(seed),
        "index": str(index),
        "settings": json.dumps({"stages": settings, **options}),
    }
