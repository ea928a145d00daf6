"""The bundle: the folder that users share and load.

    cascade.json              version, each stage's config, training length, files; text encoder
    stage0-00001.safetensors  averaged (EMA) weights, parameter paths joined by "/"
    tokenizer/…               the text encoder's tokenizer files
    text_encoder/…            its weights, where they don't come with the package

Loading runs no code from the folder and believes nothing it says: names must stay inside the
folder, bytes must match their sums (`cascade.manifest`), and the tensors must be, to a name and a
shape, what the config's network needs (`cascade.shards`).
"""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from cascade import manifest
from cascade.config import from_json, to_json
from cascade.errors import UserError
from cascade.files import whole_folder
from cascade.parallel.rules import Rules, shardings
from cascade.registry import build
from cascade.shards import DTYPES, check_shapes, named, read_shards, write_shards
from cascade.stage import Stage
from cascade.text.encoders import ENCODERS, TextEncoder

PLACE = {"kind": "bundle", "mark": "cascade.json"}  # as `cascade.files` asks for it
WEIGHTS = "text_encoder"
SHIPPED = Path(__file__).with_name("shipped")  # the one that comes with the package
SHARD_BYTES = 16_000_000  # the usual limit of code hosts and mail is above this


class TrainedStage(NamedTuple):
    """A stage and what training made of it."""

    stage: Stage
    params: Any  # the tree that `stage.init` makes, EMA weights
    trained_steps: int | None  # None: others trained it, and don't say for how long


class Bundle(NamedTuple):
    """What a bundle holds, checked: stages that fit one another and their text encoder."""

    stages: tuple[TrainedStage, ...]
    text: dict[str, Any]  # the text section: the encoder's name and its factory's keywords
    text_encoder: TextEncoder


def check_fit(stages: Sequence[TrainedStage], text_encoder: TextEncoder):
    """Checks that stages make a cascade, and that the encoder gives the text they read.

    Raises:
      UserError: as `check_chain`, or the encoder gives other text.
    """
    check_chain(stages)
    text = _text_shape(stages[0].stage)
    if text != (text_encoder.max_length, text_encoder.width):
        raise UserError(
            f"The stages read text of {text[0]} tokens × {text[1]}, but the text encoder "
            f"{text_encoder.name!r} gives {text_encoder.max_length} × {text_encoder.width}; "
            "use the encoder that every stage was trained with."
        )


def check_chain(stages: Sequence[TrainedStage]):
    """Checks that stages make a cascade: each trained, and each fed what it was trained on.

    One that begins with a super-resolution stage enlarges what users give it.

    Raises:
      UserError: no stage, an untrained one, or one whose resolution, channels or text don't fit.
    """
    if not stages:
        raise UserError("A cascade needs at least one stage; give a trained base stage.")
    for i, (stage, _, trained_steps) in enumerate(stages):
        config = stage.config
        if trained_steps is not None and trained_steps <= 0:
            raise UserError(
                f"Stage {i} ({config.resolution}×{config.resolution}) is untrained and would draw "
                "static; train it first with `cascade train`."
            )
        wanted = stages[i - 1].stage.config.resolution
        if i > 0 and config.lowres_resolution != wanted:
            raise UserError(
                f"Stage {i} has lowres_resolution {config.lowres_resolution} where {wanted} is "
                "needed (the resolution before it); give the stages base first."
            )
        if config.channels != stages[0].stage.config.channels:
            raise UserError(
                f"Stage {i} has {config.channels} channels and stage 0 has "
                f"{stages[0].stage.config.channels}; train them on the same kind of picture."
            )
        text, first = _text_shape(stage), _text_shape(stages[0].stage)
        if text != first:
            raise UserError(
                f"Stage {i} reads text of {text[0]} tokens × {text[1]} and stage 0 of {first[0]} × "
                f"{first[1]}; train them with the same text encoder."
            )


def _text_shape(stage: Stage) -> tuple[int, int]:
    """Tokens of a text, and the width of each one's state, that a stage reads."""
    return stage.config.text_length, stage.config.text_width


