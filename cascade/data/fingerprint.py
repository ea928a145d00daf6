"""Tells whether data changed without reading it: on this machine, or under a run that moved."""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

from cascade.errors import UserError


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


def contents(paths: Iterable[Path]) -> dict[str, int | str]:
    """What a resumed run must find again, wherever it lies now and whenever it was copied there.

    Returns:
      {"files": how many, "bytes": their sum, "digest": of their names, below the folder that holds
      them all, and sizes}.
    """
    paths = sorted(paths)
    top = os.path.commonpath([path.parent.absolute() for path in paths])
    sizes = {os.path.relpath(path.absolute(), top): path.stat().st_size for path in paths}
    listing = "".join(f"{name} {size}\n" for name, size in sizes.items())
    digest = hashlib.sha256(listing.encode(errors="surrogateescape")).hexdigest()[:16]
    return {"files": len(sizes), "bytes": sum(sizes.values()), "digest": digest}
