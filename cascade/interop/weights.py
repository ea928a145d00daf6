"""A bundle's weights for other programs: one plain safetensors file a stage.

    safetensors.json           what is here: files with their sums, each stage's config
    stage0.safetensors         whole tensors, named as docs/parameter_names.md says

A stage of more than `shard_bytes` becomes stage0-00001-of-00002.safetensors, … beside
stage0.safetensors.index.json, which says what tensor is where, as Hugging Face's libraries do.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from cascade.bundle import TrainedStage, load_stages
from cascade.config import to_json
from cascade.errors import UserError
from cascade.files import check_place, whole_folder
from cascade.interop.folders import write_weights
from cascade.manifest import file_entry
from cascade.shards import DTYPES, check_finite, named, write_durably

MANIFEST = "safetensors.json"
FORMAT_VERSION = 1
SHARD_BYTES = 5_000_000_000  # as Hugging Face's libraries cut them


def export_safetensors(
    bundle_folder: str | os.PathLike,
    out: str | os.PathLike,
    *,
    dtype: str = "float32",
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
    progress: bool = True,
) -> Path:
    """Writes the weights of a bundle's stages.

    Args:
      bundle_folder: the bundle; its text encoder isn't needed.
      out: a new folder, written as a whole or not at all.
      dtype: "float32" or "bfloat16"; values are rounded to it.
      overwrite: replace an earlier export of this kind.
      shard_bytes: a file holds at most this much of tensors, or one larger tensor.
      progress: show a bar.

    Returns:
      The folder.

    Raises:
      UserError: the bundle can't be loaded, the dtype is another, a weight isn't finite once it is
        rounded, or the folder is taken or can't be written.
    """
    if dtype not in DTYPES:
        raise UserError(f"Weights can't be exported as {dtype!r}; choose from {', '.join(DTYPES)}.")
    place = {"kind": "safetensors export", "mark": MANIFEST, "overwrite": overwrite}
    check_place(out, **place, sources=[bundle_folder])
    stages, text = load_stages(bundle_folder)
    with whole_folder(out, **place) as new:
        entries = [
            {
                "files": write_stage(new, i, trained, dtype=dtype, shard_bytes=shard_bytes),
                **describe_stage(i, trained),
            }
            for i, trained in enumerate(tqdm(stages, unit="stage", disable=not progress))
        ]
        described = describe_text(stages, text["section"]["name"], text["fingerprint"])
        contents = {"text_encoder": described, "dtype": dtype, "stages": entries}
        write_manifest(new / MANIFEST, contents)
    return Path(out).resolve()


def describe_text(stages: Sequence[TrainedStage], name: str, fingerprint: str) -> dict[str, Any]:
    """What a manifest says of the text encoder: which states the stages read, all the same."""
    config = stages[0].stage.config
    return {
        "name": name,
        "max_length": config.text_length,
        "width": config.text_width,
        "fingerprint": fingerprint,
    }


def describe_stage(index: int, trained: TrainedStage) -> dict[str, Any]:
    """What a file of weights, and a manifest, say of a stage: index, training length, config."""
    return {
        "stage": index,
        "trained_steps": trained.trained_steps,
        "config": to_json(trained.stage.config),
    }


def write_stage(
    folder: Path,
    index: int,
    trained: TrainedStage,
    *,
    dtype: str = "float32",
    shard_bytes: int = SHARD_BYTES,
) -> list[dict[str, Any]]:
    """Writes one stage's weights, in pieces, into `folder`; returns each file's manifest entry.

    Every file's header holds, under the key "cascade", the JSON of `describe_stage`.

    Raises:
      UserError: a weight isn't finite once it is rounded.
    """
    header = {
        "cascade": json.dumps({"format_version": FORMAT_VERSION, **describe_stage(index, trained)})
    }
    params = dict(named(trained.params))
    numbers = DTYPES[dtype][1]
    specs = {name: jax.ShapeDtypeStruct(leaf.shape, numbers) for name, leaf in params.items()}

    def read(name: str, part: tuple[slice, ...]) -> np.ndarray:
        piece = np.asarray(params[name][part], numbers)
        check_finite(f"stage {index}", name, piece)
        return piece

    files = write_weights(folder, f"stage{index}", specs, read, shard_bytes, header)
    return [file_entry(folder, folder / file) for file in files]


def write_manifest(path: Path, contents: dict[str, Any]):
    """Writes an export's manifest: its format version, then `contents`."""
    document = {"format_version": FORMAT_VERSION, **contents}
    write_durably(path, json.dumps(document, indent=1, allow_nan=False).encode())
