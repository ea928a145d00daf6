"""Aspect buckets: which one, what is cut, and that crops and their lowres go together."""

import io
import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image
from tiny_loader import data_section

from cascade.data.buckets import Bucketed
from cascade.data.loader import make_loader
from cascade.data.preprocess import Filtered, PairCrop
from cascade.errors import UserError

SIZES = ((32, 32), (24, 40), (40, 24))
WHITE = (255, 255, 255)
PAIR = PairCrop(32, 8, 16)
ROUNDING = 1e-3  # of float32 sums over values up to 255
BUCKETED = Bucketed(SIZES, WHITE, 0, 100.0)


@given(height=st.integers(1, 3000), width=st.integers(1, 3000))
def test_the_nearest_bucket_wastes_the_least(height, width):
    """Of a picture cut to the shape a, min(r / a, a / r) remains, r its own shape."""
    own = height / width

    def remains(size):
        return min(own * size[1] / size[0], size[0] / size[1] / own)

    best = max(map(remains, SIZES))
    assert math.isclose(remains(BUCKETED.nearest(height, width)), best)


@given(height=st.integers(8, 120), width=st.integers(8, 120), turned=st.booleans())
def test_a_turned_picture_goes_to_the_turned_bucket(height, width, turned):
    size = BUCKETED.nearest(height, width)
    boundary = math.sqrt(40 / 24)
    assume(not math.isclose(max(height / width, width / height), boundary, rel_tol=1e-6))
    assert BUCKETED.nearest(width, height) == size[::-1]
    picture = np.zeros((height, width, 3), np.uint8)
    rng = np.random.default_rng(0) if turned else None
    assert BUCKETED(picture, rng).shape == (*size, 3)


def test_a_picture_of_a_buckets_shape_is_only_resized():
    ramp = np.arange(80, dtype=np.uint8)[None, :, None] * np.ones((48, 1, 3), np.uint8)
    result = BUCKETED(ramp)  # 48 x 80, twice the bucket 24 x 40: means of 2i and 2i + 1, halves up
    np.testing.assert_array_equal(result[0, :, 0], np.arange(1, 81, 2))


def test_the_filter_sees_the_original():
    with pytest.raises(Filtered, match="80x20 is longer than 3:1"):
        BUCKETED._replace(max_aspect=3.0)(np.zeros((20, 80, 3), np.uint8))


def test_large_jpegs_keep_enough_pixels_for_the_bucket():
    coarse = np.random.default_rng(0).integers(0, 256, (5, 8, 3), np.uint8)
    picture = Image.fromarray(coarse).resize((640, 400), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=95)
    file, pixels = BUCKETED(buffer.getvalue()), BUCKETED(np.asarray(picture))
    assert file.shape == (24, 40, 3)
    assert np.abs(file.astype(int) - pixels).mean() < 1  # level of 255


@pytest.mark.parametrize("sizes", [((32, 8),), ((30, 32),), ((32, 32), 40), ((32.0, 32),), ("ab",)])
def test_bad_buckets_are_named(sizes):
    with pytest.raises(UserError, match=r"bucket .* must be"):
        BUCKETED._replace(sizes=sizes).check(PAIR)


def section(folder, **changes):
    source = {"name": "folder", "path": str(folder)}
    return data_section(source, **{"buckets": SIZES, "max_broken_rate": 0.0, **changes})


def loader(data, **changes):
    sizes = dict(resolution=32, lowres_resolution=8, crop_resolution=16, batch_size=4, train=True)
    return make_loader(data, texts=lambda captions: {}, seed=0, **{**sizes, **changes})


@pytest.fixture
def pictures(tmp_path):
    """One picture for each bucket, of its size, whose pixels tell their row and column."""
    for i, (height, width) in enumerate(SIZES):
        rows, columns = np.mgrid[:height, :width]
        pixels = np.stack([rows, columns, np.full_like(rows, i)], axis=-1)
        Image.fromarray((pixels * 5).astype(np.uint8)).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text("a ramp")
    return tmp_path


def test_crops_reach_all_over_every_bucket_and_lowres_goes_with_them(pictures):
    stream, seen = loader(section(pictures)), [set() for _ in SIZES]
    for _ in range(150):
        batch = next(stream)
        assert batch["image"].shape == (4, 16, 16, 3) and batch["lowres"].shape == (4, 4, 4, 3)
        for image, low in zip(batch["image"], batch["lowres"], strict=True):
            blocks = image.reshape(4, 4, 4, 4, 3).mean((1, 3))
            np.testing.assert_allclose(low, blocks, atol=ROUNDING / 127.5)
            row, column, bucket = np.round((image[0, 0] + 1) * 127.5 / 5).astype(int)
            seen[bucket].add((int(row), int(column)))
    for places, (height, width) in zip(seen, SIZES, strict=True):
        rows, columns = range(0, height - 15, 4), range(0, width - 15, 4)
        assert places == {(row, column) for row in rows for column in columns}


def test_crops_of_buckets_are_mirrored_whole(pictures):
    plain, mirrored = (loader(section(pictures, mirror=p)) for p in (0.0, 1.0))
    for _ in range(10):
        before, after = next(plain), next(mirrored)
        for name in ("image", "lowres"):
            np.testing.assert_array_equal(after[name], before[name][:, :, ::-1])


def test_evaluation_takes_the_centres(pictures):
    (batch,) = loader(section(pictures), train=False)
    corners = np.round((batch["image"][:3, 0, 0, :2] + 1) * 127.5 / 5).astype(int)
    assert corners.tolist() == [[8, 8], [4, 12], [12, 4]]


def test_what_contradicts_buckets(pictures):
    with pytest.raises(UserError, match="crop_resolution"):
        loader(section(pictures), crop_resolution=0)
    with pytest.raises(UserError, match="cache_decoded can't keep pictures in buckets"):
        loader(section(pictures, cache_decoded=True))
