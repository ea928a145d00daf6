"""WebDataset tars: what they hold, their index, and damage."""

import io
import json
import pickle
import tarfile

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from cascade.data import tars
from cascade.data.preprocess import BrokenPicture
from cascade.data.sources import captions_of, read_record, webdataset
from cascade.errors import UserError


def picture(colour: str = "red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(buffer, "png")
    return buffer.getvalue()


def write_tar(path, files: dict[str, bytes], mode: str = "w"):
    with tarfile.open(path, mode) as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def of_texts(path) -> "tars.Tars":
    return webdataset(str(path), "txt", "")


@pytest.fixture
def shards(tmp_path):
    """Two tars of three and two records, with texts in both spellings."""
    for number, keys in ((0, ("a", "deep.er/b", "c")), (1, ("a", "d"))):
        files = {}
        for key in keys:
            files[f"{key}.txt"] = f"text of {key} in {number}\n\n second \n".encode()
            files[f"{key}.PNG"] = picture()
            told = {"caption": f"json of {key}", "more": {"texts": [key, "other"]}}
            files[f"{key}.json"] = json.dumps(told).encode()
            files[f"{key}.mask.png"] = b"not the picture"
        write_tar(tmp_path / f"{number}.tar", files)
    return tmp_path


def test_records_of_all_tars_in_order(shards):
    source = of_texts(shards / "*.tar")
    keys = ["0.tar/a", "0.tar/deep.er/b", "0.tar/c", "1.tar/a", "1.tar/d"]
    assert [source.key(i) for i in range(len(source))] == keys
    assert [read_record(source, i)["key"] for i in range(5)] == keys
    assert source[4] == {
        "image": picture(),
        "captions": ["text of d in 1", "second"],
        "key": "1.tar/d",
    }
    assert len(list(captions_of(source))) == 10


@pytest.mark.parametrize(
    ("key", "captions"), [("caption", ["json of c"]), ("more/texts", ["c", "other"])]
)
def test_captions_from_json(shards, key, captions):
    source = webdataset(str(shards / "0.tar"), "json", key)
    assert source.captions(2) == source[2]["captions"] == captions


@pytest.mark.parametrize("key", ["more", "nothing", "caption/inner"])
def test_a_json_key_without_a_text_breaks_the_record(shards, key):
    with pytest.raises(BrokenPicture):
        read_record(webdataset(str(shards / "0.tar"), "json", key), 0)


NAMES = st.text("abé0_- ", min_size=1, max_size=120).filter(lambda name: name.strip())


@given(
    held=st.dictionaries(
        NAMES, st.tuples(st.binary(max_size=1500), st.binary(max_size=30)), max_size=5
    )
)
def test_what_was_packed_is_found(tmp_path_factory, held):
    path = tmp_path_factory.mktemp("any") / "x.tar"
    pictures = {f"{name}.jpg": data for name, (data, _) in held.items()}
    write_tar(path, pictures | {f"{name}.txt": text for name, (_, text) in held.items()})
    index = tars.open_index(path)
    assert [row["key"].decode() for row in index] == list(held)
    for row, files in zip(index, held.values(), strict=True):
        assert (tars._read(path, row, "image"), tars._read(path, row, "txt")) == files


def test_the_index_is_made_once_and_follows_the_tar(shards, monkeypatch):
    first = of_texts(shards / "*.tar")
    assert len(list((shards / ".index").iterdir())) == 2
    with monkeypatch.context() as patch:
        patch.setattr(tars, "_make_index", None)
        again = of_texts(shards / "*.tar")
        assert [again[i] for i in range(5)] == [first[i] for i in range(5)]
        assert pickle.loads(pickle.dumps(first))[3] == first[3]
    write_tar(shards / "1.tar", {"new.png": picture(), "new.txt": b"new"})
    changed = of_texts(shards / "*.tar")
    assert len(changed) == 4 and changed.fingerprint != first.fingerprint


def test_an_index_goes_home_where_the_folder_is_read_only(shards, monkeypatch, tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setattr(tars.Path, "home", lambda: home)
    (shards / ".index").write_text("in the way")
    assert len(of_texts(shards / "*.tar")) == 5
    assert len(list((home / ".cache" / "cascade" / "index").iterdir())) == 2
    (home / ".cache" / "cascade" / "index").rename(home / "gone")
    (home / ".cache" / "cascade" / "index").write_text("in the way")
    with pytest.raises(UserError, match=r"Cannot write the index of .*0\.tar"):
        of_texts(shards / "*.tar")


def test_incomplete_records_are_broken_ones(tmp_path):
    write_tar(tmp_path / "x.tar", {"a.txt": b"a", "b.png": picture(), "c.png": picture()})
    source = of_texts(tmp_path / "x.tar")
    with pytest.raises(BrokenPicture, match=r"x\.tar holds no picture"):
        read_record(source, 0)
    with pytest.raises(BrokenPicture, match=r"x\.tar holds no \.txt"):
        read_record(source, 1)


@pytest.mark.parametrize("kept", [100, 512, 700, 1024, 1536, 2048, -10240])
def test_a_tar_that_is_cut_short_is_named(tmp_path, kept):
    write_tar(tmp_path / "x.tar", {f"{i}.txt": bytes(600) for i in range(5)})
    whole = (tmp_path / "x.tar").read_bytes()
    (tmp_path / "x.tar").write_bytes(whole[:kept])
    with pytest.raises(UserError, match=r"x\.tar"):
        of_texts(tmp_path / "x.tar")
    assert not (tmp_path / ".index").exists()


def test_a_damaged_header_is_named(tmp_path):
    write_tar(tmp_path / "x.tar", {f"{i}.txt": b"text" for i in range(5)})
    with open(tmp_path / "x.tar", "r+b") as file:
        file.seek(2 * 1024 + 10)
        file.write(b"damage")
    with pytest.raises(UserError, match=r"x\.tar .*byte 2048, after 2 records"):
        of_texts(tmp_path / "x.tar")


def test_refusals(tmp_path):
    with pytest.raises(UserError, match="No file matches"):
        of_texts(tmp_path / "*.tar")
    write_tar(tmp_path / "x.tar", {"a.txt": b"a"}, "w:gz")
    with pytest.raises(UserError, match=r"x\.tar as a tar .*uncompressed"):
        of_texts(tmp_path / "x.tar")
    for caption_file, key in (("txt", "caption"), ("json", ""), ("cls", "")):
        with pytest.raises(UserError, match="give 'txt'"):
            webdataset(str(tmp_path / "x.tar"), caption_file, key)
