"""A bundle as pipelines that diffusers loads and runs.

    stage0/   IFPipeline                 model_index.json  unet/  scheduler/  text_encoder/
    stage1/   IFSuperResolutionPipeline    tokenizer/  image_noising_scheduler/ (from stage 1)

diffusers knows networks like ours by DeepFloyd IF's. Whatever else a stage's config says is found
by reading back what was written: an export draws what the bundle draws, or is refused.
"""

import json
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from cascade.bundle import TrainedStage, load_bundle
from cascade.errors import UserError
from cascade.files import check_place, whole_folder, write_whole
from cascade.interop import if_scheduler, if_unet
from cascade.interop.deepfloyd import LEFT_OUT, PIPELINES, TEXT, config_file, stage_section
from cascade.interop.folders import write_weights
from cascade.interop.if_weights import places, to_diffusers
from cascade.shards import DTYPES, check_finite, named
from cascade.text.interface import TextEncoder

LIBRARIES = {
    "unet": ["diffusers", "UNet2DConditionModel"],
    "scheduler": ["diffusers", "DDPMScheduler"],
    "image_noising_scheduler": ["diffusers", "DDPMScheduler"],
    "text_encoder": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "T5Tokenizer"],
}
# Keys that change no picture, or that a caller of diffusers' pipelines states: these may differ.
UNWRITTEN = {
    "crop_resolution",
    "weighting",
    "text_drop",
    "sampling.steps",
    "sampling.searched",
    "sampling.guidance",
    "sampling.aug_level",
    "network.attention_implementation",
    "network.dtype",
    "network.remat",
}


def export_diffusers(
    bundle_folder: str | os.PathLike,
    out: str | os.PathLike,
    *,
    dtype: str = "float32",
    text_weights: str = "",
    overwrite: bool = False,
) -> Path:
    """Writes a bundle as diffusers' pipelines, a folder for each stage.

    Steps, guidance and augmentation level aren't part of a pipeline: its caller states them.

    Args:
      bundle_folder: the bundle.
      out: a new folder, written as a whole or not at all.
      dtype: "float32" or "bfloat16", of the U-Nets' weights; T5's are kept as they are.
      text_weights: the text encoder's weights, if the bundle lacks them; see `load_bundle`.
      overwrite: replace an earlier export of this kind.

    Returns:
      The folder.

    Raises:
      UserError: the bundle can't be loaded; a setting that diffusers can't express, by name; or the
        folder is taken or can't be written.
    """
    if dtype not in DTYPES:
        raise UserError(f"Weights can't be exported as {dtype!r}; choose from {', '.join(DTYPES)}.")
    place = {"kind": "diffusers export", "mark": "stage0/model_index.json", "overwrite": overwrite}
    check_place(out, **place, sources=[bundle_folder])
    bundle = load_bundle(bundle_folder, text_weights=text_weights)
    _check_text(bundle.text)
    descriptions = [_described(i, trained) for i, trained in enumerate(bundle.stages)]
    with whole_folder(out, **place) as new:
        for i, trained in enumerate(tqdm(bundle.stages, unit="stage", desc="exporting")):
            _write_pipeline(new / f"stage{i}", descriptions[i], later=not trained.stage.is_base)
            _write_unet(new / f"stage{i}" / "unet", trained, dtype)
            if i == 0:
                _write_text(new / "stage0", bundle.text_encoder)
            else:
                for part in ("text_encoder", "tokenizer"):
                    shutil.copytree(
                        new / "stage0" / part, new / f"stage{i}" / part, copy_function=_link
                    )
    return Path(out).resolve()


def _check_text(section: Mapping[str, Any]):
    """Raises a UserError unless diffusers' pipelines read text as the bundle does."""
    for key, value in TEXT.items():
        if section.get(key) != value:
            raise UserError(
                f"The bundle's text encoder has {key} = {section.get(key)!r}, but diffusers' "
                f"pipelines of this kind have {value!r}; export it with --to safetensors or "
                "stablehlo instead."
            )


