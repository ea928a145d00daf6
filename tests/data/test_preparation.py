"""`cascade data prepare`: what is kept, determinism, restarts, refusals. Needs the extra "beam"."""

import hashlib
import io
import json

import numpy as np
import pyarrow
import pytest
from click.testing import CliRunner
from PIL import Image
from pyarrow import parquet

pytest.importorskip("apache_beam")

from test_tars import write_tar

from cascade import config as configs
from cascade import schema
from cascade.cli import main
from cascade.data import preparation
from cascade.data.preparation import prepare
from cascade.data.record_files import ArrayRecord
from cascade.data.sources import read_record
from cascade.errors import UserError
from cascade.registry import build
from cascade.text.encoders import ENCODERS


def jpeg(seed: int, size=(64, 48), quality: int = 90) -> bytes:
    """A picture of smooth random blotches, JPEG."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(
        buffer, "JPEG", quality=quality
    )
    return buffer.getvalue()


@pytest.fixture
def tars(tmp_path):
    """Ten records in two tars: six to keep, and one each for every reason to drop."""
    good = {f"{i}.jpg": jpeg(i) for i in range(6)}
    bad = {
        "small.jpg": jpeg(7, (20, 60)),
        "long.jpg": jpeg(8, (320, 40)),
        "silent.jpg": jpeg(9),
        "broken.jpg": jpeg(10)[:300],
        "again.jpg": jpeg(3, (80, 60), quality=60),  # number 3, larger and coarser
    }
    texts = {f"{name[:-4]}.txt": f"the picture {name}".encode() for name in {**good, **bad}}
    texts["silent.txt"] = b"x"
    write_tar(tmp_path / "0.tar", {**good, **{n: t for n, t in texts.items() if n[0].isdigit()}})
    write_tar(tmp_path / "1.tar", {**bad, **{n: t for n, t in texts.items() if n[0].isalpha()}})
    return tmp_path


def settings(folder, *overrides):
    return configs.load_as(
        "configs/prepare.py:webdataset",
        [
            f"--config.source.files={folder}/*.tar",
            "--config.filter.min_side=32",
            "--config.filter.max_aspect=4.0",
            "--config.picture.side=32",
            "--config.shard_records=4",
            "--config.max_broken_rate=0.2",
            *overrides,
        ],
        schema.PREPARATION,
        schema.PREPARATION_RANGES,
    )


def files_of(folder) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "preparation.json"
    }


def records_of(folder) -> list[dict]:
    source = ArrayRecord(str(folder / "*.array_record"), "image", "captions")
    return [read_record(source, i) for i in range(len(source))]


def test_what_is_kept_and_why_the_rest_is_not(tars, tmp_path):
    told = prepare(settings(tars), tmp_path / "out")
    records = records_of(tmp_path / "out")
    assert [record["key"] for record in records] == [f"0.tar/{i}" for i in range(6)]
    assert records[0]["captions"] == ["the picture 0.jpg"]
    assert Image.open(io.BytesIO(records[0]["image"])).size == (43, 32)  # 64 x 48, the side 32
    assert (told["read"], told["kept"], told["duplicates"]) == (11, 6, 1)
    counts = {reason: why["count"] for reason, why in told["reasons"].items()}
    assert sum(counts.values()) == 4 and set(counts.values()) == {1}
    for reason, example in (
        ("filtered: #x# has a side below #", "1.tar/small"),
        ("filtered: #x# is longer than #:#", "1.tar/long"),
        ("filtered: no caption of # to # characters", "1.tar/silent"),
    ):
        assert told["reasons"][reason]["examples"] == [example]
    assert [r for r in counts if r.startswith("broken: ")] != []
    for chart in told["histograms"].values():
        assert sum(chart["counts"]) == 6
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "pictures-00000-of-00003.array_record",
        "pictures-00001-of-00003.array_record",
        "preparation.json",
        "statistics.html",
        "statistics.json",
    ]


def test_tokens_and_metadata_are_stored(tars, tmp_path):
    config = settings(tars)
    prepare(config, tmp_path / "out")
    source = ArrayRecord(str(tmp_path / "out" / "*.array_record"), "image", "captions")
    features = source._features(2)
    tokens = build("text encoder", ENCODERS, config.text).tokenize(["the picture 2.jpg"])
    assert list(features["token_ids"].int64_list.value) == tokens.ids[0][tokens.mask[0]].tolist()
    numbers = ("source_width", "source_height", "width", "height", "source_index", "token_counts")
    values = [features[name].int64_list.value[0] for name in numbers]
    assert values == [64, 48, 43, 32, 2, tokens.mask.sum()]


@pytest.mark.parametrize("encoding", ["png", "raw", "jpeg"])
def test_squares_in_every_encoding(tars, tmp_path, encoding):
    changes = ("--config.picture.square=True", f"--config.picture.encoding={encoding}")
    prepare(settings(tars, *changes), tmp_path / "out")
    for record in records_of(tmp_path / "out"):
        assert Image.open(io.BytesIO(record["image"])).size == (32, 32)


def test_two_runs_write_the_same_bytes_and_a_finished_one_nothing(tars, tmp_path, monkeypatch):
    one, two = tmp_path / "one", tmp_path / "two"
    told = prepare(settings(tars), one)
    prepare(settings(tars), two)
    assert files_of(one) == files_of(two)
    monkeypatch.setattr(preparation, "_run", None)
    assert prepare(settings(tars), one) == told


@pytest.mark.parametrize("stop", ["MakePart.process", "Work.write_shard"])
def test_a_stopped_run_goes_on(tars, tmp_path, monkeypatch, stop):
    whole, out = tmp_path / "whole", tmp_path / "out"
    prepare(settings(tars), whole)
    owner, name = stop.split(".")
    method = getattr(getattr(preparation, owner), name)

    def dies(self, number, *rest):
        if number == 1:
            raise KeyError("the machine went down")
        return method(self, number, *rest)

    with monkeypatch.context() as patch, pytest.raises(Exception, match="went down"):
        patch.setattr(getattr(preparation, owner), name, dies)
        prepare(settings(tars), out)
    assert not (out / "statistics.json").exists()
    (out / ".pictures-00000-of-00003.array_record.0.tmp").write_text("left by a kill")
    prepare(settings(tars), out)
    assert files_of(out) == files_of(whole)


def test_too_many_broken_files_stop_it_and_a_higher_rate_goes_on(tars, tmp_path):
    with pytest.raises(UserError, match=r"1 of 11 records are broken.*0\.05.*'1\.tar/broken'"):
        prepare(settings(tars, "--config.max_broken_rate=0.05"), tmp_path / "out")
    assert prepare(settings(tars), tmp_path / "out")["kept"] == 6


def test_duplicates_may_stay(tars, tmp_path):
    told = prepare(settings(tars, "--config.filter.duplicate_bits=-1"), tmp_path / "out")
    assert (told["kept"], told["duplicates"]) == (7, 0)


def test_another_preparation_is_not_mixed_in(tars, tmp_path):
    prepare(settings(tars), tmp_path / "out")
    with pytest.raises(UserError, match="other settings"):
        prepare(settings(tars, "--config.picture.side=16"), tmp_path / "out")
    write_tar(tars / "2.tar", {"new.jpg": jpeg(20), "new.txt": b"new"})
    with pytest.raises(UserError, match="data that has changed"):
        prepare(settings(tars), tmp_path / "out")
    with pytest.raises(UserError, match="other files"):
        prepare(settings(tars), tars)


def test_from_parquet_by_the_command_line(tmp_path):
    (tmp_path / "pictures").mkdir()
    for i in range(3):
        (tmp_path / "pictures" / f"{i}.jpg").write_bytes(jpeg(i))
    rows = {"file_name": ["0.jpg", "1.jpg", "2.jpg"], "caption": ["none", "one one", "<b>two</b>"]}
    parquet.write_table(pyarrow.table(rows), tmp_path / "t.parquet")
    arguments = [
        *("data", "prepare", "--config", "configs/prepare.py:parquet"),
        *("--out", str(tmp_path / "out"), f"--config.source.files={tmp_path}/*.parquet"),
        *(f"--config.source.root={tmp_path}/pictures", "--config.filter.min_side=8"),
        *("--config.picture.side=16", "--direct_num_workers=1"),
    ]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0 and "Kept 3 of 3 records" in result.output
    assert [r["captions"] for r in records_of(tmp_path / "out")] == [[c] for c in rows["caption"]]
    page = (tmp_path / "out" / "statistics.html").read_text()
    assert page.count("<figure>") == 3 and "&lt;b&gt;two&lt;/b&gt;" in page
    assert json.loads((tmp_path / "out" / "statistics.json").read_text())["kept"] == 3
    result = CliRunner().invoke(main, [*arguments, "--config.picture.encoding=tiff"])
    assert result.exit_code == 2 and "one of jpeg, png, raw" in result.output
