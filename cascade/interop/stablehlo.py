"""A bundle's stages as StableHLO: programs that run without this package, on CPU, GPU and TPU.

    stablehlo.json            what is here: files with their sums, arguments in their order
    stage0-denoise.stablehlo  one evaluation of the network, as `jax.export` serialises it
    stage0-sample.stablehlo   the stage's whole sampler: guidance, thresholding, the loop
    stage0-denoise.mlirbc     the same as StableHLO portable artifacts, for runtimes other than jax
    stage0-sample.mlirbc
    stage0.safetensors        the weights, their first argument; see `cascade.interop.weights`
    text.safetensors          the null condition, and the embeddings of prompts given at export

The batch size is symbolic, weights are arguments. docs/stablehlo.md says how to call them and how
long they keep; examples/call_stablehlo.py does it.
"""

import importlib.metadata
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from ml_collections import FrozenConfigDict
from safetensors.numpy import save
from tqdm import tqdm

from cascade.arguments import stage_settings, stage_sizes, whole
from cascade.bundle import TrainedStage, load_bundle
from cascade.diffusion import guidance
from cascade.errors import UserError
from cascade.files import check_place, whole_folder
from cascade.interop.weights import describe_stage, describe_text, write_manifest, write_stage
from cascade.manifest import file_entry
from cascade.shards import named, write_durably
from cascade.stage import Stage
from cascade.text.interface import TextEncoder

MANIFEST = "stablehlo.json"
PLATFORMS = ("cpu", "cuda", "tpu")
TEXT_FILE = "text.safetensors"
KEY_IMPLEMENTATION = "threefry2x32"  # what a pair of uint32 is a key of
TEXT_MEANINGS = {
    "cond/text_emb": "the text encoder's states",
    "cond/text_mask": "where there is text",
}


class Program(NamedTuple):
    """One function to export.

    Attributes:
      name: "denoise" or "sample".
      call: call(params, *arguments.values()) -> a dict of arrays; `params` by flat name.
      arguments: name -> shapes, arrays [b, ...] of a symbolic b but for scalars.
      meanings: what each argument's leaf, its path joined by "/", and each result is.
    """

    name: str
    call: Callable[..., dict[str, jax.Array]]
    arguments: dict[str, Any]
    meanings: dict[str, str]


def export_stablehlo(
    bundle_folder: str | os.PathLike,
    out: str | os.PathLike,
    *,
    stages: Sequence[int] = (),
    size: tuple[int, int] | None = None,
    steps: int | Sequence[int] | None = None,
    sampler: str | None = None,
    tile: int | Sequence[int] | None = None,
    tile_overlap: int | Sequence[int] | None = None,
    prompts: Sequence[str] = (),
    text_weights: str = "",
    overwrite: bool = False,
    progress: bool = True,
) -> Path:
    """Writes the programs and weights of a bundle's stages.

    Args:
      bundle_folder: the bundle.
      out: a new folder, written as a whole or not at all.
      stages: which, numbered from 0; none given is all.
      size: (height, width) of the base picture; None is its training size. It is fixed, as is all
        else in the sampling settings but the guidance weight and the augmentation level.
      steps: sampling steps, one number for all stages or one for each; None is the bundle's.
      sampler: a name in `SAMPLERS`; None is the bundle's.
      tile, tile_overlap: pixels, as in `Cascade.__call__`; None is the bundle's.
      prompts: texts whose embeddings are stored, for those who have no text encoder.
      text_weights: the text encoder's weights, if the bundle lacks them; see `load_bundle`.
      overwrite: replace an earlier export of this kind.
      progress: show a bar.

    Returns:
      The folder.

    Raises:
      UserError: the bundle can't be loaded, an argument is out of range, a prompt is blank, or the
        folder is taken or can't be written.
    """
    place = {"kind": "StableHLO export", "mark": MANIFEST, "overwrite": overwrite}
    check_place(out, **place, sources=[bundle_folder])
    bundle = load_bundle(bundle_folder, text_weights=text_weights)
    encoder = bundle.text_encoder
    everything = [trained.stage for trained in bundle.stages]
    last = len(everything) - 1
    chosen = sorted({whole("stage", i, 0, last) for i in stages or range(len(everything))})
    sizes = stage_sizes(everything, size)
    settings = stage_settings(
        everything, sampler, steps=steps, tile=tile, tile_overlap=tile_overlap
    )
    text = _text_tensors(encoder, prompts)
    with whole_folder(out, **place) as new:
        write_durably(new / TEXT_FILE, save(text, {"prompts": json.dumps(list(prompts))}))
        contents = {
            "jax": jax.__version__,
            "jaxlib": importlib.metadata.version("jaxlib"),
            "platforms": PLATFORMS,
            "text_encoder": describe_text(bundle.stages, encoder.name, encoder.fingerprint),
            "text": file_entry(new, new / TEXT_FILE),
            "prompts": list(prompts),
            "stages": [
                _write_stage(new, i, bundle.stages[i], settings[i], sizes[i])
                for i in tqdm(chosen, unit="stage", disable=not progress)
            ],
        }
        write_manifest(new / MANIFEST, contents)
    return Path(out).resolve()


