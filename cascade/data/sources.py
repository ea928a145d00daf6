"""Where captioned pictures come from: one registry of random-access sources.

A source has `__len__`, and `source[i]` is a record {"image": encoded file as bytes or uint8
[H, W, 3], "captions": texts with the plainest first, "key": str}. `source.captions(i)` reads
captions alone, without decoding a picture, and `source.key(i)` reads nothing. `source.folder` is
where it lies (None: nowhere) and `source.fingerprint` changes when its content does. Sources are
picklable: workers open their own.
"""

import glob
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from cascade.data.fingerprint import fingerprint
from cascade.data.folder import Folder
from cascade.data.preprocess import BrokenPicture, Filtered
from cascade.errors import UserError


def tfds(
    dataset: str, data_dir: str, split: str, image_key: str, caption_key: str, template: str
) -> "Tfds":
    """A data set that TFDS has prepared, ours or any other, read without TensorFlow.

    Args:
      dataset: its name, with config: "emoji/demo", "cifar10".
      data_dir: folder that it was prepared in.
      split: as TFDS writes it: "train", "heldout", "train[:90%]".
      image_key: name of the picture's feature.
      caption_key: name of the feature with a text, several texts, or class labels; a path where it
        lies within another: "captions/text".
      template: text around each caption: "{}" for none, "a photo of a {}" for labels.

    Raises:
      UserError: no such data set or split, or no such picture or text in it.
    """
    return Tfds(dataset, data_dir, split, image_key, caption_key, template)


class Tfds:
    """See `tfds`."""

    def __init__(self, dataset, data_dir, split, image_key, caption_key, template):
        self._arguments = (dataset, data_dir, split, image_key, caption_key, template)
        import tensorflow_datasets as library
        from tensorflow_datasets.core import read_only_builder

        try:
            builder = read_only_builder.builder_from_files(
                dataset, data_dir=os.path.expanduser(data_dir)
            )
        except (library.core.DatasetNotFoundError, OSError) as error:
            raise UserError(
                f"There is no data set {dataset!r} in {data_dir!r}; prepare it, as with "
                f"`cascade data build emoji --out {data_dir}`, or correct `dataset` and `data_dir`."
            ) from error
        try:
            template.format("")
        except (LookupError, ValueError) as error:
            raise UserError(
                f"The template {template!r} is wrong; write {{}} for the caption."
            ) from error
        features = builder.info.features
        leaves = leaf_features(features)
        images = [key for key, f in features.items() if isinstance(f, library.features.Image)]
        texts = [path for path, f in leaves.items() if _holds_text(f)]
        for what, key, known in (("picture", image_key, images), ("text", caption_key, texts)):
            if key not in known:
                is_other = f"; that is {leaves[key]}" if key in leaves else ""
                raise UserError(
                    f"Data set {dataset!r} has no {what} feature {key!r}{is_other}; "
                    f"choose from {', '.join(sorted(known)) or 'another data set'}."
                )
        try:
            self._records = builder.as_data_source(
                split, decoders={image_key: library.decode.SkipDecoding()}
            )
        except (ValueError, KeyError) as error:
            raise UserError(
                f"Data set {dataset!r} has no split {split!r}; choose from "
                f"{', '.join(sorted(builder.info.splits))}."
            ) from error
        self._image_key, self._caption_key, self._template = image_key, caption_key, template
        self._names = getattr(leaves[caption_key], "names", None)
        self.folder = Path(builder.data_dir)
        self.fingerprint = fingerprint(
            [f for f in self.folder.iterdir() if f.is_file()], self._arguments
        )

    def __reduce__(self):
        return (Tfds, self._arguments)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, i: int) -> dict:
        record = self._records[i]
        key = record.get("key", b"")
        return {
            "image": record[self._image_key],
            "captions": self._texts(record),
            "key": key.decode() if isinstance(key, bytes) and key else str(i),
        }

    def key(self, i: int) -> str:
        """What messages call record i while it isn't read: its number."""
        return str(i)

    def captions(self, i: int) -> list[str]:
        """The captions of record i."""
        return self._texts(self._records[i])

    def _texts(self, record: dict) -> list[str]:
        value = record
        for key in self._caption_key.split("/"):
            value = value[key]  # TFDS gives a sequence of dicts as a dict of sequences
        values = value if isinstance(value, list | np.ndarray) else [value]
        return [self._template.format(_text(v, self._names)) for v in values]


def leaf_features(feature, path: str = "") -> dict[str, Any]:
    """Path -> the TFDS feature there, without the sequences it is in: {"captions/text": Text}."""
    from tensorflow_datasets.core.features import FeaturesDict, Sequence

    if isinstance(feature, Sequence):
        return leaf_features(feature.feature, path)
    if not isinstance(feature, FeaturesDict):
        return {path: feature}
    inner = (leaf_features(f, f"{path}/{key}" if path else key) for key, f in feature.items())
    return {path: leaf for leaves in inner for path, leaf in leaves.items()}


def _holds_text(feature) -> bool:
    return hasattr(feature, "names") or feature.np_dtype == np.object_


def _text(value, names: list[str] | None) -> str:
    return value.decode("utf-8", errors="replace") if names is None else names[int(value)]


