"""What a preparation kept and why it dropped the rest: statistics.json and statistics.html."""

import base64
import collections
import importlib.metadata
import io
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import jinja2
import numpy as np
from PIL import Image

from cascade.data.record_files import ArrayRecord
from cascade.files import write_whole

# Upper edges of bins; what lies above the last edge counts in a bin of its own.
EDGES = {
    "shorter side": (64, 128, 256, 384, 512, 768, 1024, 1536, 2048, 4096),
    "width / height": (0.25, 0.5, 0.66, 0.8, 0.95, 1.05, 1.25, 1.5, 2.0, 4.0),
    "characters": (8, 16, 32, 64, 128, 256, 512, 1024),
    "tokens": (4, 8, 16, 32, 48, 64, 77, 128, 256),
}
THUMBNAIL = 128


def histograms(columns: Mapping[str, np.ndarray]) -> dict[str, list[int]]:
    """Counts by the bins of `EDGES` of a part's kept records: x ≤ edge."""
    if not columns:
        return {name: [0] * (len(edges) + 1) for name, edges in EDGES.items()}
    values = {
        "shorter side": np.minimum(columns["width"], columns["height"]),
        "width / height": columns["width"] / columns["height"],
        "characters": columns["characters"],
        "tokens": columns["tokens"],
    }
    return {
        name: np.bincount(np.searchsorted(edges, values[name]), minlength=len(edges) + 1).tolist()
        for name, edges in EDGES.items()
    }


def write_statistics(folder: Path, summaries: Iterable[dict], settings: Mapping) -> dict:
    """Sums up all parts, writes the page and then, last of all, statistics.json."""
    reasons: dict[str, dict] = {}
    sums = {name: np.zeros(len(edges) + 1, int) for name, edges in EDGES.items()}
    counts = collections.Counter()
    for summary in summaries:
        counts.update({name: summary[name] for name in ("read", "kept", "duplicates")})
        for reason, told in summary["reasons"].items():
            total = reasons.setdefault(reason, {"count": 0, "examples": told["examples"]})
            total["count"] += told["count"]
        for name, values in summary["histograms"].items():
            sums[name] += values
    statistics = {
        "version": importlib.metadata.version("cascade-imagen"),
        "settings": settings,
        **counts,
        "reasons": dict(sorted(reasons.items(), key=lambda item: (-item[1]["count"], item[0]))),
        "histograms": {
            name: {"edges": EDGES[name], "counts": values.tolist()} for name, values in sums.items()
        },
    }
    _write_page(folder / "statistics.html", statistics, _samples(folder, settings["samples"]))
    write_whole(folder / "statistics.json", json.dumps(statistics, indent=2))
    return json.loads(json.dumps(statistics))


def _samples(folder: Path, count: int) -> list[dict]:
    """Kept records at even distances, as what the page shows of them."""
    if not any(folder.glob("*.array_record")):
        return []
    source = ArrayRecord(str(folder / "*.array_record"), "image", "captions")
    chosen = np.unique(np.linspace(0, len(source) - 1, min(count, len(source))).astype(int))
    return [_shown(source[i]) for i in chosen.tolist()]


def _shown(record: dict) -> dict:
    picture, buffer = Image.open(io.BytesIO(record["image"])), io.BytesIO()
    width, height = picture.size
    picture.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
    picture.save(buffer, "JPEG", quality=85)
    return {
        "data": base64.b64encode(buffer.getvalue()).decode(),
        "caption": record["captions"][0],
        "key": record["key"],
        "size": f"{width}×{height}",
    }


def _write_page(path: Path, statistics: Mapping, samples: list[dict]):
    """The page, one file that needs no other."""
    charts = {}
    for name, chart in statistics["histograms"].items():
        edges, most = chart["edges"], max(max(chart["counts"]), 1)
        labels = [*(f"≤ {edge:g}" for edge in edges), f"> {edges[-1]:g}"]
        charts[name] = [
            (label, count, 100 * count / most)
            for label, count in zip(labels, chart["counts"], strict=True)
        ]
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True)
    page = environment.get_template("statistics.html")
    settings = json.dumps(statistics["settings"], indent=2, ensure_ascii=False)
    write_whole(
        path, page.render(told=statistics, charts=charts, samples=samples, settings=settings)
    )
