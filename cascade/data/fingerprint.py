"""Tells whether data changed, here or under a run that moved, and reads next to nothing of it."""

import hashlib
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from cascade.errors import UserError

# Up to so many files are named where one of them changed; a checkpoint keeps the list.
LISTED = 1000
SAMPLE = 4096  # bytes


def fingerprint(paths: Iterable[Path], settings: tuple) -> str:
    """A digest of settings and of each file's path, size and time of change.

    Raises:
      UserError: a file is gone, or a link to nothing.
    """
    digest = hashlib.sha256(repr(settings).encode())
    for path in sorted(paths):
        try:
            state = path.stat()
        except OSError as error:
            raise UserError(
                f"Cannot read {str(path)!r} ({error.strerror}); restore or remove it."
            ) from error
        digest.update(
            f"{path} {state.st_size} {state.st_mtime_ns}\n".encode(errors="surrogateescape")
        )
    return digest.hexdigest()


def contents(paths: Iterable[Path]) -> dict[str, Any]:
    """What a resumed run must find again, wherever it lies now and whenever it was copied there.

    Returns:
      {"files": how many, "bytes": their sum, "digest": of their names, below the folder that holds
      them all, sizes and samples, "listing": name -> size and sample}. Samples are of some files
      where there are many, and the listing is empty then.
    """
    paths = sorted(paths)
    top = os.path.commonpath([path.parent.absolute() for path in paths])
    names = [os.path.relpath(path.absolute(), top) for path in paths]
    sizes = [path.stat().st_size for path in paths]
    every = -(-len(paths) // LISTED)
    with ThreadPoolExecutor() as pool:  # on a network's disk it is the waiting that takes long
        samples = [mark for mark in pool.map(_sample, paths[::every]) for _ in range(every)]
    rows = {name: f"{size} {mark}" for name, size, mark in zip(names, sizes, samples, strict=False)}
    text = "".join(f"{name} {row}\n" for name, row in rows.items())
    return {
        "files": len(paths),
        "bytes": sum(sizes),
        "digest": hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:16],
        "listing": {_printable(name): row for name, row in rows.items()} if every == 1 else {},
    }


def first_change(then: Mapping[str, str], now: Mapping[str, str]) -> str:
    """Of two listings, the first file that differs and how; "" where nothing was listed."""
    for name in sorted(then.keys() | now.keys()) if then and now else ():
        if name not in then:
            return f"{name!r} is new"
        if name not in now:
            return f"{name!r} is gone"
        if then[name] != now[name]:
            return f"{name!r} has other contents"
    return ""


def _sample(path: Path) -> str:
    """A digest of a file's first, middle and last bytes; of one that can't be opened, its lack."""
    digest, size = hashlib.sha256(), path.stat().st_size
    try:
        with open(path, "rb") as file:
            for start in (0, size // 2, max(size - SAMPLE, 0)):
                file.seek(start)
                digest.update(file.read(SAMPLE))
    except OSError:  # whoever needs what is in it will say so
        return "unread"
    return digest.hexdigest()[:8]


def _printable(name: str) -> str:
    """A file's name as text that any encoding can carry."""
    return name.encode(errors="surrogateescape").decode(errors="replace")