def array_record(files: str, image_key: str, caption_key: str) -> "ArrayRecord":
    """ArrayRecord files of tf.train.Example records.

    Args:
      files: a glob pattern: "shards/train-*.array_record".
      image_key: feature with the encoded picture.
      caption_key: feature with one caption or several, UTF-8.

    Raises:
      UserError: no file matches, or one can't be read.
    """
    return ArrayRecord(files, image_key, caption_key)


class ArrayRecord:
    """See `array_record`."""

    def __init__(self, files, image_key, caption_key):
        self._arguments = (files, image_key, caption_key)
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        paths = sorted(glob.glob(os.path.expanduser(files)))
        if not paths:
            raise UserError(f"No file matches {files!r}; correct the pattern `files`.")
        try:
            self._records = ArrayRecordDataSource(paths)
            self._count = len(self._records)
        except Exception as error:  # the library raises several kinds
            raise UserError(f"Cannot read {files!r} as ArrayRecord files: {error}.") from error
        if self._count:
            features = self._features(0)
            for key in (image_key, caption_key):
                if key not in features:
                    raise UserError(
                        f"The records of {files!r} have no feature {key!r}; choose from "
                        f"{', '.join(sorted(features))}."
                    )
        self.folder = Path(paths[0]).parent
        self.fingerprint = fingerprint(map(Path, paths), self._arguments)

    def __reduce__(self):
        return (ArrayRecord, self._arguments)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, i: int) -> dict:
        features = self._features(i)
        image = features[self._arguments[1]].bytes_list.value[0]
        key = features["key"].bytes_list.value[0].decode() if "key" in features else str(i)
        return {"image": image, "captions": self._texts(features), "key": key}

    def key(self, i: int) -> str:
        """What messages call record i while it isn't read: its number."""
        return str(i)

    def captions(self, i: int) -> list[str]:
        """The captions of record i."""
        return self._texts(self._features(i))

    def _features(self, i: int):
        from tensorflow_datasets.proto import tf_example_pb2

        return tf_example_pb2.Example.FromString(self._records[i]).features.feature

    def _texts(self, features) -> list[str]:
        return [
            v.decode("utf-8", errors="replace")
            for v in features[self._arguments[2]].bytes_list.value
        ]


def folder(path: str) -> Folder:
    """A folder of pictures with captions, see `cascade.data.folder.Folder`."""
    return Folder(path)


def synthetic(records: int, side: int, captions: int, seed: int) -> "Synthetic":
    """Random pictures of one size and captions "picture of class i", for benchmarks and tests.

    Args:
      records: how many.
      side: of each picture in pixels.
      captions: how many distinct captions.
      seed: decides the pixels.
    """
    return Synthetic(records, side, captions, seed)


class Synthetic:
    """See `synthetic`."""

    folder = None

    def __init__(self, records, side, captions, seed):
        if min(records, side, captions) < 1:
            raise UserError("A synthetic source needs records, side and captions of 1 or more.")
        self._arguments = (records, side, captions, seed)
        self.fingerprint = fingerprint([], self._arguments)

    def __reduce__(self):
        return (Synthetic, self._arguments)

    def __len__(self) -> int:
        return self._arguments[0]

    def __getitem__(self, i: int) -> dict:
        _, side, _, seed = self._arguments
        noise = np.random.default_rng([seed, i]).bytes(side * side * 3)
        image = np.frombuffer(noise, np.uint8).reshape(side, side, 3)
        return {"image": image, "captions": self.captions(i), "key": str(i)}

    def key(self, i: int) -> str:
        """What messages call record i while it isn't read: its number."""
        return str(i)

    def captions(self, i: int) -> list[str]:
        """The captions of record i."""
        return [f"picture of class {i % self._arguments[2]}"]


SOURCES = {
    "tfds": tfds,
    "array_record": array_record,
    "folder": folder,
    "synthetic": synthetic,
}


def read_record(source, i: int) -> dict:
    """Record i.

    Raises:
      BrokenPicture: it can't be read, has no caption, or one that is no valid text.
    """
    record = _sound(source.__getitem__, i)
    if not record["captions"]:
        raise BrokenPicture("it has no caption")
    _check_texts(record["captions"])
    return record


def captions_of(source) -> Iterator[str]:
    """Every caption of every record that can be read, repeats included, decoding no picture."""
    for i in range(len(source)):
        with suppress(BrokenPicture):
            captions = _sound(source.captions, i)
            _check_texts(captions)
            yield from captions


def _check_texts(captions: list[str]):
    """Raises BrokenPicture for half a character, which JSON can spell and no tokenizer can read."""
    for caption in captions:
        try:
            caption.encode()
        except UnicodeEncodeError as error:
            raise BrokenPicture(f"its caption {caption!r} holds a lone surrogate") from error


def _sound(read: Callable[[int], Any], i: int):
    """read(i), with whatever a library says of a damaged record as BrokenPicture."""
    try:
        return read(i)
    except (BrokenPicture, Filtered, UserError):
        raise
    except Exception as error:
        raise BrokenPicture(f"{type(error).__name__}: {error}") from error
