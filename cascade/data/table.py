"""Reads Parquet tables that name picture files and tell their captions."""

import glob
import os
from pathlib import Path

import numpy as np

from cascade.data.fingerprint import contents, fingerprint
from cascade.data.preprocess import BrokenPicture
from cascade.errors import UserError


class Table:
    """See `cascade.data.sources.parquet`."""

    def __init__(self, files: str, root: str, file_column: str, caption_column: str):
        self._arguments = (files, root, file_column, caption_column)
        paths = [Path(path) for path in sorted(glob.glob(os.path.expanduser(files)))]
        if not paths:
            raise UserError(f"No file matches {files!r}; correct the pattern `files`.")
        self._root = Path(root).expanduser()
        tables = [_read(path, file_column, caption_column) for path in paths]
        self._files = [table.column(file_column) for table in tables]
        self._texts = [table.column(caption_column) for table in tables]
        self._ends = np.cumsum([len(table) for table in tables])
        self.folder = paths[0].parent
        self.fingerprint = fingerprint(paths, self._arguments)
        self.contents = contents(paths)

    def __reduce__(self):
        return (Table, self._arguments)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, i: int) -> dict:
        name, table, row = self.key(i), *self._place(i)
        if self._files[table][row].as_py() is None:
            raise BrokenPicture("its row names no file")
        path = self._root / name
        if not path.resolve().is_relative_to(self._root.resolve()):
            raise BrokenPicture("its path leads out of the root")
        return {"image": path.read_bytes(), "captions": self.captions(i), "key": name}

    def key(self, i: int) -> str:
        """The path of record i's picture."""
        table, row = self._place(i)
        return str(self._files[table][row].as_py())

    def captions(self, i: int) -> list[str]:
        """The captions of record i."""
        table, row = self._place(i)
        value = self._texts[table][row].as_py()
        texts = value if isinstance(value, list) else [value]
        return [text.strip() for text in texts if text and text.strip()]

    def _place(self, i: int) -> tuple[int, int]:
        table = int(np.searchsorted(self._ends, i, side="right"))
        return table, i - int(self._ends[table]) + len(self._files[table])


def _read(path: Path, file_column: str, caption_column: str):
    """The two columns of a Parquet file."""
    import pyarrow
    from pyarrow import parquet

    try:
        columns = parquet.read_schema(path)
        for what, name in (("paths", file_column), ("captions", caption_column)):
            if name not in columns.names:
                raise UserError(
                    f"{path} has no column {name!r} for its {what}; choose from "
                    f"{', '.join(columns.names)}."
                )
            kind = columns.field(name).type
            inner = kind.value_type if pyarrow.types.is_list(kind) else kind
            is_text = pyarrow.types.is_string(inner) or pyarrow.types.is_large_string(inner)
            if not is_text or (what == "paths" and inner is not kind):
                raise UserError(
                    f"Column {name!r} of {path} holds {kind}; the {what} must be texts."
                )
        return parquet.read_table(path, columns=[file_column, caption_column])
    except (pyarrow.ArrowException, OSError) as error:
        said = str(error).splitlines()[0]
        raise UserError(f"Cannot read {path} as a Parquet file ({said}).") from error