def save_bundle(
    folder: str | os.PathLike,
    stages: Sequence[TrainedStage],
    text: Mapping[str, Any],
    text_encoder: TextEncoder,
    *,
    dtype: str = "float32",
    shard_bytes: int = SHARD_BYTES,
    text_weights: bool = True,
    overwrite: bool = False,
) -> Path:
    """Writes a bundle, as a whole or not at all.

    Args:
      folder: where to; its parent is made if it's missing.
      stages: base first.
      text: the config's text section `{name, **keywords}`, from which loading builds the encoder.
        A `weights` path is left out, since it means nothing elsewhere; the encoder's fingerprint
        tells whether the loader has the same weights.
      text_encoder: the encoder itself.
      dtype: "float32", or "bfloat16" for half the size at 8 bits of precision.
      shard_bytes: the most that one file of a stage may take; a larger tensor is cut to pieces.
      text_weights: carry the text encoder's weights, in the dtype it uses, unless they come with
        the package. A bundle without them is loaded with `text_weights=` or `text_encoder=`.
      overwrite: replace a bundle that is there. It is lost only once the new one is in place.

    Returns:
      The folder.

    Raises:
      UserError: the stages don't fit, a weight isn't finite or isn't of the stage's network, the
        folder is taken, or it can't be written.
    """
    if dtype not in DTYPES:
        raise UserError(f"A bundle can't hold {dtype!r} weights; choose float32 or bfloat16.")
    check_fit(stages, text_encoder)
    with whole_folder(folder, **PLACE, overwrite=overwrite) as new:
        contents = {
            "text": {
                "section": {**text, **({"weights": ""} if "weights" in text else {})},
                "fingerprint": text_encoder.fingerprint,
                "files": _entries(new, "tokenizer", text_encoder.save_tokenizer),
                "weights": _entries(new, WEIGHTS, text_encoder.save_weights)
                if text_weights
                else [],
            },
            "stages": [
                _save_stage(new, i, trained, dtype, shard_bytes) for i, trained in enumerate(stages)
            ],
        }
        manifest.write(new, contents)
    return Path(folder).resolve()


def _entries(folder: Path, name: str, save: Callable[[Path], list[str]]) -> list[dict]:
    """How cascade.json names what `save` writes into a folder of that name, if it writes any."""
    (folder / name).mkdir()
    save(folder / name)
    paths = sorted(path for path in (folder / name).rglob("*") if path.is_file())
    if not paths:
        (folder / name).rmdir()
    return [manifest.file_entry(folder, path) for path in paths]


def _save_stage(folder: Path, index: int, trained: TrainedStage, dtype: str, limit: int) -> dict:
    """Writes one stage's weights and returns its entry of cascade.json."""
    where = f"stage {index}"
    check_shapes(where, dict(named(trained.params)), _template(trained.stage))
    paths = write_shards(folder, f"stage{index}", trained.params, dtype, limit)
    return {
        "trained_steps": trained.trained_steps and int(trained.trained_steps),
        "dtype": dtype,
        "files": [manifest.file_entry(folder, path) for path in paths],
        "config": to_json(trained.stage.config),
    }


def load_bundle(
    folder: str | os.PathLike,
    text_encoder: TextEncoder | None = None,
    text_weights: str = "",
    mesh: Mesh | None = None,
) -> Bundle:
    """Reads a bundle and checks all of it; nothing in the folder is executed.

    Args:
      folder: a folder that `save_bundle` wrote.
      text_encoder: an encoder to use in place of the one that the bundle names, for encoders
        whose weights the user keeps; it must have the same fingerprint. Weights that the bundle
        carries are then not looked at.
      text_weights: where the weights of the encoder that it names are, a folder or a hub id, in
        place of those that it carries; they must be the same.
      mesh: lay the stages' weights over its devices, each tensor as it is read, of which this
        process fills its own part; None leaves them on the host.

    Raises:
      UserError: anything is missing, damaged, foreign, untrained or doesn't fit, by name.
    """
    contents = _contents(folder)
    text, folder = contents["text"], Path(folder)
    if text_encoder is None:
        section = encoder_section(folder, text, text_weights)
        text_encoder = build("text encoder", ENCODERS, section)
    if text_encoder.fingerprint != text["fingerprint"]:
        raise UserError(
            f"The text encoder {text_encoder.name!r} isn't the one that {str(folder)!r} was trained"
            " with (their fingerprints differ); give the weights of that one."
        )
    stages = _load_stages(folder, contents, mesh)
    check_fit(stages, text_encoder)
    return Bundle(stages, text["section"], text_encoder)


