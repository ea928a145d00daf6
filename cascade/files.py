"""Writing files and folders whole or not at all."""

import contextlib
import os
import pathlib
import shutil
import uuid
from collections.abc import Iterator

from cascade.errors import UserError


def write_whole(path: pathlib.Path, text: str):
    """Writes a text file under a temporary name and renames it: all of it or nothing."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(
    folder: str | os.PathLike, *, kind: str, mark: str, overwrite: bool
) -> Iterator[pathlib.Path]:
    """Hands out an empty folder beside `folder`, which takes its place once it is filled.

    Args:
      folder: where to; its parent is made if it's missing.
      kind: what is written, for messages: "bundle".
      mark: the file that every folder of this kind has; only such a folder is ever replaced.
      overwrite: replace one that is there. It is lost only once the new one is in place.

    Yields:
      The folder to fill. If filling it fails, nothing of it stays.

    Raises:
      UserError: the place is taken, or it can't be written.
    """
    folder = pathlib.Path(folder).resolve()
    _check_free(folder, kind, mark, overwrite)
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        _move_into_place(temporary, folder)
    except OSError as error:
        raise UserError(
            f"Can't write the {kind} {str(folder)!r} ({error.strerror or error}); "
            "free some space or give another place."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _check_free(folder: pathlib.Path, kind: str, mark: str, overwrite: bool):
    """Refuses to replace what's there unless it is of this kind and the user said so."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not (folder / mark).is_file():
        raise UserError(f"{str(folder)!r} exists and isn't a {kind}; give a new folder's name.")
    if not overwrite:
        raise UserError(
            f"{str(folder)!r} already holds a {kind}; give another name, or ask to overwrite it."
        )


def _move_into_place(temporary: pathlib.Path, folder: pathlib.Path):
    """Renames the finished folder; an old one steps aside first and returns on failure."""
    old = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.old")
    if folder.exists():
        os.rename(folder, old)
    try:
        os.rename(temporary, folder)
    except OSError:
        if old.exists():
            os.rename(old, folder)
        raise
    shutil.rmtree(old, ignore_errors=True)
