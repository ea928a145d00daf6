"""Pictures that are there already, real ones or made elsewhere, and their features."""

import functools
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from cascade import config as configs
from cascade.data.fingerprint import contents
from cascade.data.folder import METADATA, SUFFIXES, Folder, visible_files
from cascade.data.judge import Judge, Skipped
from cascade.data.loader import make_source
from cascade.data.preprocess import BrokenPicture, Filtered, Preprocess, colour
from cascade.data.sources import PLACES, array_record, read_record
from cascade.errors import UserError
from cascade.evaluation.features import ROWS, Extractor
from cascade.evaluation.record import SHOWN, Record
from cascade.images import read_metadata
from cascade.parallel.mesh import (
    batch_shares,
    on_all_processes,
    process_share,
    put_batch,
    whole_on_host,
)

SPLITS = ("heldout", "train")
MAX_ASPECT = 10.0


class Data(NamedTuple):
    """Captioned pictures to compare with.

    Attributes:
      source: see `cascade.data.sources`.
      about: what tells it from others, JSON-able.
      ground: what shows through transparent pictures.
      max_aspect: how long a picture may be; its central square counts.
      max_broken_rate: share of records that may be broken.
    """

    source: Any
    about: Mapping[str, Any]
    ground: tuple[int, int, int] = (255, 255, 255)
    max_aspect: float = MAX_ASPECT
    max_broken_rate: float = 0.01

    def preprocess(self, resolution: int, least: int = 1) -> Preprocess:
        """What makes squares of that side; pictures that are smaller, or than `least`, are out."""
        return Preprocess(resolution, self.ground, max(resolution, least), self.max_aspect)


def open_data(text: str, split: str = "heldout", overrides: Sequence[str] = ()) -> Data:
    """The pictures that `--source` names.

    Args:
      text: a config, `path/to/config.py[:arg]`, whose data section says what is read; a pattern of
        ArrayRecord files, `data/web/*.array_record`, with the features image and captions, as
        `cascade data prepare` writes them; or a folder of pictures with captions.
      split: of a config, "heldout", its evaluation source, or "train".
      overrides: of a config, `--config.data...=value`.

    Raises:
      UserError: no such source, or whatever is wrong with it.
    """
    if split not in SPLITS:
        raise UserError(f"Unknown split {split!r}; choose from {', '.join(SPLITS)}.")
    if is_config(text):
        section = configs.load(text, overrides).data
        chosen = configs.to_json(section.source if split == "train" else section.eval_source)
        source = make_source(section, train=split == "train")
        ground, max_aspect = colour(section.ground), section.filter.max_aspect
        about = _about(source, chosen) | {"ground": ground, "max_aspect": max_aspect}
        return Data(source, about, ground, max_aspect, section.max_broken_rate)
    if overrides:
        raise UserError(f"{overrides[0]!r} changes a config, and --source {text!r} is none.")
    if "*" in text or text.endswith(".array_record"):
        source = array_record(text, "image", "captions")
    else:
        source = Folder(text)
    if len(source) == 0:
        raise UserError(f"--source {text!r} holds no record; give another.")
    return Data(source, _about(source, {}))


def is_config(text: str) -> bool:
    """Whether `--source` names a config rather than pictures."""
    return text.partition(":")[0].endswith(".py")


def _about(source, section: Mapping[str, Any]) -> dict[str, Any]:
    """What a source is told by: its records, and the section that says which of them."""
    held = {key: source.contents[key] for key in ("files", "bytes", "digest")}
    kept = {key: value for key, value in section.items() if key not in PLACES}
    return {"records": len(source), "section": kept, **held}


class Made:
    """A folder of pictures made elsewhere, as a source; captions are as good as they go.

    They come from texts or metadata beside the pictures (see `cascade.data.folder.Folder`), or from
    the prompts that `cascade sample` writes into its PNG files, whose contact sheets, which have
    none, are left out; or there are none. Hidden files count for nothing.
    """

    def __init__(self, path: str):
        """Lists the folder.

        Raises:
          UserError: no folder, no picture, or captions beside only some of them; or it can't be
            listed.
        """
        self.folder = Path(path).expanduser()
        if not self.folder.is_dir():
            raise UserError(f"There is no folder {path!r} of pictures; correct --pictures.")
        files = visible_files(self.folder)
        self._files = [f for f in files if f.suffix.lower() in SUFFIXES and f.is_file()]
        if not self._files:
            raise UserError(f"The folder {path!r} holds no picture; correct --pictures.")
        captioned = [f for f in files if f.suffix.lower() == ".txt" or f.name in METADATA]
        if captioned:
            inner = Folder(path)
            told = {inner.key(i): inner.captions(i) for i in range(len(inner))}
            names = [f.relative_to(self.folder).as_posix() for f in self._files]
            self._captions = [told[name] for name in names]
        else:
            prompts = [_prompt(file) for file in self._files]
            if any(prompt is not None for prompt in prompts):
                pairs = zip(self._files, prompts, strict=True)
                kept = [(file, prompt) for file, prompt in pairs if prompt is not None]
                self._files, prompts = map(list, zip(*kept, strict=True))
            self._captions = [[] if prompt is None else [prompt] for prompt in prompts]
        self.contents = contents(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, i: int) -> dict:
        captions = self._captions[i] or [self.key(i)]  # every record has one
        return {"image": self._files[i].read_bytes(), "captions": captions, "key": self.key(i)}

    def sizes(self) -> Iterator[tuple[Path, tuple[int, int]]]:
        """Each file and its picture's width and height.

        Raises:
          UserError: one isn't a picture.
        """
        for file in self._files:
            try:
                with Image.open(file) as picture:
                    yield file, picture.size
            except (OSError, ValueError, UnidentifiedImageError) as error:
                raise UserError(f"{str(file)!r} isn't a picture ({error}); remove it.") from error

    def key(self, i: int) -> str:
        """The file name of picture i."""
        return self._files[i].relative_to(self.folder).as_posix()

    def captions(self, i: int) -> list[str]:
        """The captions of picture i, none where nothing tells."""
        return self._captions[i]


