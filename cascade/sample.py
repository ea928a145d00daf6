"""The jobs `cascade sample` and `cascade upscale`: from a bundle and words to PNG files."""

import contextlib
import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from cascade.arguments import parsed_size
from cascade.images import check_png, check_writable, contact_sheet, read_image, save_png
from cascade.pipeline import Cascade, load

SHEET_MOST = 64  # pictures
SHEET_CELLS = (128, 256)  # least and largest side of a picture's place


def sample_to_folder(
    folder: str | os.PathLike,
    prompts: Sequence[str],
    out: str | os.PathLike,
    *,
    num_images: int = 1,
    seed: int = 0,
    first_index: int = 0,
    size: str | None = None,
    negative_prompt: str = "",
    batch_size: int | None = None,
    text_weights: str = "",
    progress: bool = True,
    **changes,
) -> list[Path]:
    """Draws prompts with a bundle into PNG files and, for several, a contact sheet.

    A batch's files are written before the next batch is drawn. The sheet shows the first 64.
    A name is the prompt's words, the seed, the index, and a digest of the bundle's path, the
    prompt and all settings: a-red-apple-0-0-3f2a9c.png. The sheet's digest is over all prompts.

    Args:
      folder: the bundle.
      out: a folder, made if it's missing; only files of the very same request are replaced.
      first_index: number of the first picture; a PNG's `index` and its prompt redraw it alone.
      size: "HEIGHTxWIDTH" of the base picture.
      text_weights: as in `cascade.load`.
      **changes: steps, guidance, aug_level, sampler, tile, tile_overlap.
      Others: as in `Cascade.__call__`.

    Returns:
      The files, one a picture, then the sheet.

    Raises:
      UserError: as `cascade.load` and `Cascade.__call__`, and then `out` is left alone; an `out`
        that can't be written is found before anything is drawn.
    """
    base_size = parsed_size(size)
    pipe = load(folder, text_weights=text_weights)
    batches = pipe.draw_batches(
        prompts,
        num_images,
        seed,
        negative_prompt=negative_prompt,
        size=base_size,
        first_index=first_index,
        batch_size=batch_size,
        progress=progress,
        **changes,
    )
    settings = _settings(
        pipe, changes, negative_prompt=negative_prompt, size=base_size, batch_size=batch_size
    )
    request = [os.path.abspath(folder), settings]
    stems = [_stem(prompt, seed) for prompt in prompts]
    digests = [_digest(prompt, *request) for prompt in prompts]
    sheet_digest = _digest(prompts, int(num_images), *request)
    sheet_name = f"sheet-{seed}-from-{first_index}-{sheet_digest}.png"

    def name(i: int) -> str:
        which = i // num_images
        return f"{stems[which]}-{first_index + i}-{digests[which]}.png"

    out = check_writable(out)
    count = len(prompts) * num_images
    _check_free(out, itertools.chain(map(name, range(count)), [sheet_name]))
    paths, shown = [], []
    with contextlib.closing(batches):  # and its bar, before an error is said
        for image in (image for stages in batches for image in stages[-1]):
            prompt, index = prompts[len(paths) // num_images], first_index + len(paths)
            metadata = _metadata(prompt, seed, index, settings)
            paths.append(save_png(out / name(len(paths)), image, metadata))
            if len(shown) < SHEET_MOST:
                shown.append(image)
    if len(paths) > 1:
        captions = [prompts[i // num_images] for i in range(len(shown))]
        cell = min(max(SHEET_CELLS[0], *image.shape[:2]), SHEET_CELLS[1])
        sheet = contact_sheet(shown, captions, cell=cell)
        paths.append(save_png(out / sheet_name, sheet))
    return paths


def upscale_to_file(
    folder: str | os.PathLike,
    image: str | os.PathLike,
    out: str | os.PathLike,
    *,
    prompt: str = "",
    stage: int = 1,
    seed: int = 0,
    negative_prompt: str = "",
    first_index: int = 0,
    batch_size: int | None = None,
    text_weights: str = "",
    progress: bool = True,
    **changes,
) -> Path:
    """Enlarges a picture file with one stage of a bundle into a PNG file.

    Args:
      folder: the bundle.
      image: the picture's file.
      out: the PNG file, NAME.png, replaced if it's there.
      stage: which stage enlarges; 1 is the first that can.
      text_weights: as in `cascade.load`.
      **changes: steps, guidance, aug_level, sampler, tile, tile_overlap.
      Others: as in `Cascade.upscale`.

    Raises:
      UserError: as `cascade.load`, `read_image` and `Cascade.upscale`; an `out` that isn't PNG or
        can't be written is found before anything is drawn.
    """
    out = check_png(out)
    picture = read_image(image)
    pipe = load(folder, text_weights=text_weights)
    drawn = pipe.upscale_batches(
        picture,
        prompt,
        stage,
        seed,
        negative_prompt=negative_prompt,
        first_index=first_index,
        batch_size=batch_size,
        progress=progress,
        **changes,
    )
    settings = _settings(pipe, changes, stage, negative_prompt=negative_prompt)
    check_writable(out.parent)
    (((enlarged,),),) = drawn  # the one picture of the one stage in the one batch
    return save_png(out, enlarged, _metadata(prompt, seed, first_index, settings))


def _check_free(out: Path, names: Iterable[str]):
    """Raises a UserError if a folder in `out` has one of `names`."""
    if any(path.is_dir() for path in out.glob("*.png")):
        for name in names:
            check_png(out / name)


def _stem(prompt: str, seed: int) -> str:
    """How the names of a prompt's files begin."""
    words = re.sub(r"\W+", "-", prompt)[:40].strip("-_").lower() or "unconditional"
    return f"{words}-{seed}"


def _digest(*request) -> str:
    """Six hex digits that tell one request from another."""
    return hashlib.sha256(json.dumps(request).encode()).hexdigest()[:6]


def _settings(pipe: Cascade, changes: dict, drawing: int | None = None, **others) -> str:
    """Every setting that a picture was drawn with, the bundle's own included, as JSON.

    `drawing` is the stage that drew it, None where all did.
    """
    stages = [settings.to_dict() for settings in pipe.settings(**changes, stage=drawing)]
    if drawing is not None:
        others["stage"] = drawing
    return json.dumps({"stages": stages, **others})


def _metadata(prompt: str, seed: int, index: int, settings: str) -> dict[str, str]:
    """What a PNG must say for its picture to be drawn again."""
    return {
        "Software": "cascade",
        "prompt": prompt,
        "seed": str(seed),
        "index": str(index),
        "settings": settings,
    }
