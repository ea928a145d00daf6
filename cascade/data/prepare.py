"""Writes data sets to disk: whole or not at all, and only once."""

import contextlib
import io
import json
import os
import shutil
import tempfile
from pathlib import Path

from tqdm import tqdm

from cascade.data.record_files import to_example, write_file
from cascade.errors import UserError

SMALLEST, LARGEST = 16, 4096  # sides of pictures
SHARD_SIZE = 4096  # records to a file


def build_emoji(
    out: str | Path,
    variant: str = "full",
    resolution: int | None = None,
    scenes: int | None = None,
    seed: int = 0,
    processes: int | None = None,
) -> Path:
    """Builds the emoji data set under `out`, or returns at once if it is already there.

    One build at a time may write to a folder: what a killed one left there is removed first.
    Read it with the source `{"name": "tfds", "dataset": "emoji/<variant>", "data_dir": out, ...}`.

    Args:
      out: folder for data sets; this one goes to `out/emoji/<variant>/<version>`.
      variant: "full", "small" or "demo", see `cascade.data.emoji.builder.Emoji`.
      resolution: side of the pictures in pixels; None takes the variant's default (256; demo 128).
      scenes: how many composed scenes to add to train; None takes the default (10,000;
        small 2,000; demo 0).
      seed: decides the held-out drawings and the scenes.
      processes: processes that draw; None takes one for small builds, else one a core.

    Returns:
      The folder that holds the ArrayRecord files.

    Raises:
      UserError: a bad argument, another build in `out`, or a folder that can't be written.
    """
    # Imported here so that `cascade --help` does not wait for TFDS.
    import tensorflow_datasets as tfds

    from cascade.data.emoji.builder import DEFAULTS, Emoji

    if variant not in DEFAULTS:
        raise UserError(f"Unknown variant {variant!r} of emoji; choose from {', '.join(DEFAULTS)}.")
    settings = DEFAULTS[variant]._replace(seed=seed)
    if resolution is not None:
        settings = settings._replace(resolution=resolution)
    if scenes is not None:
        settings = settings._replace(scenes=scenes)
    if not SMALLEST <= settings.resolution <= LARGEST:
        raise UserError(
            f"The resolution is {settings.resolution}; give {SMALLEST} to {LARGEST} pixels a side."
        )
    if settings.scenes < 0 or settings.seed < 0:
        raise UserError("The number of scenes and the seed must not be negative.")
    if processes is None:
        processes = 1 if settings.variant == "demo" and settings.scenes < 500 else os.cpu_count()

    folder = Path(out) / "emoji" / variant / str(Emoji.VERSION)
    if folder.exists():
        _check_same(folder, settings)
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        for stale in folder.parent.glob("incomplete.*"):  # a build that was killed
            shutil.rmtree(stale)
        shutil.copyfile(Path(__file__).parent / "emoji" / "NOTICE", folder.parent / "NOTICE")
        tfds.disable_progress_bar()
        builder = Emoji(
            config=variant,
            data_dir=os.fspath(out),
            file_format="array_record",
            settings=settings,
            processes=processes,
        )
        # TFDS writes to a temporary folder and renames it when all is done. What it prints is about
        # downloads, and there are none.
        with contextlib.redirect_stdout(io.StringIO()):
            builder.download_and_prepare()
    except OSError as error:
        why = error.strerror or error
        raise UserError(
            f"Cannot write to {Path(out).absolute()} ({why}); choose another folder."
        ) from error
    return folder


def _check_same(folder: Path, settings):
    """Refuses to pass off a build of other settings as the one asked for."""
    built = json.loads((folder / "metadata.json").read_text())
    asked = settings._asdict()
    differ = [f"{k} {built[k]} instead of {asked[k]}" for k in asked if built[k] != asked[k]]
    if differ:
        raise UserError(
            f"{folder} was built with {', '.join(differ)}; choose another folder or remove it."
        )


def record_names(name: str, count: int, shard_size: int = SHARD_SIZE) -> list[str]:
    """The files into which `write_records` packs `count` pictures, in a folder of that name."""
    shards = -(-count // shard_size)
    return [f"{name}-{shard:05d}-of-{shards:05d}.array_record" for shard in range(shards)]


def write_records(source, out: str | Path, shard_size: int = SHARD_SIZE):
    """Packs any source into ArrayRecord files that the source "array_record" reads.

    A record is a tf.train.Example with the features image (the encoded file), captions and key.

    Args:
      source: see `cascade.data.sources`; its pictures must be encoded files.
      out: folder to make; it must not exist.
      shard_size: records to a file.

    Raises:
      UserError: `out` exists or can't be written.
    """
    out = Path(out)
    if out.exists():
        raise UserError(f"{out} already exists; choose another folder or remove it.")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as temporary:
            whole = Path(temporary) / out.name
            whole.mkdir()
            names = record_names(out.name, len(source), shard_size)
            progress = tqdm(total=len(source), desc=f"write {out.name}", unit="picture")
            for shard, name in enumerate(names):
                path = whole / name
                end = min(len(source), (shard + 1) * shard_size)
                records = (source[i] for i in range(shard * shard_size, end))
                write_file(path, (to_example(record) for record in records), progress.update)
            progress.close()
            os.replace(whole, out)
    except OSError as error:
        raise UserError(f"Cannot write {out}: {error}; choose another folder.") from error
