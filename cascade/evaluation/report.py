"""One self-contained HTML file that shows what a cascade drew and what it took."""

import base64
import io
import pathlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jinja2
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from cascade.files import write_whole

SMOOTHED_OVER = 20  # logged rows that one point of the thick loss curve averages


class Drawing(NamedTuple):
    """A prompt, what every stage drew for it, and the real picture beside it where there is one.

    Fields:
      prompt: the text.
      stages: uint8 [h, w, 3] pictures, base first.
      real: uint8 [H, W, 3] or None.
      recognised: the final picture's nearest known drawing is the real one; None without a real.
    """

    prompt: str
    stages: Sequence[np.ndarray]
    real: np.ndarray | None = None
    recognised: bool | None = None


class StageSummary(NamedTuple):
    """What the report says of one stage.

    Fields:
      name: "base", "sr".
      headline: one line of size and training.
      metrics: rows of its metrics.jsonl.
      settings: its config as nested plain types.
    """

    name: str
    headline: str
    metrics: Sequence[Mapping[str, float]]
    settings: Mapping


def write_report(
    path,
    *,
    title: str,
    introduction: Sequence[str],
    command: str,
    known: Sequence[Drawing],
    unseen: Sequence[Drawing],
    stages: Sequence[StageSummary],
    parts: Mapping[str, Mapping[str, float]],
    facts: Mapping[str, str],
):
    """Writes the report, whole or not at all.

    Args:
      path: the HTML file.
      introduction: paragraphs: what the pictures are, and what they aren't.
      command: the shell command that draws the reader's own prompt.
      known: drawings of captions of the training set, real pictures beside them.
      unseen: drawings of prompts that no caption of the training set says.
      parts: part -> {"seconds", "peak_gib"}, the second the most that the process had held by then.
      facts: anything else worth a row: machine, versions.
    """
    loader = jinja2.FileSystemLoader(pathlib.Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True)
    environment.filters |= {"png": png_uri, "duration": duration}
    html = environment.get_template("report.html").render(
        title=title,
        introduction=introduction,
        command=command,
        known=known,
        unseen=unseen,
        recognised=sum(bool(drawing.recognised) for drawing in known),
        stages=[(stage, loss_curve(stage), flat(stage.settings)) for stage in stages],
        parts=parts,
        facts=facts,
    )
    write_whole(pathlib.Path(path), html)


def png_uri(image: np.ndarray) -> str:
    """A uint8 picture [H, W, 3] as a data: address."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def loss_curve(stage: StageSummary) -> str:
    """A stage's training and evaluation loss over steps, as a data: address of an SVG."""
    figure = Figure(figsize=(6, 3), layout="constrained")  # without pyplot it needs no screen
    plot_losses(figure.subplots(), stage.name, stage.metrics)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue().encode()).decode()


def plot_losses(axes: Axes, title: str, rows: Sequence[Mapping[str, float]]):
    """Draws the training and evaluation loss in rows of a metrics.jsonl over their steps."""
    train = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    held_out = [(row["step"], row["eval_loss"]) for row in rows if "eval_loss" in row]
    if train:
        steps, losses = np.array(train).T
        axes.plot(steps, losses, color="#9ec5e8", linewidth=1, label="training")
        width = min(SMOOTHED_OVER, len(losses))
        smooth = np.convolve(losses, np.ones(width) / width, "valid")
        axes.plot(steps[width - 1 :], smooth, color="#1f6fb5", label=f"mean of {width} rows")
    if held_out:
        axes.plot(*np.array(held_out).T, "o-", color="#d1603d", label="held out (EMA weights)")
    axes.set(xlabel="step", ylabel="weighted loss", yscale="log", title=title)
    axes.grid(alpha=0.3, which="both")
    axes.legend()


def flat(tree: Mapping, prefix: str = "") -> dict[str, str]:
    """Nested settings as one level of dotted names."""
    rows = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        rows |= flat(value, f"{name}.") if isinstance(value, Mapping) else {name: str(value)}
    return rows


def duration(seconds: float) -> str:
    """ "41 s" below two minutes, else "12 min 5 s"."""
    whole = round(seconds)
    return f"{seconds:.3g} s" if seconds < 120 else f"{whole // 60} min {whole % 60} s"
