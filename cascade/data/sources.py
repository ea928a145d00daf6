"""Where captioned pictures come from: one registry of random-access sources.

A source has `__len__`, and `source[i]` is a record {"image": encoded file as bytes or uint8
[H, W, 3], "captions": texts with the plainest first, "key": str}, and of a TFDS data set with such
a text "scene", what is where (see `cascade.data.emoji.scenes`). `source.captions(i)` reads
captions alone, without decoding a picture, and `source.key(i)` reads nothing. `source.folder` is
where it lies (None: nowhere), `source.fingerprint` changes when its content or its place does and
`source.contents` when its content does (see `cascade.data.fingerprint`). Sources are picklable:
workers open their own.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from cascade.data.fingerprint import fingerprint
from cascade.data.folder import Folder
from cascade.data.mixture import Mixture
from cascade.data.preprocess import BrokenPicture, Filtered
from cascade.data.record_files import ArrayRecord
from cascade.data.table import Table
from cascade.data.tars import Tars
from cascade.data.tfds_reader import Tfds
from cascade.errors import UserError
from cascade.registry import build

# Where a source's arguments say where data lies; they may change and the data stay the same.
PLACES = ("data_dir", "path", "files", "root")


def tfds(
    dataset: str, data_dir: str, split: str, image_key: str, caption_key: str, template: str
) -> Tfds:
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


def array_record(files: str, image_key: str, caption_key: str) -> ArrayRecord:
    """ArrayRecord files of tf.train.Example records.

    Args:
      files: a glob pattern: "shards/train-*.array_record".
      image_key: feature with the encoded picture.
      caption_key: feature with one caption or several, UTF-8.

    Raises:
      UserError: no file matches, or one can't be read.
    """
    return ArrayRecord(files, image_key, caption_key)


def folder(path: str) -> Folder:
    """A folder of pictures with captions, see `cascade.data.folder.Folder`."""
    return Folder(path)


def webdataset(files: str, caption_file: str, caption_key: str) -> Tars:
    """WebDataset tars, read where they lie: `00012.jpg` with `00012.txt` or `00012.json`.

    The first time, each tar is read through for where its records lie, see
    `cascade.data.tars.open_index`. A record without a picture or a caption is a broken one.

    Args:
      files: a glob pattern: "shards/*.tar"; the tars must not be compressed.
      caption_file: "txt", a caption a line, or "json", an object.
      caption_key: of the JSON object, the key of its caption or list of captions, "outer/inner"
        where it lies within another; "" with "txt".

    Raises:
      UserError: no file matches, or one is no plain tar, damaged or cut short.
    """
    return Tars(files, caption_file, caption_key)


def parquet(files: str, root: str, file_column: str, caption_column: str) -> Table:
    """Parquet tables of picture files' paths and their captions.

    The two columns are held in memory, so a table of many millions of rows wants to go through
    `cascade data prepare` once. A picture that isn't there is a broken record.

    Args:
      files: a glob pattern: "tables/*.parquet".
      root: folder that the paths begin in, which they can't leave.
      file_column: column with paths.
      caption_column: column with texts or lists of texts.

    Raises:
      UserError: no file matches, one can't be read, or there is no such column.
    """
    return Table(files, root, file_column, caption_column)


def mixture(sources: Mapping[str, Any], weights: Mapping[str, Any]) -> Mixture:
    """Several sources at once; training sees each as often as its weight says.

    Training's stream is endless and each source goes through passes of its own, a small one with a
    large weight more often. Evaluation sees each record of each source once, whatever the weights.

    Args:
      sources: name -> section of a source, {"web": {"name": "webdataset", ...}, ...}.
      weights: name -> number above 0; shares are weights over their sum.

    Raises:
      UserError: a source's, names that differ, or a mixture within a mixture.
    """
    for what, given in (("sources", sources), ("weights", weights)):
        if not isinstance(given, Mapping | ConfigDict):
            raise UserError(
                f"A mixture's {what} are {given!r}; give a section with a key a source."
            )
    parts = {name: build("data source", SOURCES, section) for name, section in sources.items()}
    if any(isinstance(part, Mixture) for part in parts.values()):
        raise UserError("A mixture can't hold a mixture; name all sources in one.")
    return Mixture(parts, weights)


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
        digest = self.fingerprint[:16]
        self.contents = {"files": 0, "bytes": 0, "digest": digest, "listing": {}}

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
    "webdataset": webdataset,
    "parquet": parquet,
    "mixture": mixture,
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