def _text_tensors(encoder: TextEncoder, prompts: Sequence[str]) -> dict[str, np.ndarray]:
    """null_emb [L, D] and null_mask [L]; text_emb [P, L, D], text_mask [P, L] where P > 0."""
    null_emb, null_mask = encoder.null()
    tensors = {"null_emb": np.asarray(null_emb, np.float32), "null_mask": np.asarray(null_mask)}
    if prompts:
        emb, mask = encoder.encode(prompts)
        if not all(map(str.strip, prompts)) or not mask.any(axis=1).all():
            raise UserError(
                "A prompt to export is blank; leave it out, the null condition is always exported."
            )
        tensors |= {"text_emb": emb, "text_mask": mask}
    return tensors


def _write_stage(
    folder: Path,
    index: int,
    trained: TrainedStage,
    settings: FrozenConfigDict,
    size: tuple[int, int],
) -> dict[str, Any]:
    """Writes one stage's programs and weights; returns its entry of the manifest."""
    stage = _portable(trained.stage)
    template = jax.eval_shape(stage.init, jax.random.key(0))
    flat = dict(named(template))

    def nested(params):
        """The stage's own parameter tree, from arrays by flat name."""
        return jax.tree.unflatten(jax.tree.structure(template), [params[name] for name in flat])

    programs = (
        _denoise_program(stage, size, nested),
        _sample_program(stage, settings, size, nested),
    )
    return {
        **describe_stage(index, trained),
        "height": size[0],
        "width": size[1],
        "settings": settings.to_dict(),
        "weights": write_stage(folder, index, trained),
        "programs": {
            program.name: _write_program(folder, f"stage{index}-{program.name}", program, flat)
            for program in programs
        },
    }


def _portable(stage: Stage) -> Stage:
    """The stage with attention that every platform can lower; its weights fit as before."""
    config = stage.config.copy_and_resolve_references()
    if "attention_implementation" in config.network:
        config.network.attention_implementation = "auto"
    return Stage(config)


def _denoise_program(stage: Stage, size: tuple[int, int], nested: Callable) -> Program:
    """The conditional network, its output turned to x_hat: no guidance, no thresholding."""
    z_t, logsnr, cond = stage.shapes(_batch(), size)
    if stage.config.lowres_upsampling == "before_noise":
        cond = {**cond, "lowres": z_t}

    def call(params, z_t, logsnr, cond):
        def predict(z_t, logsnr, cond):
            return stage.network.apply({"params": nested(params)}, z_t, logsnr, cond)

        x, fraction = guidance.denoiser(predict, stage.config.output)(z_t, logsnr, cond)
        return {"x_hat": x} | ({} if fraction is None else {"fraction": fraction})

    meanings = {
        **TEXT_MEANINGS,
        "z_t": "noisy pictures alpha x + sigma eps, x in [-1, 1], as rows, columns, channels",
        "logsnr": "log(alpha² / sigma²) of each, with alpha² = sigmoid(logsnr) = 1 - sigma²",
        "cond/lowres": "the pictures to enlarge, noised to aug_logsnr",
        "cond/aug_logsnr": "logsnr of the noise on lowres",
        "cond/guidance_weight": "w, of which x_hat is the guided estimate",
        "x_hat": "the network's estimate of x, neither guided nor thresholded",
        "fraction": "learned variance of a step t -> s: where its logarithm lies from 0, that "
        "of (1 - r) sigma_s² to that of (1 - r) sigma_t², r = exp(logsnr_t - logsnr_s)",
    }
    return Program("denoise", call, {"z_t": z_t, "logsnr": logsnr, "cond": cond}, meanings)


