"""cascade.json: what a bundle says of itself, and the proof that its files are what they were.

It names every other file with its size and SHA-256, and carries its own. Reading believes nothing.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cascade.digests import remembered
from cascade.errors import UserError
from cascade.shards import replace_durably

FORMAT_VERSION = 2
WITHOUT_TEXT_WEIGHTS = 1  # the version that couldn't carry a text encoder's weights
MANIFEST_BYTES = 4_000_000  # a cascade.json is a few kilobytes; more isn't read
BLANK = "0" * 64  # stands for cascade.json's own sum while that is computed
FILE_ENTRY = {"name": str, "bytes": int, "sha256": str}
SAFE_NAME = re.compile(r"(tokenizer/|text_encoder/)?[A-Za-z0-9_][A-Za-z0-9._-]{0,120}")


def write(folder: Path, contents: Mapping[str, Any]):
    """Writes cascade.json with its version and its own sum, in place of one that is there.

    Args:
      contents: its `text` and `stages`.
    """
    document = {"format_version": FORMAT_VERSION, "sha256": BLANK, **contents}
    raw = json.dumps(document, indent=1, allow_nan=False).encode()
    digest = hashlib.sha256(raw).hexdigest().encode()
    replace_durably(folder / "cascade.json", raw.replace(BLANK.encode(), digest, 1))


def file_entry(folder: Path, path: Path) -> dict:
    """How cascade.json names a file of the folder; the file is read in pieces, however large."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    name = path.relative_to(folder).as_posix()
    return {"name": name, "bytes": path.stat().st_size, "sha256": digest}


def read(folder: Path) -> dict:
    """What cascade.json holds, its version, its own sum and its outline checked.

    Raises:
      UserError: it is missing, foreign, damaged, or of another version.
    """
    path = folder / "cascade.json"
    if not path.is_file():
        raise UserError(
            f"{str(folder)!r} isn't a bundle (it has no file cascade.json); "
            "give a folder that `cascade bundle` wrote."
        )
    try:
        with open(path, "rb") as file:
            raw = file.read(MANIFEST_BYTES)
        manifest = json.loads(raw.decode(), parse_constant=_refuse_constant)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{str(path)!r} can't be read as JSON ({error}); get the bundle again, whole."
        ) from error
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if type(version) is not int or version not in (WITHOUT_TEXT_WEIGHTS, FORMAT_VERSION):
        raise UserError(
            f"{str(path)!r} says format version {version!r} and this program reads "
            f"{FORMAT_VERSION}; update cascade, or write the bundle again."
        )
    fields("", manifest, {"format_version": int, "sha256": str, "text": dict, "stages": list})
    digest = manifest["sha256"].encode(errors="replace")
    blanked = raw.replace(digest, BLANK.encode(), 1)
    if len(digest) != 64 or hashlib.sha256(blanked).hexdigest().encode() != digest:
        raise UserError(
            f"{str(path)!r} was changed or damaged since it was written (its sha256 is wrong); "
            "get the bundle again, or write it anew with `cascade bundle`."
        )
    if version == WITHOUT_TEXT_WEIGHTS:
        manifest["text"].setdefault("weights", [])
    return manifest


def _refuse_constant(name: str):
    raise ValueError(f"{name} isn't JSON")


def fields(where: str, value: Any, types: Mapping[str, type | tuple[type, ...]]) -> dict:
    """The value, if it is a JSON object with exactly these keys, each of its type or types.

    Raises:
      UserError: naming `where` in cascade.json it isn't.
    """
    where = f"`{where}` of cascade.json" if where else "cascade.json"
    if not isinstance(value, dict) or set(value) != set(types):
        raise UserError(
            f"The bundle's {where} must be an object with the keys {', '.join(types)}; "
            "write the bundle again with `cascade bundle`."
        )
    for key, expected in types.items():
        kinds = expected if isinstance(expected, tuple) else (expected,)
        if type(value[key]) not in kinds:
            needed = " or ".join(kind.__name__ for kind in kinds)
            raise UserError(
                f"The bundle's {where} has {key} = {str(value[key])[:40]!r}, where {needed} is "
                "needed; write the bundle again with `cascade bundle`."
            )
    return value


def read_file(folder: Path, where: str, entry: Any) -> tuple[str, bytes]:
    """Name and bytes of a file that cascade.json names, once they are proved to be its.

    Raises:
      UserError: the name may lead out of the folder, or the file is missing or damaged.
    """
    path = _located(folder, where, entry)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise _unreadable(entry["name"], error) from error
    _check_sum(entry, hashlib.sha256(data).hexdigest())
    return entry["name"], data


def check_file(folder: Path, where: str, entry: Any) -> str:
    """Name of a file that cascade.json names, too large to be read whole, once it is proved.

    Its sum is taken again only once the file has changed (`cascade.digests`).

    Raises:
      UserError: as `read_file`.
    """
    path = _located(folder, where, entry)

    def digest() -> str:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    try:
        _check_sum(entry, remembered("sha256", [path], digest))
    except OSError as error:
        raise _unreadable(entry["name"], error) from error
    return entry["name"]


def _located(folder: Path, where: str, entry: Any) -> Path:
    """The path of a file that cascade.json names, in the folder and of the right size."""
    fields(where, entry, FILE_ENTRY)
    name = entry["name"]
    path = folder / name
    try:
        inside = SAFE_NAME.fullmatch(name) and path.resolve().is_relative_to(folder.resolve())
        if not inside:
            raise UserError(
                f"cascade.json names the file {name[:80]!r}, which may lie outside the bundle; "
                "don't trust this bundle, and get it from its maker."
            )
        if not path.is_file():
            raise UserError(f"The bundle has no file {name!r}; get the bundle again, whole.")
        size = path.stat().st_size
    except OSError as error:
        raise _unreadable(name, error) from error
    if size != entry["bytes"]:
        raise UserError(
            f"{name!r} has {size} bytes where {entry['bytes']} were written (a broken copy?); "
            "get the bundle again, whole."
        )
    return path


def _unreadable(name: str, error: OSError) -> UserError:
    return UserError(
        f"Can't read {name!r} of the bundle ({error.strerror}); check its permissions."
    )


def _check_sum(entry: Mapping[str, Any], digest: str):
    if digest != entry["sha256"]:
        raise UserError(
            f"{entry['name']!r} is damaged (its sha256 differs from cascade.json's); get the "
            "bundle again."
        )
