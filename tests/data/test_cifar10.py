"""CIFAR-10's package becomes records, picture by picture; another one is a sentence."""

import io
import json
import tarfile

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cascade.cli import main
from cascade.data import cifar10
from cascade.data.cifar10 import CAPTIONS, build_cifar10, read_package
from cascade.data.sources import array_record
from cascade.errors import UserError

ROWS = 20  # of a file, here


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(cifar10, "ROWS", ROWS)


def png(rows: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(rows).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def contents():
    """The package's files by name, the pictures [N, 32, 32, 3] and the labels of its splits."""
    rng = np.random.default_rng(0)
    files, pictures, labels = {"package.json": b"{}"}, {}, {}
    for split, names in cifar10.PICTURES.items():
        count = ROWS * len(names)
        pictures[split] = rng.integers(0, 256, (count, 32, 32, 3), np.uint8)
        labels[split] = rng.permutation(np.arange(count) % 10).tolist()
        files[cifar10.LABELS[split]] = json.dumps(labels[split]).encode()
        for i, name in enumerate(names):
            rows = pictures[split][i * ROWS : (i + 1) * ROWS]
            files[name] = png(rows.reshape(ROWS, 1024, 3))
    return files, pictures, labels


def packed(path, files: dict[str, bytes]):
    """The .tgz that npm makes of these files."""
    with tarfile.open(path, "w:gz") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def test_every_picture_and_its_class_arrives(contents, tmp_path):
    files, pictures, labels = contents
    package = packed(tmp_path / "cifar.tgz", files)
    words = ["data", "cifar10", "--package", str(package), "--out", str(tmp_path / "out")]
    assert CliRunner().invoke(main, words, catch_exceptions=False).exit_code == 0
    for split in ("train", "test"):
        shards = str(tmp_path / "out" / split / "*.array_record")
        source = array_record(shards, "image", "captions")
        assert len(source) == len(pictures[split]) == ROWS * len(cifar10.PICTURES[split])
        for i, (picture, label) in enumerate(zip(pictures[split], labels[split], strict=True)):
            record = source[i]
            stored = Image.open(io.BytesIO(record["image"]))
            np.testing.assert_array_equal(np.asarray(stored), picture)
            assert record["captions"] == [CAPTIONS[label]] and record["key"] == f"{split}-{i:05d}"
    package.unlink()  # what is there is reused
    assert build_cifar10(package, tmp_path / "out") == tmp_path / "out"


@pytest.mark.parametrize("inner", ["", "package"])
def test_an_unpacked_package_is_the_same(contents, tmp_path, inner):
    files, pictures, labels = contents
    (tmp_path / inner).mkdir(exist_ok=True)
    for name, data in files.items():
        (tmp_path / inner / name).write_bytes(data)
    splits = read_package(tmp_path)
    for split, images in pictures.items():
        np.testing.assert_array_equal(splits[split]._images, images)
        assert splits[split]._labels == labels[split]


def short(labels: list[int]) -> bytes:
    return json.dumps(labels[:-1]).encode()


BROKEN = {
    "a file is missing": ("test_batch.png", None, "lacks test_batch.png"),
    "pictures are missing": ("test_batch.png", png(np.zeros((3, 1024, 3), np.uint8)), "not CIFAR"),
    "grey pictures": ("test_batch.png", png(np.zeros((ROWS, 1024), np.uint8)), "not CIFAR-10's"),
    "not a picture": ("data_batch_3.png", b"PNG", "data_batch_3.png is damaged"),
    "not JSON": ("test_lables.json", b"[1, 2", "test_lables.json is damaged"),
    "deep JSON": ("test_lables.json", b"[" * 100_000, "test_lables.json is damaged"),
    "no list": ("test_lables.json", b"{}", "isn't a list of whole numbers"),
    "no numbers": ("test_lables.json", b'["a"]', "isn't a list of whole numbers"),
    "too few labels": ("test_lables.json", b"[0, 1]", "2 labels, 0 to 1 of a class"),
    "one class": ("test_lables.json", json.dumps([3] * ROWS).encode(), "0 to 20 of a class"),
    "an eleventh class": (
        "test_lables.json",
        json.dumps([i % 11 for i in range(ROWS)]).encode(),
        "of a class",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_damaged_package_is_a_sentence(contents, tmp_path, what):
    name, data, said = BROKEN[what]
    files = {k: v for k, v in contents[0].items() if k != name}
    if data is not None:
        files[name] = data
    with pytest.raises(UserError, match="npm pack") as error:
        build_cifar10(packed(tmp_path / "cifar.tgz", files), tmp_path / "out")
    assert said in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["cifar.tgz"]


@settings(max_examples=25)
@given(st.data())
def test_a_package_cut_short_or_changed_is_a_sentence_or_whole(contents, tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("cut")
    path = packed(folder / "cifar.tgz", contents[0])
    whole = path.read_bytes()
    at = data.draw(st.integers(0, len(whole) - 1))
    cut = data.draw(st.booleans())
    path.write_bytes(whole[:at] if cut else whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :])
    try:
        read_package(path)
    except UserError as error:
        assert "\n" not in str(error)


def test_another_data_set_of_two_splits_is_not_taken_for_it(contents, tmp_path):
    """Nor one that lost a file: only all the records that would be written are reused."""
    out, package = tmp_path / "imagenet", packed(tmp_path / "cifar.tgz", contents[0])
    for split in ("train", "test"):
        (out / split).mkdir(parents=True)
    (out / "train" / "train-00000-of-00313.array_record").touch()
    with pytest.raises(UserError, match="imagenet already exists and isn't CIFAR-10"):
        build_cifar10(package, out)
    whole = build_cifar10(package, tmp_path / "whole")
    assert set(cifar10._written(whole)) == set(whole.rglob("*.array_record"))
    cifar10._written(whole)[-1].unlink()
    with pytest.raises(UserError, match="whole already exists and isn't CIFAR-10"):
        build_cifar10(package, whole)


def test_what_else_is_a_sentence(contents, tmp_path):
    with pytest.raises(UserError, match=r"There is no '.*none\.tgz'"):
        build_cifar10(tmp_path / "none.tgz", tmp_path / "out")
    (tmp_path / "taken").mkdir()
    with pytest.raises(UserError, match="already exists"):
        build_cifar10(packed(tmp_path / "cifar.tgz", contents[0]), tmp_path / "taken")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="Cannot write"):
        build_cifar10(tmp_path / "cifar.tgz", tmp_path / "file" / "out")
