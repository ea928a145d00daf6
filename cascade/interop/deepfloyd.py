"""DeepFloyd IF, as diffusers keeps it on disk, into a bundle of ours.

    model_index.json   unet/          scheduler/     image_noising_scheduler/ (stages II and III)
    text_encoder/      tokenizer/     safety_checker/, feature_extractor/, watermarker/: not read

Only JSON, safetensors and the SentencePiece vocabulary are read. docs/deepfloyd.md says what the
import means by each of IF's settings.
"""

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict
from tqdm import tqdm

from cascade.bundle import PLACE, TrainedStage, save_bundle
from cascade.errors import UserError
from cascade.files import check_place
from cascade.interop import if_scheduler, if_unet
from cascade.interop.description import excerpt
from cascade.interop.folders import open_weights, read_json
from cascade.interop.hub import resolve
from cascade.interop.if_weights import read_params
from cascade.registry import build
from cascade.stage import Stage
from cascade.text.encoders import ENCODERS

log = logging.getLogger(__name__)

# How IF's pipelines read a prompt; the rest of the text section is where, and in which precision.
TEXT = {
    "name": "t5",
    "max_length": 77,
    "null": "empty_prompt",
    "keep_padding": True,
    "lower_case": True,
}
NOISE_LEVEL = 250  # timestep of the noise on a low-resolution picture, IF's default
# Steps and guidance weight that diffusers' pipelines have by default.
BASE_DRAWING = {"steps": 100, "guidance": 7.0}
LATER_DRAWING = {"steps": 50, "guidance": 4.0}

PIPELINES = ("IFPipeline", "IFSuperResolutionPipeline")  # the first stage's, and any later one's
COMPONENTS = {  # name -> classes it may be of
    "unet": ("UNet2DConditionModel",),
    "scheduler": ("DDPMScheduler",),
    "image_noising_scheduler": ("DDPMScheduler",),
    "text_encoder": ("T5EncoderModel",),
    "tokenizer": ("T5Tokenizer", "T5TokenizerFast"),
}
LEFT_OUT = ("safety_checker", "feature_extractor", "watermarker")


def import_deepfloyd(
    sources: Sequence[str | os.PathLike],
    out: str | os.PathLike,
    *,
    dtype: str = "float32",
    overwrite: bool = False,
) -> Path:
    """Makes a bundle of DeepFloyd IF pipelines.

    Tensors are read, turned round and written one after another: no network is in memory whole.

    Args:
      sources: diffusers' pipeline folders, or hub ids; stage I first, then II and III.
      out: the bundle's folder.
      dtype: "float32" or "bfloat16": how weights are stored, and what the networks compute in.
      overwrite: replace a bundle that is there.

    Returns:
      The bundle's folder.

    Raises:
      UserError: a folder isn't what it claims to be, an option or a tensor has no counterpart here,
        or whatever `save_bundle` finds.
    """
    if not sources:
        raise UserError("There is no source to import; give stage I's folder or hub id first.")
    check_place(out, **PLACE, overwrite=overwrite, sources=sources)
    folders = [resolve(source) for source in sources]
    indices = [_index(folder, i > 0) for i, folder in enumerate(folders)]
    text, encoder = _text(folders, indices, dtype)
    sections = []
    for folder, index in zip(folders, indices, strict=True):
        section = stage_section(
            str(folder),
            _descriptions(folder, index),
            lowres_resolution=sections[-1].resolution if sections else 0,
            text_length=encoder.max_length,
            dtype=dtype,
        )
        sections.append(section)
    log.warning(
        "Of %s, the safety checker and the watermarker (where there are any) aren't imported: "
        "pictures are drawn unchecked and unmarked.",
        ", ".join(map(str, folders)),
    )
    with tqdm(unit="tensor", desc="importing") as bar:
        stages = [
            _stage(folder / "unet", section, bar)
            for folder, section in zip(folders, sections, strict=True)
        ]
        bar.total = sum(len(jax.tree.leaves(stage.params)) for stage in stages)
        return save_bundle(out, stages, text, encoder, dtype=dtype, overwrite=overwrite)


