"""Reads ArrayRecord files of tf.train.Example records."""

import glob
import os
from pathlib import Path

from cascade.data.fingerprint import fingerprint
from cascade.errors import UserError


class ArrayRecord:
    """See `cascade.data.sources.array_record`."""

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
