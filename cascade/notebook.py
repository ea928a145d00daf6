"""What a notebook needs beside the package: a lasting folder, an example, curves that grow."""

import contextlib
import io
import itertools
import pathlib
import sys
import threading
from collections.abc import Iterator

from matplotlib.figure import Figure

from cascade.data.emoji.drawings import demo_phrases, render_png
from cascade.errors import UserError
from cascade.evaluation.report import plot_losses
from cascade.training import metrics

DRIVE = pathlib.Path("/content/drive")  # where Colab's own examples mount it
MOST = 4  # runs that are shown at once, the latest
# Ideas of the demo, by hexcode: fruit, hearts of four colours, and what else a small picture shows.
EXAMPLE = (
    "1F34E", "1F34C", "1F353", "2764", "1F499", "1F49A",
    "1F49B", "2B50", "2600", "1F41F", "1F697", "1F33B",
)  # fmt: skip


def lasting_folder(name: str) -> pathlib.Path:
    """The folder `name`, where a disconnect or a new machine doesn't lose it.

    In Colab it is on the user's Google Drive, which is mounted; Colab asks for leave. Elsewhere it
    is below the current folder. It needn't exist.

    Raises:
      UserError: the drive wasn't mounted.
    """
    if "google.colab" not in sys.modules:  # Colab's kernels have imported it
        return pathlib.Path(name)
    from google.colab import drive

    try:
        drive.mount(str(DRIVE))
    except Exception as error:  # Colab's own errors have no base
        raise UserError(
            f"Google Drive couldn't be mounted ({error}); run the cell again and allow it, or give "
            "a folder that you can write to."
        ) from error
    return DRIVE / "MyDrive" / name


def example_pictures(folder: pathlib.Path, side: int = 128):
    """Writes a dozen twemoji drawings (CC-BY-4.0), each with its caption beside it, as `x.txt`.

    Args:
      folder: it's made if it's missing; what it holds by these names is written anew.
      side: of a picture, pixels.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for hexcode in EXAMPLE:
        phrase = demo_phrases()[hexcode]
        name = folder / phrase.replace(" ", "_")
        name.with_suffix(".png").write_bytes(render_png("twemoji", hexcode, side))
        name.with_suffix(".txt").write_text(f"{phrase}\n", encoding="utf-8")


@contextlib.contextmanager
def live_curves(workdir, every: float = 5.0) -> Iterator[None]:
    """Shows the losses of the runs in `workdir` below a notebook's cell, while it trains there.

        with live_curves(workdir):
            train(config, workdir)

    They are read from `metrics.jsonl`, so training isn't touched and a resumed run shows its past.

    Args:
      workdir: a run's folder, or one that holds several, up to two levels down as a distillation's
        does; of those, the latest four are shown. It needn't exist.
      every: seconds between two looks at the files.

    Raises:
      UserError: this isn't a notebook.
    """
    if "IPython" not in sys.modules or sys.modules["IPython"].get_ipython() is None:
        raise UserError(
            "Live curves are shown in a notebook; elsewhere look at metrics.jsonl or TensorBoard."
        )
    from IPython.display import Image, display

    workdir, done = pathlib.Path(workdir), threading.Event()
    shown, handle = None, None

    def show():
        nonlocal shown, handle
        try:
            runs = logged(workdir)
        except (OSError, ValueError):  # a file that is being replaced, or a drive that is away
            return
        if not runs or runs == shown:
            return
        shown, picture = runs, Image(curves(runs))
        if handle is None:
            handle = display(picture, display_id=True)
        else:
            handle.update(picture)

    def watch():
        while not done.wait(every):
            show()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
        show()


def logged(workdir: pathlib.Path) -> dict[str, list[dict]]:
    """The rows of the latest runs in a folder that have logged any, by the runs' paths."""
    # No deeper: checkpoints have many files, and a mounted drive is slow to list.
    places = (workdir.glob(f"{below}metrics.jsonl") for below in ("", "*/", "*/*/"))
    files = sorted(itertools.chain(*places), key=lambda file: file.stat().st_mtime)
    rows = {str(file.parent.relative_to(workdir.parent)): metrics.read(file) for file in files}
    return dict([(name, run) for name, run in rows.items() if run][-MOST:])


def curves(runs: dict[str, list[dict]]) -> bytes:
    """Every run's losses over its steps, side by side, as a PNG file."""
    figure = Figure(figsize=(5 * len(runs), 3), layout="constrained")
    (row,) = figure.subplots(1, len(runs), squeeze=False)
    for axes, (name, rows) in zip(row, runs.items(), strict=True):
        plot_losses(axes, name, rows)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=70)
    return buffer.getvalue()
