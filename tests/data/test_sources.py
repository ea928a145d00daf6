"""Sources: folders and their metadata, ArrayRecord and TFDS, and what they refuse."""

import csv
import inspect
import io
import json
import os
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from cascade.data.folder import read_metadata
from cascade.data.prepare import build_emoji, write_records
from cascade.data.preprocess import BrokenPicture
from cascade.data.sources import (
    PLACES,
    SOURCES,
    array_record,
    captions_of,
    folder,
    read_record,
    synthetic,
    tfds,
)
from cascade.errors import UserError
from cascade.registry import build


def picture(colour: str = "red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(buffer, "png")
    return buffer.getvalue()


@pytest.fixture
def pictures(tmp_path):
    """A folder with a.png, deep/b.png and texts beside them."""
    (tmp_path / "deep").mkdir()
    for name, colour in (("a", "red"), ("deep/b", "blue")):
        (tmp_path / f"{name}.png").write_bytes(picture(colour))
        (tmp_path / f"{name}.txt").write_text(f"the {colour} one\n\nall of {colour}\n")
    return tmp_path


def test_texts_beside(pictures):
    source = folder(str(pictures))
    assert [source[i]["key"] for i in range(len(source))] == ["a.png", "deep/b.png"]
    assert source[1]["captions"] == source.captions(1) == ["the blue one", "all of blue"]
    assert source[0]["image"] == picture("red")
    assert len(list(captions_of(source))) == 4


def test_metadata_jsonl_and_csv_say_the_same(pictures):
    for text in pictures.rglob("*.txt"):
        text.unlink()
    rows = [("a.png", "one"), ("deep/b.png", 'two, "quoted"\nand long'), ("a.png", "eins")]
    (pictures / "metadata.jsonl").write_text(
        "\n".join(json.dumps({"file_name": n, "caption": c}) for n, c in rows) + "\n\n"
    )
    jsonl = folder(str(pictures))
    (pictures / "metadata.jsonl").unlink()
    with open(pictures / "metadata.csv", "w", newline="") as file:
        csv.writer(file).writerows([("file_name", "caption"), *rows])
    table = folder(str(pictures))
    assert [jsonl[i] for i in range(2)] == [table[i] for i in range(2)]
    assert table.captions(0) == ["one", "eins"]


NAMES = st.text("abcxyz é0_-", min_size=1, max_size=8).map(str.strip).filter(bool)
TEXTS = st.text(
    st.characters(blacklist_categories=("Cs", "Cc"), blacklist_characters="\u2028\u2029"),
    min_size=1,
).filter(lambda t: t.strip())


@given(told=st.dictionaries(NAMES, st.lists(TEXTS, min_size=1, max_size=3), max_size=4))
def test_metadata_round_trip(tmp_path_factory, told):
    place = tmp_path_factory.mktemp("metadata")
    expected = {name: [t.strip() for t in texts] for name, texts in told.items()}
    (place / "metadata.jsonl").write_text(
        "\n".join(json.dumps({"file": n, "captions": t}) for n, t in told.items()), "utf-8"
    )
    assert read_metadata(place / "metadata.jsonl") == expected
    with open(place / "metadata.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("file_name", "text"))
        writer.writerows((n, t) for n, texts in told.items() for t in texts)
    assert read_metadata(place / "metadata.csv") == expected


@given(data=st.binary(max_size=80))
@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_any_metadata_is_read_or_refused_in_a_sentence(tmp_path_factory, name, data):
    path = tmp_path_factory.mktemp("any") / name
    path.write_bytes(data)
    try:
        told = read_metadata(path)
    except UserError as error:
        assert name in str(error)
    else:
        assert all(name and captions for name, captions in told.items())


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("{", "line 2.*not JSON"),
        ("[1]", "line 2.*not an object"),
        ('{"caption": "x"}', "line 2.*none of the keys file_name"),
        ('{"file_name": "a.png"}', "line 2.*none of the keys captions"),
        ('{"file_name": 3, "caption": "x"}', "line 2.*name is 3"),
        ('{"file_name": "a.png", "caption": ""}', "line 2.*caption is"),
        ('{"file_name": "a.png", "captions": []}', "line 2.*caption is"),
        ('{"file_name": "a.png", "captions": ["x", 4]}', "line 2.*caption is"),
        ('{"file_name": "../a.png", "caption": "x"}', "line 2.*out of the folder"),
    ],
)
def test_a_bad_metadata_line_is_named(tmp_path, line, what):
    path = tmp_path / "metadata.jsonl"
    path.write_text('{"file_name": "a.png", "caption": "fine"}\n' + line)
    with pytest.raises(UserError, match=what):
        read_metadata(path)


