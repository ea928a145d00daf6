"""Reads the folders that others share weights in: a safetensors file, or shards under an index.

    config.json  model.safetensors
    config.json  model.safetensors.index.json  model-00001-of-00002.safetensors  …

and the same with `diffusion_pytorch_model` for `model`. Files are mapped, not read: a tensor, or a
slice of one, takes memory when it is asked for. Nothing is unpickled, and no file outside the
folder is opened, whatever an index or a link in it says. The folder may itself be a link, also one
that is part of a pipeline's (unet/, text_encoder/, …): files must then be where it leads.
"""

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from cascade.errors import UserError
from cascade.files import write_whole

# The first that a folder has is taken.
WEIGHT_FILES = tuple(
    f"{stem}.{ending}"
    for stem in ("model", "diffusion_pytorch_model")
    for ending in (
        "safetensors",
        "safetensors.index.json",
        "fp16.safetensors",
        "safetensors.index.fp16.json",
    )
)
PICKLES = (".bin", ".ckpt", ".pkl", ".pt", ".pth")
SHARD_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{,199}\.safetensors")
PIECE_BYTES = 16_000_000  # what copying takes of the host's memory
SHARD_BYTES = 4_000_000_000  # usual for models of many gigabytes
DESCRIPTION_BYTES = 16_000_000  # an index of a huge model takes a few megabytes
DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
}