def _prompt(file: Path) -> str | None:
    """What `cascade sample` says that a PNG file shows."""
    return read_metadata(file).get("prompt") if file.suffix.lower() == ".png" else None


def side(made: Sequence[Made], resolution: int | None) -> int:
    """The side of pictures that are all of one size, and square; or, given one, the least of any.

    Raises:
      UserError: one can't be read, or they differ and no resolution says at which to compare.
    """
    sizes = {size: file for source in made for file, size in source.sizes()}
    if resolution is None and (len(sizes) > 1 or len(set(next(iter(sizes)))) > 1):
        named = "; ".join(f"{file.name} is {w}×{h}" for (w, h), file in list(sizes.items())[:2])
        raise UserError(
            f"The pictures aren't squares of one size ({named}); give --resolution, a side to "
            "which their central squares are shrunk."
        )
    return min(map(min, sizes))


class Reader(NamedTuple):
    """Place in a list of records -> uint8 [resolution, resolution, 3], or why there is none.

    Attributes:
      least: side of the smallest pictures that count; those below `resolution` never do.
    """

    data: Data
    places: Sequence[int]
    resolution: int
    strict: bool
    least: int = 1

    def __call__(self, place: int) -> np.ndarray | Skipped | None:
        """Reads one; None beyond the end.

        Raises:
          UserError: it can't be used, and `strict` wants all of them.
        """
        if place >= len(self.places):
            return None
        number, source = int(self.places[place]), self.data.source
        try:
            preprocess = self.data.preprocess(self.resolution, self.least)
            return preprocess(read_record(source, number)["image"])
        except (BrokenPicture, Filtered) as reason:
            key = source.key(number)
            if self.strict:
                raise UserError(f"The picture {key!r} can't be used: {reason}.") from reason
            return Skipped(number, key, str(reason), isinstance(reason, BrokenPicture))


def measure(
    record: Record, reader: Reader, most: int, extractors: Sequence[Extractor], what: str
) -> int:
    """Features of the first `most` usable pictures of a list, added to a record.

    All of the record's processes call this together; each reads and decodes its part. Rows are the
    extractors' features by their names, and "place", where in the list the picture stands.

    Args:
      what: names the progress bar.

    Returns:
      How many usable pictures were found: `most`, or fewer.

    Raises:
      UserError: too many are broken; or the reader's own, or the record's.
    """
    mesh = record.mesh
    rows = ROWS * batch_shares(mesh)
    index, blocks = process_share(mesh)
    mine = range(index * rows // blocks, (index + 1) * rows // blocks)
    judge = Judge(len(reader.places), reader.data.max_broken_rate)
    blank = np.zeros((reader.resolution, reader.resolution, 3), np.uint8)

    def read(start: int) -> dict[str, np.ndarray]:
        found = list(pool.map(reader, (start + row for row in mine)))
        valid = [picture is not None and judge(picture) for picture in found]
        pictures = [p if ok else blank for p, ok in zip(found, valid, strict=True)]
        return {"pictures": np.stack(pictures), "valid": np.array(valid)}

    done = record.count
    bar = tqdm(total=most, initial=done, desc=what, unit="picture", disable=jax.process_index() > 0)
    with bar, ThreadPoolExecutor() as pool:
        for start in range(record.following("place"), len(reader.places), rows):
            if done >= most:
                break
            local = on_all_processes(functools.partial(read, start), mesh)
            batch = put_batch(local, mesh)
            kept = np.flatnonzero(whole_on_host(batch["valid"]))[: most - done]
            measured = {e.name: whole_on_host(e(batch["pictures"]))[kept] for e in extractors}
            record.add(**measured, place=start + kept)
            if start < SHOWN:
                pictures = whole_on_host(batch["pictures"])
                record.keep({start + int(row): pictures[row] for row in kept})
            done += len(kept)
            bar.update(len(kept))
    record.write()
    return done
