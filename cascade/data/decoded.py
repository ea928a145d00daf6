"""A cache of decoded pictures: training then spends nothing on PNG."""

import hashlib
import json
import os
import tempfile
from pathlib import Path

import numpy as np
from tqdm import tqdm

from cascade.data.preprocess import BrokenPicture, Filtered, Preprocess
from cascade.data.sources import read_record
from cascade.errors import UserError


class Decoded:
    """A source whose pictures were preprocessed once, memory-mapped as uint8 [N, R, R, 3].

    Record i of the original is record i here. One that was broken or filtered out raises that
    again when it is read, so that the loader counts it as it would without a cache.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        # As a plain array over the mapping: slices of a memmap are many times slower to make.
        self._pictures = np.asarray(np.load(self.folder / "pictures.npy", mmap_mode="r"))
        with open(self.folder / "records.json", encoding="utf-8") as file:
            self._records = json.load(file)
        self.fingerprint = self.folder.name

    def __reduce__(self):
        return (Decoded, (self.folder,))

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, i: int) -> dict:
        record = self._records[i]
        if "broken" in record:
            raise BrokenPicture(record["broken"])
        if "filtered" in record:
            raise Filtered(record["filtered"])
        return {**record, "image": self._pictures[i]}

    def key(self, i: int) -> str:
        """The key of record i, broken or not."""
        return self._records[i]["key"]

    def captions(self, i: int) -> list[str]:
        """The captions of record i; none if it is broken."""
        return self._records[i].get("captions", [])


def decoded(source, preprocess: Preprocess) -> Decoded:
    """Opens the cache beside the source's data, making it first if it isn't there.

    The cache's name is a digest of the source's and the preprocessing's settings, so a change of
    either makes another one; a build that is stopped leaves nothing behind that could be read.

    Raises:
      UserError: the folder can't be written.
    """
    mark = hashlib.sha256(f"{source.fingerprint} {preprocess}".encode()).hexdigest()[:16]
    parent = source.folder / ".decoded"
    if not (parent / mark).exists():
        try:
            parent.mkdir(exist_ok=True)
            _write(source, preprocess, parent, mark)
        except OSError as error:
            raise UserError(
                f"Cannot write the cache of decoded pictures in {parent}: {error}; "
                "free the folder or set cache_decoded to False."
            ) from error
    return Decoded(parent / mark)


def _write(source, preprocess: Preprocess, parent: Path, mark: str):
    """Decodes every record into a temporary folder, then renames it."""
    with tempfile.TemporaryDirectory(prefix="incomplete-", dir=parent) as temporary:
        side = preprocess.resolution
        pictures = np.lib.format.open_memmap(
            Path(temporary) / "pictures.npy", "w+", np.uint8, (len(source), side, side, 3)
        )
        records = []
        for i in tqdm(range(len(source)), f"decode at {side}", unit="picture", disable=None):
            record = {"key": source.key(i)}
            try:
                read = read_record(source, i)
                record = {"key": read["key"], "captions": read["captions"]}
                pictures[i] = preprocess(read["image"])
            except Filtered as reason:
                record["filtered"] = str(reason)
            except BrokenPicture as reason:
                record["broken"] = str(reason)
            records.append(record)
        pictures.flush()
        (Path(temporary) / "records.json").write_text(json.dumps(records), encoding="utf-8")
        try:
            os.rename(temporary, parent / mark)
        except OSError:
            if not (parent / mark).exists():  # else another process was first, with the same
                raise
        else:
            os.mkdir(temporary)  # for TemporaryDirectory to remove
