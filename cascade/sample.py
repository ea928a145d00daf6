"""The jobs `cascade sample` and `cascade upscale`: from a bundle and words to PNG files."""

import contextlib
import functools
import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from jax.sharding import Mesh

from cascade.arguments import parsed_size
from cascade.batches import Batch
from cascade.images import check_png, contact_sheet, read_image, save_png, writable_folder
from cascade.parallel.mesh import all_devices, on_all_processes, on_first_process
from cascade.parallel.processes import agree
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
    mesh: Mesh | None = None,
    progress: bool = True,
    **changes,
) -> list[Path]:
    """Draws prompts with a bundle into PNG files and, for several, a contact sheet.

    A batch's files are written before the next batch is drawn. The sheet shows the first 64.
    A name is the prompt's words, the seed, the index, and a digest of the bundle's path, the
    prompt and all settings: a-red-apple-0-0-3f2a9c.png. The sheet's digest is over all prompts.
    Of several processes each writes the pictures that its devices drew, process 0 the sheet.

    Args:
      folder: the bundle.
      out: a folder, made if it's missing; only files of the very same request are replaced.
      first_index: number of the first picture; a PNG's `index` and its prompt redraw it alone.
      size: "HEIGHTxWIDTH" of the base picture.
      text_weights, mesh: as in `cascade.load`.
      **changes: steps, guidance, aug_level, sampler, spacing, tile, tile_overlap.
      Others: as in `Cascade.__call__`.

    Returns:
      This process's files, one a picture, then the sheet.

    Raises:
      UserError: as `cascade.load` and `Cascade.__call__`, and then `out` is left alone; an `out`
        that can't be written, or processes that were told different things, before any drawing.
    """
    base_size = parsed_size(size)
    pipe = load(folder, text_weights=text_weights, mesh=mesh)
    settings = _settings(
        pipe, changes, negative_prompt=negative_prompt, size=base_size, batch_size=batch_size
    )
    request = [os.path.abspath(folder), settings]
    _agree(pipe.mesh, *request, prompts=prompts, num=num_images, seed=seed, first_index=first_index)
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
    names = _Names(prompts, num_images, seed, first_index, request)
    sheet_digest = _digest(prompts, int(num_images), *request)
    sheet_name = f"sheet-{seed}-from-{first_index}-{sheet_digest}.png"

    def write(batch: Batch):
        for i, image in batch.own():
            about = _metadata(prompts[i // num_images], seed, first_index + i, settings)
            paths.append(save_png(Path(out, names[i]), image, about))

    on_all_processes(lambda: _check_place(out, itertools.chain(names, [sheet_name])), pipe.mesh)
    paths, shown = [], []
    with contextlib.closing(batches):  # and its bar, before an error is said
        for batch in batches:
            on_all_processes(functools.partial(write, batch), pipe.mesh)
            shown.extend(batch.first(SHEET_MOST - len(shown)))

    def write_sheet():
        captions = [prompts[i // num_images] for i in range(len(shown))]
        cell = min(max(SHEET_CELLS[0], *shown[0].shape[:2]), SHEET_CELLS[1])
        paths.append(save_png(Path(out, sheet_name), contact_sheet(shown, captions, cell=cell)))

    if len(names) > 1:
        on_first_process(write_sheet, pipe.mesh)
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
    mesh: Mesh | None = None,
    progress: bool = True,
    **changes,
) -> Path:
    """Enlarges a picture file with one stage of a bundle into a PNG file, which process 0 writes.

    Args:
      folder: the bundle.
      image: the picture's file, which every process reads.
      out: the PNG file, NAME.png, replaced if it's there.
      stage: which stage enlarges; 1 is the first that can.
      text_weights, mesh: as in `cascade.load`.
      **changes: steps, guidance, aug_level, sampler, spacing, tile, tile_overlap.
      Others: as in `Cascade.upscale`.

    Raises:
      UserError: as `cascade.load`, `read_image` and `Cascade.upscale`; an `out` that isn't PNG or
        can't be written is found before anything is drawn; processes that differ in what they were
        told to draw.
    """
    out, mesh = check_png(out), mesh or all_devices()
    picture = on_all_processes(functools.partial(read_image, image), mesh)
    pipe = load(folder, text_weights=text_weights, mesh=mesh)
    settings = _settings(pipe, changes, stage, negative_prompt=negative_prompt)
    drawing = {"image": hashlib.sha256(picture).hexdigest(), "prompts": [prompt]}
    _agree(mesh, os.path.abspath(folder), settings, **drawing, seed=seed, index=first_index)
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
    on_first_process(functools.partial(writable_folder, out.parent), mesh)
    (((enlarged,),),) = drawn  # the one picture of the one stage in the one batch
    metadata = _metadata(prompt, seed, first_index, settings)
    on_first_process(functools.partial(save_png, out, enlarged, metadata), mesh)
    return out


def _check_place(out: str | os.PathLike, names: Iterable[str]):
    """Raises a UserError if `out` can't be written to, or a folder in it has one of `names`."""
    if any(path.is_dir() for path in writable_folder(out).glob("*.png")):
        for name in names:
            check_png(Path(out, name))


class _Names(Sequence):
    """The files of all pictures, in order: `images` a prompt."""

    def __init__(self, prompts, images: int, seed: int, first_index: int, request: Sequence[str]):
        self._stems = [_stem(prompt, seed) for prompt in prompts]
        self._digests = [_digest(prompt, *request) for prompt in prompts]
        self._images, self._first_index = images, first_index

    def __len__(self):
        return len(self._stems) * self._images

    def __getitem__(self, i: int) -> str:
        which = range(len(self))[i] // self._images
        return f"{self._stems[which]}-{self._first_index + i}-{self._digests[which]}.png"


def _stem(prompt: str, seed: int) -> str:
    """How the names of a prompt's files begin."""
    words = re.sub(r"\W+", "-", prompt)[:40].strip("-_").lower() or "unconditional"
    return f"{words}-{seed}"


def _agree(mesh: Mesh, folder: str, settings: str, **others):
    """Raises a UserError where the mesh's processes were told to draw different things."""
    if mesh.is_multi_process:
        weights = hashlib.sha256(Path(folder, "cascade.json").read_bytes()).hexdigest()
        told = {"bundle": folder, "weights": weights, "settings": json.loads(settings), **others}
        agree("request", told)


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
