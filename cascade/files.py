"""Writing files whole or not at all."""

import pathlib


def write_whole(path: pathlib.Path, text: str):
    """Writes a text file under a temporary name and renames it: all of it or nothing."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
