"""What an evaluation found, for people and for programs: a table, a sheet, a page and JSON."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jinja2
import numpy as np

from cascade.evaluation.record import SHOWN, Record
from cascade.evaluation.report import png_uri
from cascade.evaluation.scores import Scored, markdown, table
from cascade.files import write_whole
from cascade.images import contact_sheet, save_png

CELL = 96  # pixels of a picture on the sheet


def write(
    out: pathlib.Path,
    rows: Sequence[Mapping[str, Any]],
    notes: Sequence[str],
    sets: Sequence[Scored],
    real: Record,
    about: Mapping[str, Any],
) -> str:
    """Writes metrics.json, metrics.md, sheet.png and report.html.

    Args:
      rows, notes: what `scores.score` gave.
      sets: whose first pictures are shown, in columns, beside the real picture of the same caption.
      real: where real pictures are kept.
      about: what was compared with what, and how.

    Returns:
      The table and the notes, in Markdown.

    Raises:
      UserError: a file can't be written.
    """
    about = {**about, "device": f"{jax.device_count()} × {jax.devices()[0].device_kind}"}
    content = {"about": about, "rows": rows, "notes": notes}
    heads, cells = table(rows)
    text = "\n\n".join([markdown(heads, cells), *notes])
    write_whole(out / "metrics.json", json.dumps(content, indent=1))
    write_whole(out / "metrics.md", text + "\n")
    columns, shown = side_by_side(sets, real)
    if shown:
        save_png(out / "sheet.png", sheet(columns, shown))
    loader = jinja2.FileSystemLoader(pathlib.Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True)
    environment.filters["png"] = png_uri
    html = environment.get_template("evaluation.html").render(
        about=about, heads=heads, cells=cells, notes=notes, columns=columns, shown=shown
    )
    write_whole(out / "report.html", html)
    return text


def side_by_side(
    sets: Sequence[Scored], real: Record
) -> tuple[list[str], list[tuple[str, list[np.ndarray]]]]:
    """Names of columns; and of each of the first pictures, its prompt and it in every column.

    The last column is the real picture, where the sets were drawn from captions of the source. A
    row in which one is missing isn't shown, nor is one that isn't scored.
    """
    names = told_apart([scored.about for scored in sets])
    places = sets[0].places[:SHOWN]
    rows = []
    for i in range(min(SHOWN, *(scored.count for scored in sets))):
        row = [scored.record.kept(i) for scored in sets]
        row += [real.kept(places[i])] if i < len(places) else []
        prompt = sets[0].prompts[i] if i < len(sets[0].prompts) else ""
        if all(picture is not None for picture in row):
            rows.append((prompt, row))
    return names + (["real"] if places else []), rows


def told_apart(sets: Sequence[Mapping[str, str]]) -> list[str]:
    """What tells each of several sets from the others, in few words: "teacher, steps 64, ddim"."""
    first = sets[0]
    keys = [key for key in first if any(about[key] != first[key] for about in sets)] or first

    def said(key, value):
        return f"{key} {value}" if value[:1].isdigit() else value

    return [", ".join(said(key, about[key]) for key in keys) for about in sets]


def sheet(columns: Sequence[str], shown: Sequence[tuple[str, Sequence[np.ndarray]]]) -> np.ndarray:
    """`side_by_side`, lying: a set a row, named where it begins, and a prompt a column."""
    prompts = [prompt for prompt, _ in shown]
    pictures = [row[i] for i in range(len(columns)) for _, row in shown]
    captions = [text for name in columns for text in (name, *prompts[1:])]
    return contact_sheet(pictures, captions, columns=len(shown), cell=CELL)