def test_half_a_character_breaks_its_record_alone(pictures):
    (pictures / "metadata.jsonl").write_text(
        '{"file_name": "a.png", "captions": ["fine", "half \\ud800"]}\n'
        '{"file_name": "deep/b.png", "caption": "a whole \\ud83d\\ude00"}\n'
    )
    source = folder(str(pictures))
    assert list(captions_of(source)) == ["a whole 😀"]
    assert read_record(source, 1)["captions"] == ["a whole 😀"]
    with pytest.raises(BrokenPicture, match=r"'half \\ud800' holds a lone surrogate"):
        read_record(source, 0)


def test_a_file_name_that_is_no_utf8(tmp_path):
    try:
        os.mkdir(os.fsencode(tmp_path) + b"/\xff")
    except OSError:
        pytest.skip("this file system takes UTF-8 names alone")
    (tmp_path / os.fsdecode(b"\xff") / "a.png").write_bytes(picture())
    (tmp_path / os.fsdecode(b"\xff") / "a.txt").write_text("a caption")
    assert list(captions_of(folder(str(tmp_path)))) == ["a caption"]


def test_a_short_csv_row_is_named(tmp_path):
    (tmp_path / "metadata.csv").write_text("file_name,caption\na.png,x\nb.png\n")
    with pytest.raises(UserError, match="line 3"):
        read_metadata(tmp_path / "metadata.csv")