class Weights:
    """Tensors by name, out of mapped safetensors files.

    Attributes:
      folder: where they are.
      files: the files that hold them, sorted.
    """

    def __init__(self, folder: Path, names: Mapping[str, Path]):
        """Opens the files that hold the tensors.

        Args:
          folder: for messages.
          names: tensor name → its file; every one is looked for.

        Raises:
          UserError: a file is damaged, or lacks a tensor.
        """
        self.folder = folder
        self.files = tuple(sorted(set(names.values())))
        opened = {path: _mapped(path) for path in self.files}
        held = {path: set(file.keys()) for path, file in opened.items()}
        for name, path in names.items():
            if name not in held[path]:
                raise UserError(
                    f"{str(path)!r} lacks the tensor {name!r} that its index promises; get both"
                    " again, from one source."
                )
        self._files = {name: opened[path] for name, path in names.items()}

    def names(self) -> list[str]:
        """Every tensor's name, sorted."""
        return sorted(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape; raises a UserError if there is none of that name."""
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> np.dtype:
        """The tensor's dtype, as NumPy and ml_dtypes name it.

        Raises:
          UserError: there is no such tensor, or it holds numbers that aren't read here (8 bits).
        """
        code = self._slice(name).get_dtype()
        if code not in DTYPES:
            raise UserError(
                f"The tensor {name!r} in {str(self.folder)!r} is stored as {code}, which isn't read"
                f" here; give a copy in {', '.join(DTYPES)}."
            )
        return DTYPES[code]

    def read(self, name: str, part: tuple[slice, ...] = ()) -> np.ndarray:
        """A copy of a tensor or of a part of it; only the bytes of the part are read.

        Args:
          part: a slice with step 1 for each axis, as `jax.make_array_from_callback` gives them; ()
            is the whole tensor.

        Raises:
          UserError: as `dtype`.
        """
        self.dtype(name)
        if not part:
            return self._files[name].get_tensor(name)
        return self._files[name].get_slice(name)[part]

    def _slice(self, name: str) -> Any:
        if name not in self._files:
            raise UserError(
                f"The weights in {str(self.folder)!r} lack the tensor {name!r}; give all files of"
                " the model that its config.json describes."
            )
        return self._files[name].get_slice(name)


def open_weights(folder: str | Path) -> Weights:
    """Maps the weights of a folder.

    Args:
      folder: has one of `WEIGHT_FILES`; the first of them is taken.

    Raises:
      UserError: the folder holds no safetensors (but pickles, say), a shard is missing or damaged,
        or a file lies outside the folder.
    """
    folder = Path(folder)
    for name in (name for name in WEIGHT_FILES if (folder / name).is_file()):
        path = inside(folder, name)
        if name.endswith(".json"):
            return Weights(folder, _indexed(folder, name))
        return Weights(folder, dict.fromkeys(_mapped(path).keys(), path))
    if not folder.is_dir():
        raise UserError(f"There is no folder {str(folder)!r}; give one that holds a model.")
    raise without_weights(str(folder), [path.name for path in folder.iterdir()])


def without_weights(where: str, files: Iterable[str]) -> UserError:
    """What to say of a place whose files hold no safetensors: pickles only, or no weights."""
    pickles = sorted(name for name in files if name.endswith(PICKLES))
    found = f"only pickles ({pickles[0]}), which can run code" if pickles else "no weights"
    return UserError(
        f"{where!r} holds {found}; give one with {WEIGHT_FILES[0]} or {WEIGHT_FILES[4]}, or"
        " shards and their index: DeepFloyd/IF-* and google/flan-t5-* on the hub have safetensors,"
        " and transformers' and diffusers' save_pretrained(safe_serialization=True) converts"
        " a model that you trust."
    )


def read_json(folder: str | Path, name: str) -> dict[str, Any]:
    """The object that a JSON file of the folder holds: config.json, an index, ….

    Raises:
      UserError: the file is missing, lies outside the folder, or isn't a JSON object.
    """
    path = inside(Path(folder), name)
    try:
        with open(path, "rb") as file:
            value = json.loads(file.read(DESCRIPTION_BYTES))
        if not isinstance(value, dict):
            raise ValueError("not an object")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{str(path)!r} can't be read as JSON ({error}); get it again.") from error
    return value


def inside(folder: Path, name: str) -> Path:
    """The path of a file of the folder.

    Links may lead within the folder. In the hub's own cache, where a model's folder is links to
    the `blobs` beside it, they may lead there too.

    Raises:
      UserError: there is no such file, or it lies outside the folder.
    """
    path = folder / name
    if not path.is_file():
        raise UserError(f"{str(folder)!r} has no file {name!r}; get the folder again, whole.")
    target, home = path.resolve(), folder.absolute()
    places = [folder.resolve()]
    places += [
        up.parents[1] / "blobs" for up in (home, *home.parents) if up.parent.name == "snapshots"
    ]
    if not any(target.is_relative_to(place.resolve()) for place in places):
        raise UserError(
            f"{name!r} in {str(folder)!r} leads outside the folder, to {str(target)!r}; put the"
            " file itself there if you trust it."
        )
    return path


def _indexed(folder: Path, index: str) -> dict[str, Path]:
    """Tensor name → file, as an index says it, once every file is proved to be of the folder."""
    weight_map = read_json(folder, index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(
            f"{str(folder / index)!r} has no weight_map, which says what file a tensor is in; get"
            " it again."
        )
    for shard in weight_map.values():
        if not isinstance(shard, str) or not SHARD_NAME.fullmatch(shard):
            raise UserError(
                f"{str(folder / index)!r} names the file {str(shard)[:80]!r}, which isn't the plain"
                " name of a safetensors file in its folder; don't trust it, and get it from its"
                " maker."
            )
    paths = {shard: inside(folder, shard) for shard in sorted(set(weight_map.values()))}
    return {name: paths[shard] for name, shard in weight_map.items()}


def _mapped(path: Path):
    """Opens a safetensors file, its header checked against its size."""
    try:
        return safe_open(path, "np")
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{str(path)!r} is damaged or isn't a safetensors file ({error}); get it again."
        ) from error


def rows(shape: tuple[int, ...], itemsize: int) -> Iterator[tuple[slice, ...]]:
    """Parts of a tensor, one after another along its first axis, of about `PIECE_BYTES` each."""
    if not shape:
        yield ()
        return
    rest = tuple(slice(0, n) for n in shape[1:])
    step = max(PIECE_BYTES // max(math.prod(shape[1:]) * itemsize, 1), 1)
    for start in range(0, shape[0], step):
        yield slice(start, min(start + step, shape[0])), *rest


def write_weights(
    folder: Path,
    stem: str,
    specs: Mapping[str, Any],
    read: Callable[[str, tuple[slice, ...]], np.ndarray],
    shard_bytes: int = SHARD_BYTES,
    metadata: Mapping[str, str] | None = None,
) -> list[str]:
    """Writes tensors as `open_weights` and everybody else reads them, piece by piece.

    Args:
      folder: an existing one, which nobody reads yet.
      stem: "model" or "diffusion_pytorch_model".
      specs: tensor name → anything with `shape` and `dtype`.
      read: gives a part of a tensor, as `Weights.read`; all of it with ().
      shard_bytes: what a file holds at most, but for a single tensor that is larger.
      metadata: what every file's header says of it, beside its format.

    Returns:
      The names of the files: one, or shards and their index.
    """
    sizes = {name: math.prod(spec.shape) * spec.dtype.itemsize for name, spec in specs.items()}
    shards, room = [], 0
    for name, size in sizes.items():
        if not shards or size > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(name)
        room -= size
    count = len(shards)
    files = [f"{stem}-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    files = files if count > 1 else [f"{stem}.safetensors"]
    for file, names in zip(files, shards, strict=True):
        _write_file(folder / file, {name: specs[name] for name in names}, read, metadata or {})
    if count == 1:
        return files
    weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
    write_whole(folder / f"{stem}.safetensors.index.json", json.dumps(index, indent=1))
    return [*files, f"{stem}.safetensors.index.json"]


def _write_file(path: Path, specs: Mapping[str, Any], read, metadata: Mapping[str, str]):
    """One safetensors file: the header's length in 8 bytes, the header, the tensors in a row."""
    codes = {dtype: code for code, dtype in DTYPES.items()}
    header, end = {"__metadata__": {"format": "pt", **metadata}}, 0  # transformers asks for "pt"
    for name, spec in specs.items():
        start, end = end, end + math.prod(spec.shape) * spec.dtype.itemsize
        code = codes[np.dtype(spec.dtype)]
        header[name] = {"dtype": code, "shape": list(spec.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, spec in specs.items():
            for part in rows(spec.shape, spec.dtype.itemsize):
                piece = np.ascontiguousarray(read(name, part), spec.dtype)
                file.write(piece.reshape(-1).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())
