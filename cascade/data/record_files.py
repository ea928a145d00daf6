"""Reads and writes ArrayRecord files of tf.train.Example records."""

import glob
import itertools
import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from cascade.data.fingerprint import contents, fingerprint
from cascade.data.preprocess import BrokenPicture
from cascade.errors import UserError


def to_example(record: Mapping[str, Any]) -> bytes:
    """A tf.train.Example of bytes, texts and integers, or lists of one of these."""
    from tensorflow_datasets.proto import tf_example_pb2

    example = tf_example_pb2.Example()
    for name in sorted(record):
        values = record[name] if isinstance(record[name], list) else [record[name]]
        feature = example.features.feature[name]
        if all(isinstance(value, int) for value in values):
            feature.int64_list.value.extend(values)
        else:
            feature.bytes_list.value.extend(
                v if isinstance(v, bytes) else v.encode() for v in values
            )
    return example.SerializeToString(deterministic=True)


def write_file(path: Path, examples: Iterable[bytes], wrote: Callable = lambda: None):
    """Writes an ArrayRecord file under a temporary name and renames it: all of it or nothing.

    Args:
      examples: the records; without one, no file is written.
      wrote: called after each.

    Raises:
      OSError: it can't be written.
    """
    from array_record.python.array_record_module import ArrayRecordWriter

    examples = iter(examples)
    first = next(examples, None)
    if first is None:
        return
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.touch()  # says what is wrong with a place, where the library's words are odd
        writer = ArrayRecordWriter(str(temporary), "group_size:1")
        try:
            for example in itertools.chain([first], examples):
                writer.write(example)
                wrote()
        finally:
            writer.close()
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_file(path: Path) -> Iterator[bytes]:
    """The records of one file, in order."""
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    with ArrayRecordDataSource([str(path)]) as records:
        for i in range(len(records)):
            yield records[i]


def check_files(paths: Iterable[Path]):
    """Opens each file, which takes its end to be whole.

    Raises:
      UserError: naming the first that is no ArrayRecord file, or is damaged or cut short.
    """
    with ThreadPoolExecutor() as pool:  # on a network's disk it is the waiting that takes long
        opened = [(path, pool.submit(_count, path)) for path in sorted(paths)]
    for path, result in opened:
        try:
            result.result()
        except Exception as error:  # the library raises several kinds
            said = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
            raise UserError(
                f"Cannot read {path} as an ArrayRecord file ({said}); it is damaged or cut short: "
                "restore it, or take it out of the data."
            ) from error


def _count(path: Path) -> int:
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    with ArrayRecordDataSource([str(path)]) as records:
        return len(records)


class ArrayRecord:
    """See `cascade.data.sources.array_record`."""

    def __init__(self, files, image_key, caption_key):
        self._arguments = (files, image_key, caption_key)
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        paths = sorted(glob.glob(os.path.expanduser(files)))
        if not paths:
            raise UserError(f"No file matches {files!r}; correct the pattern `files`.")
        check_files(map(Path, paths))
        self._paths, self._ends = paths, None
        self._records = ArrayRecordDataSource(paths)
        self._count = len(self._records)
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
        self.contents = contents(map(Path, paths))

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

        try:
            return tf_example_pb2.Example.FromString(self._records[i]).features.feature
        except Exception as error:  # the library's kinds are many, and none names the file
            raise BrokenPicture(f"{self._place(i)} is damaged: {error}") from error

    def _place(self, i: int) -> str:
        """The file of record i and its number there."""
        if self._ends is None:
            self._ends = np.cumsum([_count(Path(path)) for path in self._paths])
        file = int(np.searchsorted(self._ends, i, side="right"))
        return f"record {i - (self._ends[file - 1] if file else 0)} of {self._paths[file]}"

    def _texts(self, features) -> list[str]:
        return [
            v.decode("utf-8", errors="replace")
            for v in features[self._arguments[2]].bytes_list.value
        ]