def test_folder_refusals(pictures, tmp_path_factory):
    with pytest.raises(UserError, match="no folder"):
        folder(str(pictures / "missing"))
    with pytest.raises(UserError, match="holds no picture"):
        folder(str(tmp_path_factory.mktemp("empty")))
    (pictures / "c.txt").write_text("lonely")
    with pytest.raises(UserError, match=r"no picture.*'c'"):
        folder(str(pictures))
    (pictures / "c.txt").unlink()
    (pictures / "a.txt").write_text("\n")
    with pytest.raises(UserError, match=r"no caption.*'a.png'"):
        folder(str(pictures))
    (pictures / "a.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(UserError, match=r"a\.txt"):
        folder(str(pictures))
    (pictures / "metadata.jsonl").write_text('{"file_name": "gone.png", "caption": "x"}')
    with pytest.raises(UserError, match="2 of 2 pictures"):
        folder(str(pictures))
    (pictures / "metadata.csv").write_text("file_name,caption\n")
    with pytest.raises(UserError, match="keep one"):
        folder(str(pictures))


def test_pictures_of_one_stem_share_its_text(pictures):
    (pictures / "a.gif").write_bytes(picture())
    source = folder(str(pictures))
    assert source.key(0) == "a.gif" and source.captions(0) == source.captions(1)


def test_a_folder_named_like_a_picture_is_none(pictures):
    (pictures / "dir.png").mkdir()
    assert len(folder(str(pictures))) == 2


def test_what_cannot_be_read_is_named(pictures):
    (pictures / "gone.png").symlink_to(pictures / "nowhere.png")
    (pictures / "gone.txt").write_text("nothing")
    with pytest.raises(UserError, match=r"Cannot read '.*gone\.png' \(No such file"):
        folder(str(pictures))
    (pictures / "metadata.jsonl").mkdir()
    with pytest.raises(UserError, match=r"Cannot read .*metadata\.jsonl"):
        folder(str(pictures))


def test_array_records_written_and_read(pictures, tmp_path):
    original = folder(str(pictures))
    write_records(original, tmp_path / "out", shard_size=1)
    assert len(list((tmp_path / "out").iterdir())) == 2
    source = array_record(str(tmp_path / "out" / "*.array_record"), "image", "captions")
    assert [source[i] for i in range(2)] == [original[i] for i in range(2)]
    assert source.captions(1) == original.captions(1)


def test_array_record_refusals(tmp_path):
    with pytest.raises(UserError, match="No file matches"):
        array_record(str(tmp_path / "*.array_record"), "image", "captions")
    (tmp_path / "x.array_record").write_bytes(b"not one")
    with pytest.raises(UserError, match="ArrayRecord"):
        array_record(str(tmp_path / "*.array_record"), "image", "captions")


def test_array_record_without_the_feature(pictures, tmp_path):
    write_records(folder(str(pictures)), tmp_path / "out")
    with pytest.raises(UserError, match=r"'jpeg'.*captions, image, key"):
        array_record(str(tmp_path / "out" / "*"), "jpeg", "captions")


def test_tfds_refusals(tmp_path):
    build_emoji(tmp_path, "demo", resolution=16)
    good = dict(
        dataset="emoji/demo",
        data_dir=str(tmp_path),
        split="train",
        image_key="image",
        caption_key="captions",
        template="a {}",
    )
    assert tfds(**good).captions(0)[0].startswith("a ")
    for key, value, what in (
        ("dataset", "emojis", "no data set 'emojis'"),
        ("data_dir", str(tmp_path / "no"), "no data set"),
        ("dataset", "emoji/small", "build emoji --variant small --out"),
        ("split", "test", "no split 'test'.*heldout, train"),
        ("image_key", "picture", "no picture feature 'picture'; choose from image"),
        ("image_key", "captions", r"no picture feature 'captions'; that is Text\(.*from image"),
        ("caption_key", "text", "no text feature 'text'; choose from captions, key, kind, scene"),
        ("caption_key", "image", r"no text feature 'image'; that is Image\(.*from captions"),
        ("caption_key", "captions/en", "no text feature 'captions/en'"),
        ("template", "{x}", "template"),
    ):
        with pytest.raises(UserError, match=what):
            tfds(**{**good, key: value})


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """A TFDS data set "told" of three records with every kind of text and some that are none."""
    import tensorflow_datasets as library

    kinds = library.features

    class Told(library.core.GeneratorBasedBuilder):
        VERSION = library.core.Version("1.0.0")

        def _info(self):
            features = {
                "image": kinds.Image(shape=(8, 8, 3)),
                "label": kinds.ClassLabel(names=["cat", "dog"]),
                "tags": kinds.Sequence(kinds.ClassLabel(names=["big", "small"])),
                "captions": kinds.Sequence({"id": np.int64, "text": kinds.Text()}),
                "title": {"en": kinds.Text(), "length": np.int32},
                "score": np.float32,
            }
            return library.core.DatasetInfo(builder=self, features=kinds.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i in range(3):
                yield (
                    i,
                    {
                        "image": io.BytesIO(picture()),
                        "label": i % 2,
                        "tags": ["small", "big"][: i + 1],
                        "captions": [{"id": n, "text": f"{i} told {n}"} for n in range(i)],
                        "title": {"en": f"title é {i}", "length": 9},
                        "score": 0.5,
                    },
                )

    folder = tmp_path_factory.mktemp("told")
    Told(data_dir=folder, file_format="array_record").download_and_prepare()
    return str(folder)


@pytest.mark.parametrize(
    ("caption_key", "captions"),
    [
        ("label", ["a cat", "a cat", "a dog"]),
        ("tags", ["a big", "a big", "a small", "a small", "a small"]),
        ("captions/text", ["a 1 told 0", "a 2 told 0", "a 2 told 1"]),
        ("title/en", ["a title é 0", "a title é 1", "a title é 2"]),
    ],
)
def test_tfds_texts_and_labels_become_captions(told, caption_key, captions):
    source = tfds("told", told, "train", "image", caption_key, "a {}")
    assert sorted(captions_of(source)) == captions
    assert [source[i]["captions"] for i in range(3)] == [source.captions(i) for i in range(3)]


@pytest.mark.parametrize("key", ["captions", "captions/id", "title", "title/length", "score"])
def test_tfds_captions_that_are_no_text_are_refused(told, key):
    texts = "choose from captions/text, label, tags, title/en"
    with pytest.raises(UserError, match=f"no text feature '{key}'.*{texts}"):
        tfds("told", told, "train", "image", key, "{}")


def test_synthetic_is_deterministic():
    one, two = (synthetic(records=5, side=8, captions=2, seed=3) for _ in range(2))
    assert len(one) == 5 and one[4]["image"].shape == (8, 8, 3)
    np.testing.assert_array_equal(one[4]["image"], two[4]["image"])
    assert one.captions(0) == one.captions(2) != one.captions(1)


def test_sources_are_picklable_and_fingerprints_follow_the_content(pictures):
    source = folder(str(pictures))
    copy = pickle.loads(pickle.dumps(source))
    assert copy[1] == source[1] and copy.fingerprint == source.fingerprint
    (pictures / "a.png").write_bytes(picture("green") + b" ")
    assert folder(str(pictures)).fingerprint != source.fingerprint


def test_places_are_arguments_of_sources():
    """Each is one's, and each source that reads files has one."""
    taken = {name: set(inspect.signature(make).parameters) for name, make in SOURCES.items()}
    assert set(PLACES) <= set().union(*taken.values())
    assert {name for name in taken if not taken[name] & set(PLACES)} == {"mixture", "synthetic"}


def test_an_unknown_source_is_named():
    with pytest.raises(UserError, match=r"Unknown data source name 'folders'.*'folder'"):
        build("data source", SOURCES, {"name": "folders", "path": "x"})
