"""A folder of pictures with captions: a text beside each picture, or one metadata file."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from cascade.data.fingerprint import contents, fingerprint
from cascade.errors import UserError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
METADATA = ("metadata.jsonl", "metadata.csv")
# Names that a metadata row may use for the picture's path and for its caption or captions.
FILE_KEYS = ("file_name", "file")
CAPTION_KEYS = ("captions", "caption", "text")


class Folder:
    """Pictures under `path`, however deep, in the order of their names.

    Captions come from `metadata.jsonl` (one object a line: {"file_name": "a/x.png", "caption": "a
    cat"}, or "captions" with a list) or `metadata.csv` (columns file_name and caption; a picture
    with several captions has several rows) if there is one, else from `x.txt` beside `x.png`, one
    caption a line, which `x.jpg` shares. Each picture needs a caption and each caption a picture.

    Raises:
      UserError: no folder, no pictures, pictures without captions, captions without pictures, or a
        metadata line that can't be understood; or a file that can't be read.
    """

    def __init__(self, path: str):
        self.folder = Path(path).expanduser()
        self._path = path
        if not self.folder.is_dir():
            raise UserError(f"There is no folder {path!r}; correct `path`.")
        files = visible_files(self.folder)
        pictures = [f for f in files if f.suffix.lower() in SUFFIXES]
        if not pictures:
            raise UserError(
                f"The folder {path!r} holds no picture; put {', '.join(SUFFIXES)} files in it."
            )
        metadata = [self.folder / name for name in METADATA if (self.folder / name).exists()]
        if len(metadata) > 1:
            raise UserError(f"{path!r} holds {' and '.join(METADATA)}; keep one of them.")
        texts = [f for f in files if f.suffix.lower() == ".txt"]
        captions = read_metadata(metadata[0]) if metadata else _texts_beside(texts, self.folder)
        names = [f.relative_to(self.folder).as_posix() for f in pictures]
        if not metadata:  # x.txt tells of x.png, whatever the picture's suffix
            shared = {name: captions.get(_stem(name), []) for name in names}
            stems = {_stem(name) for name in names}
            captions = {stem: told for stem, told in captions.items() if stem not in stems} | shared
        _check_match(path, names, captions, "a metadata row" if metadata else "a .txt file")
        self._names, self._captions = names, captions
        self.fingerprint = fingerprint([*pictures, *(metadata or texts)], (path,))
        self.contents = contents([*pictures, *(metadata or texts)])

    def __reduce__(self):
        return (Folder, (self._path,))

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, i: int) -> dict:
        name = self._names[i]
        image = (self.folder / name).read_bytes()
        return {"image": image, "captions": self._captions[name], "key": name}

    def key(self, i: int) -> str:
        """The file name of record i."""
        return self._names[i]

    def captions(self, i: int) -> list[str]:
        """The captions of record i."""
        return self._captions[self._names[i]]


def read_metadata(path: Path) -> dict[str, list[str]]:
    """Reads `metadata.jsonl` or `metadata.csv`: picture's name -> its captions, in order.

    Raises:
      UserError: the file can't be read, or a line is wrong; the message gives its number.
    """
    told: dict[str, list[str]] = {}
    read = _jsonl_rows if path.suffix == ".jsonl" else _csv_rows
    for line, row in read(path):
        name = _one_of(row, FILE_KEYS, path, line)
        captions = _one_of(row, CAPTION_KEYS, path, line)
        captions = [captions] if isinstance(captions, str) else captions
        if not isinstance(name, str) or not name.strip():
            raise _bad(path, line, f"the picture's name is {name!r}, give a text")
        sound = isinstance(captions, list) and captions
        if not sound or not all(isinstance(c, str) and c.strip() for c in captions):
            raise _bad(path, line, f"the caption is {captions!r}, give a text or a list of texts")
        clean = PurePosixPath(name.strip().replace("\\", "/"))
        if clean.is_absolute() or ".." in clean.parts:
            raise _bad(path, line, f"{name!r} leads out of the folder")
        told.setdefault(clean.as_posix(), []).extend(c.strip() for c in captions)
    return told


def _jsonl_rows(path: Path) -> Iterator[tuple[int, dict]]:
    for line, text in enumerate(_read(path).split("\n"), 1):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise _bad(path, line, f"not JSON ({error})") from error
        if not isinstance(row, dict):
            raise _bad(path, line, 'not an object; write {"file_name": ..., "caption": ...}')
        yield line, row


def _csv_rows(path: Path) -> Iterator[tuple[int, dict]]:
    reader = csv.DictReader(_read(path).splitlines(keepends=True), strict=True)
    try:
        for row in reader:
            if None in row or None in row.values():
                raise _bad(path, reader.line_num, f"not {len(reader.fieldnames)} fields")
            yield reader.line_num, row
    except csv.Error as error:
        raise _bad(path, reader.line_num, str(error)) from error


def _one_of(row: dict, keys: tuple[str, ...], path: Path, line: int):
    found = [key for key in keys if key in row]
    if not found:
        raise _bad(path, line, f"it has none of the keys {', '.join(keys)}")
    return row[found[0]]


def _bad(path: Path, line: int, what: str) -> UserError:
    return UserError(f"{path.name}, line {line}: {what}; correct that line.")


def _texts_beside(texts: list[Path], folder: Path) -> dict[str, list[str]]:
    """`a/x.txt` -> captions under its name without the suffix, one from each line."""
    told = {}
    for path in texts:
        lines = [line.strip() for line in _read(path).splitlines()]
        told[_stem(path.relative_to(folder).as_posix())] = [line for line in lines if line]
    return told


def _check_match(path: str, names: list[str], captions: dict[str, list[str]], where: str):
    bare = [name for name in names if not captions.get(name)]
    if bare:
        raise UserError(
            f"{len(bare)} of {len(names)} pictures in {path!r} have no caption, the first is "
            f"{bare[0]!r}; give each {where} with a caption."
        )
    lone = sorted(set(captions) - set(names))
    if lone:
        raise UserError(
            f"{len(lone)} captions in {path!r} have no picture, the first is that of {lone[0]!r}; "
            "add the pictures or remove the captions."
        )


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"Cannot read {path}: {error}; make it a readable UTF-8 text file."
        ) from error


def _stem(name: str) -> str:
    return PurePosixPath(name).with_suffix("").as_posix()


def visible_files(folder: Path) -> list[Path]:
    """What lies in a folder, however deep, and isn't hidden; no folders, but links to nothing.

    Raises:
      UserError: it can't be listed.
    """
    try:
        return sorted(f for f in folder.rglob("*") if not _hidden(f, folder) and not f.is_dir())
    except OSError as error:
        raise UserError(f"Cannot list {str(folder)!r}: {error}; start again.") from error


def _hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)