def load_stages(
    folder: str | os.PathLike, mesh: Mesh | None = None, rules: Rules = ()
) -> tuple[tuple[TrainedStage, ...], dict[str, Any]]:
    """As `load_bundle`, but the text encoder isn't built, and its weights aren't looked at.

    Args:
      mesh: as there.
      rules: by which weights are laid over it.

    Returns:
      The stages, and what cascade.json says of the text encoder: `section`, `fingerprint`, ….

    Raises:
      UserError: as `load_bundle`.
    """
    contents = _contents(folder)
    stages = _load_stages(Path(folder), contents, mesh, rules)
    check_chain(stages)
    return stages, contents["text"]


def _contents(folder: str | os.PathLike) -> dict[str, Any]:
    """What cascade.json holds, its text entry and the tokenizer's files checked."""
    if not os.fspath(folder):  # as an unset variable of a shell gives it
        raise UserError("The bundle's name is empty; give the folder of one.")
    folder = Path(folder)
    contents = manifest.read(folder)
    types = {"section": dict, "fingerprint": str, "files": list, "weights": list}
    text = manifest.fields("text", contents["text"], types)
    for i, entry in enumerate(text["files"]):
        manifest.read_file(folder, f"tokenizer file {i}", entry)
    return contents


def _load_stages(
    folder: Path, contents: Mapping[str, Any], mesh: Mesh | None, rules: Rules = ()
) -> tuple[TrainedStage, ...]:
    entries = enumerate(contents["stages"])
    return tuple(_load_stage(folder, i, entry, mesh, rules) for i, entry in entries)


def encoder_section(
    folder: str | os.PathLike, text: Mapping[str, Any], weights: str = ""
) -> dict[str, Any]:
    """The section to build a bundle's text encoder from, which nothing else may be built from.

    The bundle may not itself say where weights are, least of all by a path or a hub id.

    Args:
      folder: the bundle's.
      text: what it says of its encoder, as `load_stages` returns it.
      weights: in place of those that it carries, if any; a folder or a hub id.

    Raises:
      UserError: it says where weights are, or a file that it carries is missing, damaged or not in
        its folder `text_encoder`.
    """
    folder, section = Path(folder), dict(text["section"])
    if section.get("weights"):
        raise UserError(
            f"The bundle names a text encoder's weights file ({str(section['weights'])[:80]!r}), "
            "which a bundle may not do; write it again with `cascade bundle`."
        )
    if weights:
        return {**section, "weights": weights}
    for i, entry in enumerate(text["weights"]):
        name = manifest.check_file(folder, f"text encoder file {i}", entry)
        if not name.startswith(f"{WEIGHTS}/"):
            raise UserError(
                f"The bundle's text encoder has the file {name!r}, which isn't in {WEIGHTS}; "
                "write the bundle again with `cascade bundle`."
            )
    if text["weights"]:  # an absolute path can't be taken for a hub id
        section["weights"] = str((folder / WEIGHTS).resolve())
    return section


def _load_stage(
    folder: Path, index: int, entry: Any, mesh: Mesh | None, rules: Rules
) -> TrainedStage:
    """Reads one stage: its config makes the network, and the network says what to expect."""
    where = f"stage {index}"
    types = {"dtype": str, "files": list, "config": dict}
    manifest.fields(where, entry, {"trained_steps": (int, type(None)), **types})
    if entry["dtype"] not in DTYPES:
        raise UserError(f"{where} has dtype {entry['dtype'][:40]!r}; float32 or bfloat16 is known.")
    try:
        stage = Stage(from_json(entry["config"]))
        template = _template(stage)
    except Exception as error:  # a config from outside can fail anywhere in the network's code
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(
            f"The config of {where} makes no network: {reason.rstrip('.')}; "
            "write the bundle again with `cascade bundle`."
        ) from error
    files = (manifest.read_file(folder, f"{where}, file", file) for file in entry["files"])
    placed = None if mesh is None else shardings(template, mesh, rules)
    params = read_shards(where, files, entry["dtype"], template, placed)
    return TrainedStage(stage, params, entry["trained_steps"])


def _template(stage: Stage) -> Any:
    """Shapes and dtypes of a stage's parameters, without computing any."""
    return jax.eval_shape(stage.init, jax.random.key(0))