def _described(index: int, trained: TrainedStage) -> dict[str, dict[str, Any]]:
    """The configs of a stage's U-Net and schedulers, proved to say all that the stage's does."""
    stage = trained.stage.config.to_dict()
    written = {"unet": if_unet.write(stage), "scheduler": if_scheduler.write(stage)}
    if stage["lowres_resolution"]:
        written["image_noising_scheduler"] = if_scheduler.write_noising(stage)
    read = stage_section(
        f"stage {index}",
        written,
        lowres_resolution=stage["lowres_resolution"],
        text_length=stage["text_length"],
        dtype=stage["network"]["dtype"],
    )
    ours, theirs = _settings(stage), _settings(read.to_dict())
    # Another name of a part says more than the settings that come with it.
    for key in sorted({**ours, **theirs}, key=lambda path: not path.endswith(".name")):
        if not _same(ours.get(key), theirs.get(key)):
            raise UserError(
                f"Stage {index} has {key} = {ours.get(key)!r}, which diffusers can't express "
                f"({theirs.get(key)!r} is the nearest); export it with --to safetensors or "
                "stablehlo instead."
            )
    if not stage["learned_variance"]:
        raise UserError(
            f"Stage {index} has learned_variance = False, but diffusers' pipelines of this kind "
            "need networks that learned it; export it with --to safetensors or stablehlo instead."
        )
    return written


def _settings(stage: dict[str, Any]) -> dict[str, Any]:
    """A stage section as path -> value: only what changes its pictures, each in one spelling."""
    network, base = dict(stage["network"]), stage["lowres_resolution"] == 0
    unit = network.pop("channels")
    network["channel_mults"] = tuple(unit * mult for mult in network["channel_mults"])
    if not (network["pool_heads"] and network["text_channels"]):
        del network["pool_projected"]
    if base:
        del network["embed_aug"]
    stage = {key: value for key, value in stage.items() if key != "network"}
    if base:
        del stage["lowres_upsampling"], stage["aug_schedule"]
    flat = {}

    def walk(path: str, value: Any):
        if isinstance(value, Mapping):
            for key, inner in value.items():
                walk(f"{path}.{key}" if path else key, inner)
        elif path not in UNWRITTEN:
            flat[path] = value

    walk("", {**stage, "network": network})
    if stage["learned_variance"]:
        flat.pop("sampling.sampler.gamma", None)  # the learned one goes before it
    return flat


def _same(ours: Any, theirs: Any) -> bool:
    """Equality; of floats, but for the rounding of an inverse."""
    if isinstance(ours, float) and isinstance(theirs, float):
        return math.isclose(ours, theirs, rel_tol=1e-12)
    return ours == theirs


def _write_pipeline(folder: Path, descriptions: Mapping[str, Mapping], later: bool):
    """A pipeline's model_index.json, and each part's config in a folder of its name."""
    parts = [*descriptions, "text_encoder", "tokenizer"]
    index = {
        "_class_name": PIPELINES[later],
        **{name: LIBRARIES[name] for name in parts},
        **{name: [None, None] for name in LEFT_OUT},
        "requires_safety_checker": False,
    }
    folder.mkdir()
    write_whole(folder / "model_index.json", json.dumps(index, indent=1))
    for name, description in descriptions.items():
        (folder / name).mkdir()
        write_whole(folder / name / config_file(name), json.dumps(description, indent=1))


def _write_unet(folder: Path, trained: TrainedStage, dtype: str):
    """A U-Net's weights, turned round one tensor at a time.

    Raises:
      UserError: a weight isn't finite once it is rounded.
    """
    params = dict(named(trained.params))
    levels = len(trained.stage.config.network.channel_mults)
    sources = {
        name: (path, place)
        for path, place in places(trained.params, levels).items()
        for name in place.names
    }
    specs = {
        name: jax.ShapeDtypeStruct(place.shape, DTYPES[dtype][1])
        for name, (_, place) in sources.items()
    }

    def read(name: str, part: tuple[slice, ...]) -> np.ndarray:
        path, place = sources[name]
        turned = to_diffusers(np.asarray(params[path]), place)[name][part]
        piece = turned.astype(DTYPES[dtype][1], copy=False)
        check_finite(folder.parent.name, path, piece)
        return piece

    write_weights(folder, "diffusion_pytorch_model", specs, read)


def _write_text(folder: Path, encoder: TextEncoder):
    """The text encoder and its tokenizer, in a folder each."""
    (folder / "text_encoder").mkdir()
    (folder / "tokenizer").mkdir()
    encoder.save_weights(folder / "text_encoder")
    for file in encoder.save_tokenizer(folder / "tokenizer"):
        (folder / "text_encoder" / file).unlink()
    write_whole(
        folder / "tokenizer" / "tokenizer_config.json",
        json.dumps({"tokenizer_class": "T5Tokenizer", "extra_ids": 100}, indent=1),
    )


def _link(source: str, target: str):
    """Two names for one file, where the file system has that; T5-XXL takes 20 GB."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
