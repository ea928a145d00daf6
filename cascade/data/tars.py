"""Reads WebDataset tars where they lie: an index of each is made once, then any record is a seek.

A tar holds, side by side, the files of its records: `00012.jpg`, `00012.txt`, `00012.json`. What
comes before the first dot of a name, folder included, is the record's key; what comes after it says
what the file is.
"""

import contextlib
import glob
import hashlib
import json
import os
import tarfile
import uuid
from pathlib import Path

import numpy as np
from tqdm import tqdm

from cascade.data.fingerprint import contents, fingerprint
from cascade.data.folder import SUFFIXES
from cascade.data.preprocess import BrokenPicture
from cascade.errors import UserError

TEXTS = ("txt", "json")
PICTURES = tuple(suffix[1:] for suffix in SUFFIXES)
INDEX_VERSION = 1
BLOCK = 512  # bytes; a tar is made of them, and one of zeros ends it


class Tars:
    """See `cascade.data.sources.webdataset`."""

    def __init__(self, files: str, caption_file: str, caption_key: str):
        self._arguments = (files, caption_file, caption_key)
        if caption_file not in TEXTS or (caption_file == "json") != bool(caption_key):
            raise UserError(
                f"caption_file is {caption_file!r} with caption_key {caption_key!r}; give 'txt' "
                "and no key, or 'json' and the key of its captions."
            )
        self._paths = [Path(path) for path in sorted(glob.glob(os.path.expanduser(files)))]
        if not self._paths:
            raise UserError(f"No file matches {files!r}; correct the pattern `files`.")
        self.fingerprint = fingerprint(self._paths, self._arguments)
        self.contents = contents(self._paths)
        progress = tqdm(self._paths, "index tars", unit="tar", disable=None, delay=5)
        self._indices = [open_index(path) for path in progress]
        self._ends = np.cumsum([len(index) for index in self._indices])
        self.folder = self._paths[0].parent

    def __reduce__(self):
        return (Tars, self._arguments)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, i: int) -> dict:
        path, row = self._row(i)
        image = _read(path, row, "image")
        if image is None:
            raise BrokenPicture(f"{path} holds no picture of it")
        return {"image": image, "captions": self._texts(path, row), "key": self.key(i)}

    def key(self, i: int) -> str:
        """The name of record i's tar and its key in it."""
        path, row = self._row(i)
        return f"{path.name}/{row['key'].decode(errors='replace')}"

    def captions(self, i: int) -> list[str]:
        """The captions of record i."""
        return self._texts(*self._row(i))

    def _row(self, i: int) -> tuple[Path, np.void]:
        tar = int(np.searchsorted(self._ends, i, side="right"))
        return self._paths[tar], self._indices[tar][i - self._ends[tar]]

    def _texts(self, path: Path, row: np.void) -> list[str]:
        _, caption_file, caption_key = self._arguments
        data = _read(path, row, caption_file)
        if data is None:
            raise BrokenPicture(f"{path} holds no .{caption_file} of it")
        text = data.decode("utf-8-sig")
        if caption_file == "json":
            return _captions_in(json.loads(text), caption_key)
        return [line.strip() for line in text.splitlines() if line.strip()]


def _captions_in(value, path: str) -> list[str]:
    """The text, or the texts, at "key" or "outer/inner" of an object."""
    for key in path.split("/"):
        value = value[key]
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise BrokenPicture(f"its {path!r} is {value!r}, no text")
    return [text.strip() for text in texts if text.strip()]


def _read(path: Path, row: np.void, kind: str) -> bytes | None:
    """One file of a record, or None where it has none."""
    start, size = (int(number) for number in row[kind])
    if start == 0:  # nothing lies before the first header
        return None
    with open(path, "rb") as file:
        file.seek(start)
        data = file.read(size)
    if len(data) < size:
        raise BrokenPicture(f"{path} was cut short")
    return data


def open_index(path: Path) -> np.ndarray:
    """Where in a tar its records' files lie, memory-mapped; made first if it isn't there.

    It is kept in `.index` beside the tar or, where that can't be written, in ~/.cache/cascade,
    under a name that follows the tar's path, size and time of change.

    Returns:
      A row a record, in the order of their first files: "key" bytes, and "image", "txt" and "json",
      each (offset, size), (0, 0) where it has none.

    Raises:
      UserError: no plain tar, one that is damaged or cut short, or no place for the index.
    """
    mark = hashlib.sha256(
        f"{INDEX_VERSION} {fingerprint([path.absolute()], ())}".encode()
    ).hexdigest()[:16]
    homes = (path.parent / ".index", Path.home() / ".cache" / "cascade" / "index")
    names = [home / f"{path.name}-{mark}.npy" for home in homes]
    for name in names:
        if name.exists():
            return np.load(name, mmap_mode="r")
    index = _make_index(path)
    for name in names:
        temporary = name.with_name(f".{uuid.uuid4().hex}.tmp")
        try:
            name.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "wb") as file:
                np.save(file, index)
            temporary.replace(name)
            return np.load(name, mmap_mode="r")
        except OSError as error:
            last = error
            with contextlib.suppress(OSError):
                temporary.unlink()
    raise UserError(
        f"Cannot write the index of {path} to {homes[0]} or {homes[1]} ({last.strerror}); make "
        "room in one of them."
    )


def _make_index(path: Path) -> np.ndarray:
    """Reads a tar's headers from its first to its last."""
    rows: dict[str, dict[str, tuple[int, int]]] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                folder, _, name = member.name.rpartition("/")
                stem, _, kind = name.partition(".")
                kind = "image" if kind.lower() in PICTURES else kind.lower()
                if member.isreg() and not member.issparse() and kind in ("image", *TEXTS):
                    row = rows.setdefault(f"{folder}/{stem}" if folder else stem, {})
                    row.setdefault(kind, (member.offset_data, member.size))
                tar.members.clear()  # else it remembers all of them
            end = tar.offset  # tarfile takes a damaged header for the end
        with open(path, "rb") as file:
            file.seek(end)
            whole = file.read(BLOCK) == bytes(BLOCK)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UserError(
            f"Cannot read {path} as a tar ({error}); it must be a whole, uncompressed one: fetch "
            "it again, or take it out of `files`."
        ) from error
    if not whole:
        raise UserError(
            f"{path} is cut short or damaged at byte {end}, after {len(rows)} records; fetch it "
            "again, or take it out of `files`."
        )
    keys = [key.encode(errors="surrogateescape") for key in rows]
    places = [(kind, np.int64, 2) for kind in ("image", *TEXTS)]
    index = np.zeros(len(rows), [("key", f"S{max(map(len, keys), default=1)}"), *places])
    index["key"] = keys
    for kind in ("image", *TEXTS):
        index[kind] = np.reshape([row.get(kind, (0, 0)) for row in rows.values()], (-1, 2))
    return index
