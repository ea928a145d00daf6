"""Data that changed under a resumed run, and record files that are damaged."""

import logging
import shutil

import jax
import numpy as np
import pytest
from test_tars import picture, write_tar
from tiny_loader import data_section

from cascade.data import fingerprint
from cascade.data.loader import make_loader
from cascade.data.prepare import build_emoji, write_records
from cascade.data.preprocess import BrokenPicture
from cascade.data.sources import array_record, folder, read_record, tfds
from cascade.errors import UserError
from cascade.training.checkpoint import Checkpoints

RECORDS = 40


@pytest.fixture
def shards(tmp_path):
    """Forty pictures of noise in four ArrayRecord files."""
    (tmp_path / "pictures").mkdir()
    for i in range(RECORDS):
        noise = np.random.default_rng(i).integers(0, 256, 8000, np.uint8).tobytes()
        (tmp_path / "pictures" / f"{i:02d}.png").write_bytes(picture() + noise)
        (tmp_path / "pictures" / f"{i:02d}.txt").write_text(f"number {i}")
    write_records(folder(str(tmp_path / "pictures")), tmp_path / "shards", shard_size=10)
    return tmp_path / "shards"


def of_shards(place):
    return {
        "name": "array_record",
        "files": f"{place}/*.array_record",
        "image_key": "image",
        "caption_key": "captions",
    }


def loader(source, rate: float = 0.1):
    return make_loader(
        data_section(source, max_broken_rate=rate),
        resolution=8,
        lowres_resolution=0,
        crop_resolution=0,
        texts=lambda captions: {"text": np.array([int(c.split()[-1]) for c in captions])},
        seed=0,
        batch_size=4,
        train=True,
    )


def saved(stream, workdir) -> Checkpoints:
    checkpoints = Checkpoints(workdir)
    checkpoints.save(1, {"w": jax.numpy.zeros(3)}, stream, {})
    checkpoints.wait()
    return checkpoints


def shape():
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return {"w": jax.ShapeDtypeStruct((3,), np.float32, sharding=place)}


def test_a_checkpoint_goes_on_where_the_data_moved_to(shards, tmp_path):
    stream = loader(of_shards(shards))
    next(stream)
    checkpoints = saved(stream, tmp_path / "run")
    expected = next(stream)["text"]
    shutil.copytree(shards, tmp_path / "elsewhere")
    moved = loader(of_shards(tmp_path / "elsewhere"))
    assert checkpoints.restore(shape(), moved)[0] == 1
    np.testing.assert_array_equal(next(moved)["text"], expected)


def add(shards):
    file = sorted(shards.iterdir())[0]
    shutil.copy(file, file.with_name("more.array_record"))
    return "'more.array_record' is new"


def remove(shards):
    file = sorted(shards.iterdir())[-1]
    file.unlink()
    return f"{file.name!r} is gone"


def rename(shards):
    file = sorted(shards.iterdir())[0]
    file.rename(shards / "z.array_record")
    return f"{file.name!r} is gone"


def exchange(shards):
    """The order that records come in, under the same names."""
    first, second, *_ = sorted(shards.iterdir())
    first.rename(shards / "aside")
    second.rename(first)
    (shards / "aside").rename(second)
    return f"{first.name!r} has other contents"


@pytest.mark.parametrize("change", [add, remove, rename, exchange])
def test_a_changed_list_of_shards_is_told(shards, tmp_path, change):
    stream = loader(of_shards(shards))
    next(stream)
    checkpoints = saved(stream, tmp_path / "run")
    named = change(shards)
    now = len(list(shards.iterdir()))
    with pytest.raises(
        UserError, match=rf"changed under this run: {named}.*40 records in 4 files.* in {now} files"
    ):
        checkpoints.restore(shape(), loader(of_shards(shards)))
    assert (tmp_path / "run" / "checkpoints" / "1").is_dir()  # not taken for damaged


def test_a_changed_tar_is_told(tmp_path):
    source = {
        "name": "mixture",
        "sources": {
            "tars": {
                "name": "webdataset",
                "files": f"{tmp_path}/*.tar",
                "caption_file": "txt",
                "caption_key": "",
            },
            "more": {"name": "synthetic", "records": 5, "side": 8, "captions": 5, "seed": 0},
        },
        "weights": {"tars": 1, "more": 1},
    }
    write_tar(tmp_path / "x.tar", {"a.png": picture(), "a.txt": b"number 1"})
    state = loader(source).get_state()
    loader(source).set_state(state)
    write_tar(
        tmp_path / "x.tar",
        {"a.png": picture(), "a.txt": b"number 1", "b.png": picture(), "b.txt": b"number 2"},
    )
    with pytest.raises(UserError, match=r"was 6 records.* is 7 records"):
        loader(source).set_state(state)


def test_of_many_files_some_are_sampled_and_none_named(shards, monkeypatch):
    monkeypatch.setattr(fingerprint, "LISTED", 2)
    state = loader(of_shards(shards)).get_state()
    assert state["data"]["listing"] == {}
    exchange(shards)
    with pytest.raises(UserError, match=r"changed under this run\. It was 40 records"):
        loader(of_shards(shards)).set_state(state)


@pytest.mark.parametrize("kept", [0, 1000, 65536, -1])
def test_a_record_file_that_is_cut_short_is_named(shards, kept):
    file = sorted(shards.iterdir())[2]
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(UserError, match=rf"Cannot read .*{file.name} as an ArrayRecord file"):
        array_record(f"{shards}/*", "image", "captions")


def test_a_damaged_tfds_shard_is_named(tmp_path):
    place = build_emoji(tmp_path, "demo", resolution=16)
    (file,) = place.glob("*train*array_record*")
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(UserError, match=file.name):
        tfds("emoji/demo", str(tmp_path), "train", "image", "captions", "{}")


def damage(shards) -> str:
    """Flips bits in the middle of the third file; its name."""
    file = sorted(shards.iterdir())[2]
    data = bytearray(file.read_bytes())
    data[40_000:40_008] = bytes(byte ^ 0xFF for byte in data[40_000:40_008])
    file.write_bytes(data)
    return file.name


def test_a_damaged_record_names_its_file_and_counts_as_broken(shards, caplog):
    name = damage(shards)
    source, broken = array_record(f"{shards}/*", "image", "captions"), []
    for i in range(RECORDS):
        try:
            read_record(source, i)
        except BrokenPicture as error:
            broken.append(i)
            assert f"record {i - 20} of " in str(error) and name in str(error)
    assert len(broken) == 1 and 20 <= broken[0] < 30
    with caplog.at_level(logging.WARNING):
        stream = loader(of_shards(shards), rate=0.1)
        seen = {int(n) for _ in range(30) for n in next(stream)["text"]}
    assert seen == set(range(RECORDS)) - set(broken)
    assert name in caplog.text and caplog.text.count("Skipped broken record") == 1
    with pytest.raises(UserError, match=rf"1 of the first .*rate 0\.0.*{name}"):
        stream = loader(of_shards(shards), rate=0.0)
        for _ in range(30):
            next(stream)
