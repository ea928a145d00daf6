"""Features on disk, written as they come, so that a long evaluation that is stopped can go on."""

import functools
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from cascade.errors import UserError
from cascade.files import check_writable, write_whole
from cascade.images import read_image, save_png
from cascade.parallel.mesh import on_all_processes, on_first_process
from cascade.parallel.processes import first_difference
from cascade.shards import replace_durably

ROWS = 256  # of a part, at most
SECONDS = 30.0  # after which a smaller part is written
SETTINGS = "settings.json"
SHOWN = 16  # pictures of each set that are kept, to be looked at


class Record:
    """What was measured of the pictures of one set, in their order: arrays with a row a picture.

    A part is a file, `00000256.safetensors`, that begins with that row. It is written under another
    name and renamed, so what is there is whole; what came after a gap counts for nothing. Several
    processes call everything together, with the same arguments; the first alone reads and writes.

    Attributes:
      folder: where the parts lie.
      mesh: whose processes these are.
      count: rows that are on disk, and those that `add` was given since.
    """

    def __init__(self, folder: str | os.PathLike, settings: Mapping[str, Any], mesh: Mesh):
        """Opens a record, or begins one.

        Args:
          folder: made if it's missing.
          settings: JSON-able; all that what is measured depends on.

        Raises:
          UserError: it holds what was measured with other settings, or what is no record, or can't
            be read or written.
        """
        self.folder, self.mesh, self.count = Path(folder), mesh, 0
        self._parts, self._pending, self._last = [], [], time.monotonic()
        on_first_process(functools.partial(self._open, settings), mesh)
        self.count = int(self._told(lambda: np.array(self.count)))

    def _told(self, read: Callable[[], np.ndarray], *shape: int) -> np.ndarray:
        """Whole numbers that the first process reads, [*shape], on all."""
        together = self.mesh.is_multi_process
        mine = not together or jax.process_index() == 0
        numbers = on_all_processes(read if mine else lambda: np.zeros(shape), self.mesh)
        if not together:
            return numbers
        return np.asarray(multihost_utils.broadcast_one_to_all(numbers.astype(np.int32)))

    def remove(self):
        """Takes the record away: what it holds is of no use."""
        on_first_process(functools.partial(shutil.rmtree, self.folder), self.mesh)

    def _open(self, settings: Mapping[str, Any]):
        check_writable(self.folder, "evaluation in")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._check(json.loads(json.dumps(settings)))
            self.count = self._found()
        except OSError as error:
            raise self._failed(error) from error

    def _check(self, settings: dict):
        path = self.folder / SETTINGS
        if not path.exists():
            held = [f.name for f in self.folder.iterdir() if not f.name.startswith(".")]
            if held:
                raise UserError(
                    f"{str(self.folder)!r} holds {min(held)!r} and no {SETTINGS}, so it is no "
                    "evaluation's; give another --out."
                )
            write_whole(path, json.dumps(settings, indent=1))
            return
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(
                f"{str(path)!r} isn't JSON ({error}); remove {str(self.folder)!r} to measure anew."
            ) from error
        if before != settings:
            where, then, now = first_difference("", before, settings)
            raise UserError(
                f"{str(self.folder)!r} holds what was measured with another setting "
                f"({where.lstrip('.')} was {then!r} and is {now!r}); give another --out, or remove "
                "that folder to measure anew."
            )

    def _found(self) -> int:
        """Rows in the parts that follow one another; takes away the parts that come after a gap."""
        count = 0
        for path in sorted(self.folder.glob("*.safetensors")):
            if path.name == f"{count:08d}.safetensors":
                self._parts.append(path)
                count += _rows(self._load(path))
            elif re.fullmatch(r"[0-9]{8}\.safetensors", path.name):
                path.unlink()
        return count

    def following(self, name: str) -> int:
        """One more than the last row's value of an array of whole numbers; 0 before any."""

        def read():
            return self._load(self._parts[-1])[name][-1] + 1 if self._parts else np.array(0)

        return int(self._told(read))

    def add(self, **arrays: np.ndarray):
        """Takes the next rows, [n, ...] each under its name; writes them once there are enough.

        Raises:
          UserError: they can't be written.
        """
        self.count += _rows(arrays)
        if _rows(arrays) and jax.process_index() == 0:
            self._pending.append(arrays)
        waiting = sum(map(_rows, self._pending))
        late = time.monotonic() - self._last > SECONDS
        enough = waiting >= ROWS or late
        on_first_process(self._write if enough else lambda: None, self.mesh)

    def write(self):
        """Writes what waits.

        Raises:
          UserError: it can't be written.
        """
        on_first_process(self._write, self.mesh)

    def _write(self):
        self._last = time.monotonic()
        if not self._pending:
            return
        names = self._pending[0].keys()
        joined = {name: np.concatenate([part[name] for part in self._pending]) for name in names}
        path = self.folder / f"{self.count - _rows(joined):08d}.safetensors"
        try:
            replace_durably(path, save(joined))
        except OSError as error:
            raise self._failed(error) from error
        self._parts.append(path)
        self._pending = []

    def read(self, most: int | None = None) -> dict[str, np.ndarray]:
        """The first `most` rows that were written, or all, of every array; of the first process."""
        parts = [self._load(path) for path in self._parts]
        return {name: np.concatenate([part[name] for part in parts])[:most] for name in parts[0]}

    def shared(self, name: str) -> np.ndarray:
        """All rows of an array of whole numbers, [count], on all processes."""
        return self._told(lambda: self.read()[name], self.count)

    def keep(self, pictures: Mapping[int, np.ndarray]):
        """Keeps those of uint8 pictures, by their numbers, that are among the first to be shown."""

        def save_all():
            for number, picture in pictures.items():
                if number < SHOWN:
                    save_png(self._picture(number), picture)

        on_first_process(save_all, self.mesh)

    def kept(self, number: int) -> np.ndarray | None:
        """A picture that was kept, or None."""
        path = self._picture(number)
        return read_image(path) if path.exists() else None

    def _picture(self, number: int) -> Path:
        return self.folder / "pictures" / f"{number:04d}.png"

    def _load(self, path: Path) -> dict[str, np.ndarray]:
        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{str(path)!r} is damaged ({error}); remove it to measure its pictures anew."
            ) from error

    def _failed(self, error: OSError) -> UserError:
        return UserError(
            f"Can't write the evaluation to {str(self.folder)!r} ({error.strerror or error}); free "
            "some space or give another --out."
        )


def _rows(arrays: Mapping[str, np.ndarray]) -> int:
    return len(next(iter(arrays.values())))
