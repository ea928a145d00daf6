"""Reads data sets that TFDS has prepared, without TensorFlow."""

import os
from pathlib import Path
from typing import Any

import numpy as np

from cascade.data.fingerprint import contents, fingerprint
from cascade.data.record_files import check_files
from cascade.errors import UserError


class Tfds:
    """See `cascade.data.sources.tfds`."""

    def __init__(self, dataset, data_dir, split, image_key, caption_key, template):
        self._arguments = (dataset, data_dir, split, image_key, caption_key, template)
        import tensorflow_datasets as library
        from tensorflow_datasets.core import read_only_builder

        try:
            builder = read_only_builder.builder_from_files(
                dataset, data_dir=os.path.expanduser(data_dir)
            )
        except (library.core.DatasetNotFoundError, OSError) as error:
            name, _, variant = dataset.partition("/")
            chosen = f" --variant {variant}" if name == "emoji" and variant else ""
            raise UserError(
                f"There is no data set {dataset!r} in {data_dir!r}; prepare it, as with `cascade "
                f"data build emoji{chosen} --out {data_dir}`, or correct `dataset` and `data_dir`."
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
        self.folder = Path(builder.data_dir)
        check_files(f for f in self.folder.iterdir() if ".array_record" in f.name)
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
        files = [f for f in self.folder.iterdir() if f.is_file()]
        self.fingerprint = fingerprint(files, self._arguments)
        self.contents = contents(files)

    def __reduce__(self):
        return (Tfds, self._arguments)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, i: int) -> dict:
        record = self._records[i]
        key, scene = record.get("key", b""), record.get("scene")
        told = {"scene": _text(scene, None)} if isinstance(scene, bytes) else {}
        return {
            "image": record[self._image_key],
            "captions": self._texts(record),
            "key": key.decode() if isinstance(key, bytes) and key else str(i),
            **told,
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
