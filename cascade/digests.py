"""Digests of large files, remembered between runs: hashing a model's 20 GB takes half a minute."""

import contextlib
import hashlib
import json
import logging
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from cascade.files import write_whole

log = logging.getLogger(__name__)

LEAST_BYTES = 100_000_000  # files that are smaller together are hashed in a blink: not remembered
VERSION = 1  # counts changes of what digests are made of
SHA256 = re.compile("[0-9a-f]{64}")


def remembered(what: str, files: Sequence[Path], compute: Callable[[], str]) -> str:
    """`compute()`, or what it gave when the same files were last asked about.

    They are the same while each one's path, inode, size, and times of the last change of contents
    and of status stay as they were; the last can't be set back. Results are kept in the user's
    cache folder, ~/.cache/cascade/digests, which may be deleted at any time.

    Args:
      what: what is computed; other computations over the same files are kept apart.
      files: all that the result depends on.
      compute: returns the result, a sha256 in hexadecimal digits.
    """
    stats = [(path.resolve(), path.stat()) for path in files]
    if sum(stat.st_size for _, stat in stats) < LEAST_BYTES:
        return compute()
    state = [
        [str(path), stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
        for path, stat in stats
    ]
    key = hashlib.sha256(json.dumps([VERSION, what, state]).encode()).hexdigest()
    path = Path.home() / ".cache" / "cascade" / "digests" / key
    with contextlib.suppress(OSError, ValueError):
        known = path.read_text(encoding="ascii")
        if SHA256.fullmatch(known):
            return known
    result = compute()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, result)
    except OSError as error:
        log.warning("Can't remember a digest in %s (%s); it is computed again.", path.parent, error)
    return result
