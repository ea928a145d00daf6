"""Duplicates, refined records and Parquet tables, without Beam."""

import io
import itertools

import numpy as np
import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pyarrow import parquet

from cascade.data.duplicates import Look, bands, later_duplicates, look
from cascade.data.preprocess import BrokenPicture
from cascade.data.refine import encode, reason_of
from cascade.data.sources import captions_of, read_record
from cascade.data.sources import parquet as parquet_source
from cascade.errors import UserError

HASHES = st.integers(0, 2**64 - 1)


def blotches(seed: int, size=(96, 64)) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(0, 256, (8, 12, 3), np.uint8)
    return np.asarray(Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC))


def differ(one: Look, two: Look) -> int:
    return (one.bits ^ two.bits).bit_count()


@given(bits=HASHES, most=st.integers(0, 7), data=st.data())
def test_near_hashes_share_a_band(bits, most, data):
    flipped = data.draw(st.sets(st.integers(0, 63), max_size=most))
    other = bits ^ sum(1 << place for place in flipped)
    assert set(bands(bits, most)) & set(bands(other, most))
    assert sum(value.bit_length() for _, value in bands(2**64 - 1, most)) == 64


@given(looks=st.lists(st.tuples(st.integers(0, 7), st.integers(0, 3)), max_size=12))
def test_later_duplicates_are_those_near_an_earlier_one(looks):
    """Against the definition, pair by pair; thumbs of few distinct greys, hashes of few bits."""
    thumbs = [bytes([60 * grey] * 48) for grey in range(4)]
    numbered = [(10 * i, Look(bits, thumbs[grey])) for i, (bits, grey) in enumerate(looks)]
    expected = {
        j
        for (_, one), (j, two) in itertools.combinations(numbered, 2)
        if differ(one, two) <= 1 and one.thumb == two.thumb
    }
    assert later_duplicates(numbered[::-1], most=1) == sorted(expected)


def test_the_same_picture_smaller_and_coarser_is_a_duplicate():
    for seed in range(8):
        original = blotches(seed)
        coarse = Image.open(io.BytesIO(encode(blotches(seed, (60, 40)), "jpeg", 60)))
        pair = [(0, look(original)), (1, look(np.asarray(coarse)))]
        assert later_duplicates(pair, most=3) == [1]


def test_other_pictures_and_other_colours_are_none():
    looks = [(i, look(blotches(i))) for i in range(40)]
    assert later_duplicates(looks, most=7) == []
    red, green = (np.zeros((16, 16, 3), np.uint8) for _ in range(2))
    red[4:12, 4:12, 0] = 200
    green[4:12, 4:12, 1] = 102  # as dark a grey
    assert later_duplicates([(0, look(red)), (1, look(green))], most=7) == []


def test_reasons_forget_what_differs():
    one = BrokenPicture("/data/0.tar holds no picture of it")
    two = BrokenPicture("/data/b c/17.tar holds no picture of it")
    assert reason_of(one) == "its file holds no picture of it"
    assert "17" not in reason_of(two)
    assert reason_of(BrokenPicture("cut at 12.5 of 30")) == "cut at # of #"


@pytest.fixture
def table(tmp_path):
    """Two tables of three pictures, texts in one and lists of texts in the other."""
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.png").write_bytes(encode(blotches(1), "png", 0))
    kinds = [
        {"path": ["a.png", "b.png"], "text": [" of a ", "of b"], "number": [1, 2]},
        {
            "path": ["c.png", "gone.png", "../x.png", None],
            "text": [["of c", "", "c"], [], ["x"], []],
        },
    ]
    for i, columns in enumerate(kinds):
        parquet.write_table(pyarrow.table(columns), tmp_path / f"{i}.parquet")
    return tmp_path


def test_tables_of_texts_and_of_lists(table):
    source = parquet_source(str(table / "*.parquet"), str(table), "path", "text")
    assert [source.key(i) for i in range(5)] == ["a.png", "b.png", "c.png", "gone.png", "../x.png"]
    assert source[0] == {
        "image": (table / "a.png").read_bytes(),
        "captions": ["of a"],
        "key": "a.png",
    }
    assert source[2]["captions"] == ["of c", "c"]
    for i, why in ((3, "No such file"), (4, "out of the root"), (5, "names no file")):
        with pytest.raises(BrokenPicture, match=why):
            read_record(source, i)
    assert list(captions_of(source)) == ["of a", "of b", "of c", "c", "x"]


@pytest.mark.parametrize(
    ("columns", "what"),
    [
        (("file", "text"), "no column 'file'.*path, text, number"),
        (("path", "number"), "holds int64; the captions must be texts"),
        (("number", "text"), "holds int64; the paths must be texts"),
    ],
)
def test_table_refusals(table, columns, what):
    with pytest.raises(UserError, match=what):
        parquet_source(str(table / "0.parquet"), str(table), *columns)
    (table / "0.parquet").write_bytes((table / "0.parquet").read_bytes()[:-20])
    with pytest.raises(UserError, match=r"Cannot read .*0\.parquet as a Parquet file"):
        parquet_source(str(table / "0.parquet"), str(table), "path", "text")
    with pytest.raises(UserError, match="No file matches"):
        parquet_source(str(table / "none*"), str(table), "path", "text")
