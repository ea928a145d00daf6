"""`cascade train` on data that changed or broke since its checkpoint: a sentence, nothing lost."""

import hashlib
import shutil

import numpy as np
import pytest
from click.testing import CliRunner
from one_level import flags
from test_tars import picture, write_tar

from cascade.cli import main
from cascade.data.prepare import write_records
from cascade.data.sources import folder

CONFIG = """
from cascade.configs.emoji import base64

def get_config(arg=""):
    config = base64.get_config("smoke")
    config.data.source = {{
        "name": "mixture",
        "sources": {{
            "records": {{"name": "array_record", "files": "{data}/*.array_record",
                        "image_key": "image", "caption_key": "captions"}},
            "tars": {{"name": "webdataset", "files": "{data}/*.tar", "caption_file": "txt",
                     "caption_key": ""}},
        }},
        "weights": {{"records": 3, "tars": 1}},
    }}
    config.data.max_broken_rate = 0.0
    return config
"""


def noisy(seed: int) -> bytes:
    """A picture whose file ends in noise of its own, so that no two are alike on disk."""
    return picture() + np.random.default_rng(seed).integers(0, 256, 8000, np.uint8).tobytes()


def train(data, place, steps):
    """Runs `cascade train` in place/run on the data."""
    (place / "config.py").write_text(CONFIG.format(data=data))
    seldom = {f"train__{key}": 99 for key in ("eval_every", "sample_every", "log_every")}
    overrides = flags(
        text_cache__folder=place / "cache", train__steps=steps, train__checkpoint_every=99, **seldom
    )
    arguments = ["--config", place / "config.py", "--workdir", place / "run", *overrides]
    return CliRunner().invoke(main, ["train", *map(str, arguments)])


@pytest.fixture(scope="module")
def trained(one_device, tmp_path_factory):
    """A folder with data, and a run of one step on it."""
    place = tmp_path_factory.mktemp("trained")
    (place / "pictures").mkdir()
    for i in range(20):
        (place / "pictures" / f"{i:02d}.png").write_bytes(noisy(i))
        (place / "pictures" / f"{i:02d}.txt").write_text(f"number {i}")
    write_records(folder(str(place / "pictures")), place / "data", shard_size=10)
    for tar, first in (("a.tar", 20), ("b.tar", 24)):
        write_tar(place / "data" / tar, tarred(first))
    done = train(place / "data", place, steps=1)
    assert done.exit_code == 0, done.output
    return place


def tarred(first: int, noise: int = 0) -> dict[str, bytes]:
    pictures = {f"{i}.png": noisy(i + noise) for i in range(first, first + 4)}
    return pictures | {f"{i}.txt": f"number {i}".encode() for i in range(first, first + 4)}


def record_file(data):
    return sorted(data.glob("*.array_record"))[1]


def add(data):
    shutil.copy(data / "b.tar", data / "c.tar")
    return "'tars: c.tar' is new"


def remove(data):
    (data / "b.tar").unlink()
    return "'tars: b.tar' is gone"


def rename(data):
    (data / "a.tar").rename(data / "c.tar")
    return "'tars: a.tar' is gone"


def other_pictures_of_the_same_size(data):
    size = (data / "b.tar").stat().st_size
    write_tar(data / "b.tar", tarred(24, noise=100))
    assert (data / "b.tar").stat().st_size == size
    return "'tars: b.tar' has other contents"


def cut_tar(data):
    (data / "b.tar").write_bytes((data / "b.tar").read_bytes()[:20_000])
    return "b.tar"


def empty_tar(data):
    (data / "b.tar").write_bytes(b"")
    return "b.tar"


def no_tar(data):
    (data / "b.tar").write_text("a letter" * 1000)
    return "b.tar"


def flip_in_a_header(data):
    flip(data / "b.tar", 148)  # where a header's checksum stands
    return "b.tar"


def cut_records(data):
    record_file(data).write_bytes(record_file(data).read_bytes()[:50_000])
    return record_file(data).name


def empty_records(data):
    record_file(data).write_bytes(b"")
    return record_file(data).name


def no_records(data):
    record_file(data).write_text("a letter" * 10_000)
    return record_file(data).name


def flip_in_a_record(data):
    flip(record_file(data), 40_000)  # in the middle of some picture's noise
    return f"of {record_file(data)} is damaged"


def flip(path, place):
    whole = bytearray(path.read_bytes())
    whole[place : place + 8] = bytes(byte ^ 0xFF for byte in whole[place : place + 8])
    path.write_bytes(whole)


DAMAGES = (
    add, remove, rename, other_pictures_of_the_same_size, cut_tar, empty_tar, no_tar,
    flip_in_a_header, cut_records, empty_records, no_records, flip_in_a_record,
)  # fmt: skip


def files_of(folder):
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_bad_data_is_one_sentence_and_nothing_is_lost(trained, tmp_path, damage):
    data, kept = tmp_path / "data", files_of(trained / "run" / "checkpoints")
    shutil.copytree(trained / "data", data)
    named = damage(data)
    done = train(data, trained, steps=12)
    assert done.exit_code == 2, (done.output, done.exception)
    (said,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert named in said and "Traceback" not in done.output
    assert files_of(trained / "run" / "checkpoints") == kept != {}