def stage_section(
    where: str,
    descriptions: Mapping[str, Mapping[str, Any]],
    *,
    lowres_resolution: int,
    text_length: int,
    dtype: str,
) -> ConfigDict:
    """The stage section that a pipeline's descriptions make.

    Args:
      where: the pipeline, for messages.
      descriptions: part -> its config: unet, scheduler and, of a super-resolution pipeline,
        image_noising_scheduler.
      lowres_resolution: of the pipeline before; 0 for the first.
      text_length: tokens of a prompt.
      dtype: what the network computes in.

    Raises:
      UserError: naming an option that isn't built here.
    """
    files = {name: f"{where}/{name}/{config_file(name)}" for name in descriptions}
    later = lowres_resolution > 0
    unet = if_unet.read(files["unet"], descriptions["unet"], later)
    drawn = if_scheduler.read(
        files["scheduler"], descriptions["scheduler"], unet["learned_variance"]
    )
    noising = "image_noising_scheduler"
    aug = if_scheduler.read_noising(files[noising], descriptions[noising]) if later else None
    if later and unet["network"]["embed_aug"] and aug != drawn["schedule"]:
        raise UserError(
            f"{files[noising]} has other betas than the scheduler, but only a network that embeds "
            "both noise levels on one scale is built here."
        )
    computing = {
        "noise_embedding": drawn["schedule"]["betas"],
        "attention_implementation": "auto",
        "dtype": dtype,
        "remat": "none",
        "scan_blocks": False,
    }
    return ConfigDict(
        {
            **unet,
            "network": {**unet["network"], **computing},
            "lowres_resolution": lowres_resolution,
            "crop_resolution": 0,
            "text_length": text_length,
            "schedule": drawn["schedule"],
            "output": drawn["output"],
            "weighting": {"name": "eps"},
            "text_drop": 0.1,
            "distilled": {"steps": 0, "guidance": ()},
            "lowres_upsampling": "before_noise",
            "aug_schedule": aug or drawn["schedule"],
            "sampling": {
                **drawn["sampling"],
                **(LATER_DRAWING if later else BASE_DRAWING),
                "guidance_schedule": {"name": "constant"},
                "searched": (),
                "rescale": 0.0,
                "aug_level": (NOISE_LEVEL + 1) / if_scheduler.TIMESTEPS if later else 0.0,
                "tile": 0,
                "tile_overlap": 0,
            },
        }
    )


def config_file(name: str) -> str:
    """Where a part of a pipeline is described, in the folder of its name."""
    return "scheduler_config.json" if "scheduler" in name else "config.json"


def _index(folder: Path, later: bool) -> dict[str, Any]:
    """A pipeline's model_index.json, its classes checked."""
    where = str(folder / "model_index.json")
    index = read_json(folder, "model_index.json")
    expected = PIPELINES[later]
    if index.get("_class_name") != expected:
        raise UserError(
            f"{where!r} says it is {excerpt(index.get('_class_name'))} where {expected} is needed; "
            "give stage I's pipeline first, then the later stages'."
        )
    needed = ["unet", "scheduler", *(["image_noising_scheduler"] if later else [])]
    for name in needed:
        if not _has(index, name):
            raise UserError(f"{where!r} names no {name}; give a whole pipeline's folder.")
    for name, value in index.items():
        if name.startswith("_") or name in (*LEFT_OUT, "requires_safety_checker"):
            continue
        if name not in COMPONENTS:
            raise UserError(
                f"{where!r} names the part {excerpt(name)}, which isn't known here; give a "
                "pipeline of DeepFloyd IF as it was published."
            )
        if _has(index, name) and value[1] not in COMPONENTS[name]:
            raise UserError(
                f"{where!r} says that its {name} is a {excerpt(value[1])}, but only "
                f"{' or '.join(COMPONENTS[name])} is read here."
            )
    return index


def _has(index: Mapping[str, Any], name: str) -> bool:
    """Whether a pipeline has a part: [library, class], and not [null, null]."""
    value = index.get(name)
    return isinstance(value, list) and len(value) == 2 and isinstance(value[1], str)


def _descriptions(folder: Path, index: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The configs of a pipeline's network and schedulers, each of the class that was promised."""
    descriptions = {}
    for name in ("unet", "scheduler", "image_noising_scheduler"):
        if not _has(index, name):
            continue
        file = config_file(name)
        read = read_json(folder / name, file)
        if read.get("_class_name") != index[name][1]:
            raise UserError(
                f"{str(folder / name / file)!r} says it is {excerpt(read.get('_class_name'))}, "
                f"but model_index.json says {index[name][1]!r}; get the pipeline again, whole."
            )
        descriptions[name] = read
    return descriptions


def _text(folders: Sequence[Path], indices: Sequence[Mapping], dtype: str):
    """The text section and the encoder that all pipelines share; stage I must have it.

    Raises:
      UserError: stage I has none, or a later one has another.
    """
    section = {**TEXT, "weights": str(folders[0]), "dtype": dtype}
    for name in ("text_encoder", "tokenizer"):
        if not (_has(indices[0], name) and (folders[0] / name).is_dir()):
            raise UserError(
                f"{str(folders[0])!r} has no {name}; give stage I's pipeline with its T5."
            )
    encoder = build("text encoder", ENCODERS, section)
    encoder.tokenize([""])  # a vocabulary that can't be read is found now, not when drawing
    for folder, index in zip(folders[1:], indices[1:], strict=True):
        if not _has(index, "text_encoder"):
            continue
        other = build("text encoder", ENCODERS, {**section, "weights": str(folder)})
        if other.fingerprint != encoder.fingerprint:
            raise UserError(
                f"{str(folder)!r} has another text encoder than {str(folders[0])!r}, but the "
                "stages of a cascade share one; give pipelines that were trained with the same T5."
            )
    return section, encoder


def _stage(folder: Path, section: ConfigDict, bar: tqdm) -> TrainedStage:
    """A stage whose parameters are read when they are asked for."""
    stage = Stage(section)
    template = jax.eval_shape(stage.init, jax.random.key(0))
    levels = len(section.network.channel_mults)
    params = read_params(open_weights(folder), template, levels, bar.update)
    return TrainedStage(stage, params, None)
