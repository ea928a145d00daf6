"""Tells whether data changed without reading it."""

import hashlib
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
