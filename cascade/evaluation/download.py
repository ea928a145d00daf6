"""The weights that FID is defined on, fetched once from where they are published."""

import contextlib
import hashlib
import http.client
import os
import urllib.request
from pathlib import Path

from tqdm import tqdm

from cascade.errors import UserError
from cascade.files import replacing

URL = (
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
    "pt_inception-2015-12-05-6726825d.pth"
)
BLOCK = 1 << 18  # bytes
PATIENCE = 30.0  # seconds without an answer


def fetch(url: str = URL, folder: Path | None = None) -> Path:
    """A published file, from the cache or from the network.

    It is whole: it is written under another name, and renamed once it is on the disk and its sha256
    begins as the file's name ends, "-6726825d.pth"; one in the cache that isn't is fetched again.

    Args:
      folder: the cache; None is ~/.cache/cascade.

    Returns:
      Where it lies.

    Raises:
      UserError: no network, an answer that isn't the file, or no place to write it to.
    """
    name = url.rsplit("/", 1)[-1]
    folder = _cache() if folder is None else folder
    path, wanted = folder / name, Path(name).stem.rsplit("-", 1)[-1]
    with contextlib.suppress(OSError), open(path, "rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest().startswith(wanted):
            return path
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            digest = _copy(url, temporary, name)
            if not digest.startswith(wanted):
                raise UserError(
                    f"What {url} sent has the sha256 {digest[:8]}… and not {wanted}…, so it isn't "
                    "that file; try again, or fetch it by other means and give it as --inception "
                    "FILE."
                )
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise UserError(
            f"Can't fetch {url} to {str(folder)!r} ({error}); fetch it where there is a network "
            "and give it as --inception FILE."
        ) from error
    return path


def _cache() -> Path:
    try:
        return Path.home() / ".cache" / "cascade"
    except RuntimeError as error:
        raise UserError(
            "There is no home folder to keep the weights in; set HOME, or fetch them by other "
            "means and give them as --inception FILE."
        ) from error


def _copy(url: str, path: Path, what: str) -> str:
    """Writes what an address sends, and gives its sha256."""
    digest = hashlib.sha256()
    with urllib.request.urlopen(url, timeout=PATIENCE) as answer, open(path, "wb") as file:
        length = int(answer.headers.get("Content-Length", 0))
        with tqdm(total=length or None, desc=what, unit="B", unit_scale=True) as bar:
            while block := answer.read(BLOCK):
                file.write(block)
                digest.update(block)
                bar.update(len(block))
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()
