"""Writing files and folders whole or not at all."""

import contextlib
import errno
import os
import pathlib
import platform
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Sequence

from cascade.errors import UserError


def write_whole(path: pathlib.Path, text: str):
    """Writes a text file, all of it or nothing."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Hands out a temporary name to write under, which becomes `path` where nothing fails."""
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")  # its own: others may write there too
    try:
        yield temporary
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
    check_place(folder, kind=kind, mark=mark, overwrite=overwrite)
    folder = pathlib.Path(folder).resolve()
    _remove_abandoned(folder)
    temporary = _beside(folder, "tmp")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        _move_into_place(temporary, folder)
    except OSError as error:
        raise _unwritable(kind, folder, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_place(
    folder: str | os.PathLike,
    *,
    kind: str,
    mark: str,
    overwrite: bool,
    sources: Sequence[str | os.PathLike] = (),
):
    """Refuses, before any work is done, a place that `whole_folder` would refuse after it.

    Args:
      folder, kind, mark, overwrite: as in `whole_folder`.
      sources: what is read; the new folder may neither be in one nor take the place of one. Those
        that are no folders (hub ids) are passed over.

    Raises:
      UserError: the place is taken, in a source or around one, or it can't be written.
    """
    if not str(folder):
        raise UserError(f"The {kind}'s folder has an empty name; say where to write it.")
    folder = pathlib.Path(folder).resolve()
    for source in map(pathlib.Path, sources):
        inner = source.resolve()
        if source.is_dir() and (folder.is_relative_to(inner) or inner.is_relative_to(folder)):
            raise UserError(
                f"{str(folder)!r} is within {str(inner)!r}, which is read, or around it; give a "
                f"folder apart from it for the {kind}."
            )
    try:
        _check_free(folder, kind, mark, overwrite)
    except OSError as error:
        raise _unwritable(kind, folder, error) from error
    check_writable(folder.parent, f"{kind} {folder.name!r} in")


def check_writable(folder: str | os.PathLike, kind: str):
    """Refuses a folder that can't be made or in which nothing can be written.

    Raises:
      UserError: saying so of the `kind`.
    """
    folder = pathlib.Path(folder).resolve()
    try:
        there = next(up for up in (folder, *folder.parents) if up.exists())
        with tempfile.TemporaryDirectory(prefix=".", suffix=".tmp", dir=there):
            pass
    except OSError as error:
        raise _unwritable(kind, folder, error) from error


def _check_free(folder: pathlib.Path, kind: str, mark: str, overwrite: bool):
    """Refuses to replace what's there unless it is of this kind and the user said so."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not (folder / mark).is_file():
        raise UserError(f"{str(folder)!r} exists and isn't a {kind}; give a new folder's name.")
    if not overwrite:
        raise UserError(
            f"{str(folder)!r} already holds a {kind}; give another name, or --overwrite "
            "(overwrite=True) to replace it."
        )


def _unwritable(kind: str, folder: pathlib.Path, error: OSError) -> UserError:
    """What to say of a folder that can't be written."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return UserError(
        f"Can't write the {kind} {str(folder)!r} ({error.strerror or error}); "
        f"{'free some space or ' if full else ''}give another place."
    )


def _beside(folder: pathlib.Path, ending: str) -> pathlib.Path:
    """A name beside the folder that says which process, on which host, it belongs to."""
    owner = f"{platform.node()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    return folder.with_name(f".{folder.name}.{owner}.{ending}")


def _remove_abandoned(folder: pathlib.Path):
    """Removes what processes of this host that were killed have left beside the folder.

    An old folder that stepped aside is only removed where a new one is in its place.
    """
    names = re.compile(
        re.escape(f".{folder.name}.{platform.node()}-") + r"([0-9]{1,9})-[0-9a-f]{8}\.(tmp|old)"
    )
    for path in folder.parent.iterdir() if folder.parent.is_dir() else ():
        found = names.fullmatch(path.name)
        if found and not _lives(int(found[1])) and (found[2] == "tmp" or folder.exists()):
            shutil.rmtree(path, ignore_errors=True)


def _lives(process: int) -> bool:
    """Whether there is a process of that number on this host."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's
        return True
    return True


def _move_into_place(temporary: pathlib.Path, folder: pathlib.Path):
    """Renames the finished folder; an old one steps aside first and returns on failure."""
    old = _beside(folder, "old")
    if folder.exists():
        os.rename(folder, old)
    try:
        os.rename(temporary, folder)
    except OSError:
        if old.exists():
            os.rename(old, folder)
        raise
    shutil.rmtree(old, ignore_errors=True)