def _sample_program(
    stage: Stage, settings: FrozenConfigDict, size: tuple[int, int], nested: Callable
) -> Program:
    """All of `Stage.sample`: augmentation, guidance, thresholding and every step."""
    batch = _batch()
    _, cond = stage.given_shapes(batch, size)
    scalar = jax.ShapeDtypeStruct((), jnp.float32)
    arguments = {
        "cond": cond,
        "null_cond": {key: cond[key] for key in ("text_emb", "text_mask")},
        "keys": jax.ShapeDtypeStruct((batch, 2), jnp.uint32),
        "guidance_weight": scalar,
    }
    if not stage.is_base:
        arguments["aug_level"] = scalar
    weight = "w of w eps(cond) + (1 - w) eps(null_cond)"
    if stage.embeds_guidance:
        low, high = stage.config.distilled.guidance
        weight = f"w, from {low:g} to {high:g}, which the network is told; null_cond isn't used"

    def call(params, cond, null_cond, keys, guidance_weight, aug_level=None):
        typed = jax.random.wrap_key_data(keys, impl=KEY_IMPLEMENTATION)
        x = stage.sample(
            nested(params), cond, null_cond, typed, settings, size, guidance_weight, aug_level
        )
        return {"x": x}

    meanings = {
        **TEXT_MEANINGS,
        "cond/lowres": "the pictures to enlarge, clean, in [-1, 1]",
        "null_cond/text_emb": "states of what guidance leads away from: null_emb, or other text",
        "null_cond/text_mask": "likewise: null_mask, or other text's",
        "keys": f"a {KEY_IMPLEMENTATION} key for each picture: any two numbers",
        "guidance_weight": weight,
        "aug_level": "how much noise is put on lowres, 0 … 1",
        "x": "pictures in [-1, 1], as rows, columns, channels",
    }
    return Program("sample", call, arguments, meanings)


def _batch() -> Any:
    """A symbolic batch size, of a scope of its own."""
    (batch,) = export.symbolic_shape("b")
    return batch


def _write_program(
    folder: Path, stem: str, program: Program, weights: dict[str, Any]
) -> dict[str, Any]:
    """Lowers, serialises and writes a program; returns its entry of the manifest."""
    jitted = jax.jit(program.call, keep_unused=True)  # so that the manifest lists all there are
    exported = export.export(jitted, platforms=PLATFORMS)(weights, *program.arguments.values())
    files = {"jax_export": f"{stem}.stablehlo", "portable": f"{stem}.mlirbc"}
    write_durably(folder / files["jax_export"], bytes(exported.serialize()))
    write_durably(folder / files["portable"], exported.mlir_module_serialized)
    results = jax.tree.unflatten(exported.out_tree, exported.out_avals)
    return {
        **{kind: file_entry(folder, folder / file) for kind, file in files.items()},
        "calling_convention_version": exported.calling_convention_version,
        "arguments": _table(program.arguments, program.meanings),
        "results": _table(results, program.meanings),
    }


def _table(arrays: dict[str, Any], meanings: dict[str, str]) -> list[dict[str, Any]]:
    """Name, shape ("b" for the batch), dtype and meaning of each array, in order."""
    return [
        {
            "name": name,
            "shape": [side if isinstance(side, int) else str(side) for side in leaf.shape],
            "dtype": str(leaf.dtype),
            "meaning": meanings[name],
        }
        for key, tree in arrays.items()
        for name, leaf in named({key: tree})
    ]
