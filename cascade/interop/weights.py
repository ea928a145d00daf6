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

import numpy as np
from safetensors.numpy import save
from tqdm import tqdm

from cascade.bundle import TrainedStage, load_stages
from cascade.config import to_json
from cascade.errors import UserError
from cascade.files import check_place, whole_folder
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
    """Writes one stage's weights into `folder`; returns each file's entry for a manifest.

    Every file's header holds, under the key "cascade", the JSON of `describe_stage`.

    Raises:
      UserError: a weight isn't finite once it is rounded.
    """
    stem = f"stage{index}"
    header = {
        "cascade": json.dumps({"format_version": FORMAT_VERSION, **describe_stage(index, trained)})
    }
    shards: list[dict[str, np.ndarray]] = [{}]
    room = shard_bytes
    for name, leaf in named(trained.params):
        tensor = np.asarray(leaf, dtype=DTYPES[dtype][1], order="C")
        check_finite(f"stage {index}", name, tensor)
        if shards[-1] and tensor.nbytes > room:
            shards.append({})
            room = shard_bytes
        shards[-1][name] = tensor
        room -= tensor.nbytes
    if len(shards) == 1:
        files = [f"{stem}.safetensors"]
    else:
        files = [
            f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)
        ]
    for file, shard in zip(files, shards, strict=True):
        write_durably(folder / file, save(shard, header))
    if len(shards) > 1:
        index_file = f"{stem}.safetensors.index.json"
        total = sum(tensor.nbytes for shard in shards for tensor in shard.values())
        places = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        document = {"metadata": {"total_size": total}, "weight_map": places}
        write_durably(folder / index_file, json.dumps(document, indent=1).encode())
        files.append(index_file)
    return [file_entry(folder, folder / file) for file in files]


def write_manifest(path: Path, contents: dict[str, Any]):
    """Writes an export's manifest: its format version, then `contents`."""
    document = {"format_version": FORMAT_VERSION, **contents}
    write_durably(path, json.dumps(document, indent=1, allow_nan=False).encode())
