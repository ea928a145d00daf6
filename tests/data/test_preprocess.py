"""Decoding, area resize, and the pair of crops of super-resolution."""

import io
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from cascade.data import preprocess
from cascade.data.preprocess import (
    BrokenPicture,
    Filtered,
    PairCrop,
    Preprocess,
    area_resize,
    colour,
    decode,
    open_picture,
    resized,
    square_crop,
)
from cascade.errors import UserError

WHITE = (255, 255, 255)
ROUNDING = 1e-3  # of float32 sums over values up to 255
FLOAT32 = 1e-5


def encode(picture: Image.Image, kind: str = "png", **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def box_filter(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    """Area resize down, pixel by pixel: the mean over the box that a new pixel covers."""
    old_height, old_width, channels = picture.shape
    out = np.zeros((height, width, channels))
    for i, j in product(range(height), range(width)):
        total = 0.0
        for y, x in product(range(old_height), range(old_width)):
            top, bottom = i * old_height / height, (i + 1) * old_height / height
            left, right = j * old_width / width, (j + 1) * old_width / width
            share = max(0.0, min(bottom, y + 1) - max(top, y))
            share *= max(0.0, min(right, x + 1) - max(left, x))
            out[i, j] += share * picture[y, x]
            total += share
        out[i, j] /= total
    return out


@settings(max_examples=25, deadline=None)
@given(
    picture=hnp.arrays(np.uint8, st.tuples(st.integers(1, 9), st.integers(1, 9), st.just(2))),
    data=st.data(),
)
def test_resize_down_is_the_box_filter(picture, data):
    height = data.draw(st.integers(1, picture.shape[0]))
    width = data.draw(st.integers(1, picture.shape[1]))
    np.testing.assert_allclose(
        area_resize(picture, height, width), box_filter(picture, height, width), atol=ROUNDING
    )


def shares(size: int, new_size: int) -> np.ndarray:
    """Weights [new_size, size] of the box filter along one axis."""
    edges = np.arange(new_size + 1) * size / new_size
    pixels = np.arange(size)
    upper = np.minimum(edges[1:, None], pixels + 1)
    lower = np.maximum(edges[:-1, None], pixels)
    return np.maximum(upper - lower, 0) * new_size / size


@pytest.mark.parametrize("size", [(301, 203), (256, 256), (64, 1000)])
def test_resize_of_a_large_picture(size):
    picture = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    wanted = np.einsum("ih,hwc,jw->ijc", shares(size[0], 64), picture, shares(size[1], 64))
    np.testing.assert_allclose(area_resize(picture, 64, 64), wanted, atol=ROUNDING)


@given(size=st.integers(1, 300), new_size=st.integers(1, 300))
def test_resize_keeps_one_colour(size, new_size):
    picture = np.full((size, 3, 1), 200, np.uint8)
    np.testing.assert_allclose(area_resize(picture, new_size, 2), 200, rtol=FLOAT32)


def test_resize_up_keeps_a_ramp_straight():
    ramp = np.repeat(np.arange(8, dtype=np.uint8)[None, :, None] * 10, 3, axis=0)
    wide = area_resize(ramp, 3, 32)[1, :, 0]
    # Pixel centres: new pixel k lies at (k + 1/2) / 4 - 1/2 of the old ones.
    expected = np.clip((np.arange(32) + 0.5) / 4 - 0.5, 0, 7) * 10
    np.testing.assert_allclose(wide, expected, atol=ROUNDING)


def test_resize_to_the_same_size_changes_nothing():
    picture = np.random.default_rng(0).integers(0, 256, (7, 5, 3), dtype=np.uint8)
    np.testing.assert_array_equal(area_resize(picture, 7, 5), picture)


RED = np.zeros((4, 6, 3), np.uint8)
RED[...] = (200, 40, 10)


@pytest.mark.parametrize("kind", ["png", "bmp", "webp", "gif", "tiff"])
def test_decode_rgb(kind):
    options = {"lossless": True} if kind == "webp" else {}
    np.testing.assert_array_equal(decode(encode(Image.fromarray(RED), kind, **options), WHITE), RED)


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "CMYK", "YCbCr", "I;16", "I"])
def test_decode_gives_rgb_in_every_mode(mode):
    kind = {"CMYK": "tiff", "YCbCr": "jpeg", "I": "tiff"}.get(mode, "png")
    grey = np.full((4, 6), 128, np.uint8)
    if mode.startswith("I"):
        picture = Image.fromarray(np.full((4, 6), 128 << 8, np.uint16))
        picture = picture.convert("I") if mode == "I" else picture
    else:
        picture = Image.fromarray(grey).convert("RGB")
        picture = picture.quantize(8) if mode == "P" else picture.convert(mode, dither=0)
    pixels = decode(encode(picture, kind), WHITE)
    assert pixels.dtype == np.uint8 and pixels.shape == (4, 6, 3)
    expected = 255 if mode == "1" else 128
    assert np.abs(pixels.astype(int) - expected).max() <= 2


def test_decode_16_bit_grey_keeps_the_high_byte():
    ramp = (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)
    pixels = decode(encode(Image.fromarray(ramp)), WHITE)
    np.testing.assert_array_equal(pixels[..., 0].ravel(), np.arange(256))


def test_decode_cmyk_colours():
    pixels = decode(encode(Image.new("CMYK", (3, 3), (0, 255, 255, 0)), "tiff"), WHITE)
    np.testing.assert_array_equal(pixels[0, 0], (255, 0, 0))


@pytest.mark.parametrize(("alpha", "expected"), [(0, (0, 0, 255)), (255, (200, 40, 10))])
def test_decode_lays_alpha_over_the_ground(alpha, expected):
    rgba = np.dstack([RED, np.full(RED.shape[:2], alpha, np.uint8)])
    np.testing.assert_array_equal(
        decode(encode(Image.fromarray(rgba)), colour("#0000ff"))[0, 0], expected
    )


def test_decode_lays_a_transparent_palette_entry_over_the_ground():
    picture = Image.new("P", (2, 1))
    picture.putpalette([255, 0, 0, 0, 255, 0])
    picture.putpixel((1, 0), 1)
    pixels = decode(encode(picture, transparency=0), (0, 0, 255))
    np.testing.assert_array_equal(pixels[0], [(0, 0, 255), (0, 255, 0)])


def test_decode_takes_the_first_frame():
    frames = [Image.new("RGB", (4, 4), c) for c in ("red", "blue")]
    data = encode(frames[0], "gif", save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(decode(data, WHITE)[0, 0], (255, 0, 0))


@pytest.mark.parametrize(
    ("turn", "undo"),
    [
        (1, lambda a: a),
        (2, np.fliplr),
        (3, lambda a: np.rot90(a, 2)),
        (4, np.flipud),
        (5, lambda a: a.transpose(1, 0, 2)),
        (6, lambda a: np.rot90(a, -1)),
        (7, lambda a: np.rot90(a, 2).transpose(1, 0, 2)),
        (8, np.rot90),
    ],
)
def test_decode_applies_the_exif_turn(turn, undo):
    stored = np.random.default_rng(0).integers(0, 256, (3, 5, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = turn
    data = encode(Image.fromarray(stored), exif=exif)
    np.testing.assert_array_equal(decode(data, WHITE), undo(stored))


@given(st.binary(max_size=200))
def test_decode_of_rubbish_is_a_broken_picture(data):
    with pytest.raises(BrokenPicture):
        decode(data, WHITE)


@given(st.data())
def test_decode_of_a_cut_file_is_a_broken_picture(data):
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    whole = encode(Image.fromarray(noise))
    cut = data.draw(st.integers(0, len(whole) // 2))
    with pytest.raises(BrokenPicture):
        decode(whole[:cut], WHITE)


def test_unknown_colour():
    with pytest.raises(UserError, match="notacolour"):
        colour("notacolour")


def test_square_crop_is_central_or_anywhere():
    wide = np.repeat(np.arange(10)[None, :, None], 4, axis=0)
    np.testing.assert_array_equal(square_crop(wide, None)[0, :, 0], [3, 4, 5, 6])
    rng = np.random.default_rng(0)
    starts = {int(square_crop(wide, rng)[0, 0, 0]) for _ in range(200)}
    assert starts == set(range(7))


def test_filters():
    data = encode(Image.new("RGB", (30, 10)))
    assert Preprocess(8, WHITE, 10, 3.0)(data).shape == (8, 8, 3)
    with pytest.raises(Filtered, match="30x10"):
        Preprocess(8, WHITE, 11, 3.0)(data)
    with pytest.raises(Filtered, match="30x10"):
        Preprocess(8, WHITE, 0, 2.9)(data)


@pytest.mark.parametrize(("whole", "low", "crop"), [(32, 8, 16), (32, 16, 8), (24, 8, 12)])
def test_lowres_crop_shows_the_same_place_at_every_offset(whole, low, crop):
    ramp_x, ramp_y = np.meshgrid(np.arange(whole), np.arange(whole))
    checks = (ramp_x + ramp_y) % 2 * 255
    picture = np.stack([ramp_x * 7, ramp_y * 7, checks], axis=-1).astype(np.uint8)
    pair = PairCrop(whole, low, crop).check()
    factor = whole // low
    lowres_whole = box_filter(picture, low, low)
    for row, column in product(range((whole - crop) // factor + 1), repeat=2):
        cut = pair(picture, (row * factor, column * factor))
        # The ramps tell each pixel's place in the whole picture.
        place = picture[row * factor :, column * factor :][:crop, :crop]
        np.testing.assert_array_equal(cut["image"], place)
        side = crop // factor
        same = lowres_whole[row : row + side, column : column + side]
        np.testing.assert_allclose(cut["lowres"], same, atol=ROUNDING)


def test_offsets_are_every_multiple_of_the_factor_and_central_without_generator():
    pair = PairCrop(32, 8, 16).check()
    rng = np.random.default_rng(0)
    drawn = {pair.offset(rng) for _ in range(1000)}
    assert drawn == set(product(range(0, 17, 4), repeat=2))
    assert pair.offset(None) == (8, 8)
    assert PairCrop(32, 8, 0).offset(rng) == (0, 0)


@pytest.mark.parametrize("sizes", [(32, 12, 0), (32, 8, 10), (32, 8, 64), (32, 0, 33)])
def test_sizes_that_do_not_divide_are_refused(sizes):
    with pytest.raises(UserError):
        PairCrop(*sizes).check()


@given(factor=st.sampled_from([1, 2, 3, 4, 5, 8]), seed=st.integers(0, 99))
def test_resized_is_the_area_mean_rounded_with_halves_up(factor, seed):
    rng = np.random.default_rng(seed)
    picture = rng.integers(0, 256, (6 * factor, 4 * factor, 3), np.uint8)
    sums = picture.reshape(6, factor, 4, factor, 3).sum((1, 3), dtype=np.int64)
    expected = (2 * sums + factor**2) // (2 * factor**2)
    np.testing.assert_array_equal(resized(picture, 6, 4), expected)


def test_rows_in_blocks_are_rows_at_once(monkeypatch):
    picture = np.random.default_rng(0).integers(0, 256, (37, 23, 3), np.uint8)
    whole = area_resize(picture, 11, 30)
    for size in (1, 1000):
        monkeypatch.setattr(preprocess, "BLOCK_BYTES", size)
        np.testing.assert_array_equal(area_resize(picture, 11, 30), whole)


def smooth(width: int, height: int) -> Image.Image:
    coarse = np.random.default_rng(0).integers(0, 256, (6, 6, 3), np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("turn", [1, 6])
def test_a_large_jpeg_is_decoded_smaller_to_the_same_effect(turn):
    exif = Image.Exif()
    exif[0x0112] = turn
    data = encode(smooth(640, 480), "jpeg", quality=95, exif=exif)
    whole, size = open_picture(data, WHITE)
    small, same_size = open_picture(data, WHITE, 2 * 50)
    assert size == same_size == whole.shape[:2] == ((480, 640) if turn == 1 else (640, 480))
    assert min(small.shape[:2]) == 120  # a quarter; an eighth would be less than 100
    one, two = (area_resize(p, *(n // 8 for n in size)) for p in (whole, small))
    assert np.abs(one - two).mean() < 0.5  # levels of 255


def test_the_filter_sees_the_size_of_the_file_not_of_what_was_decoded():
    data = encode(smooth(800, 400), "jpeg")
    assert Preprocess(16, WHITE, 400, 2.0)(data).shape == (16, 16, 3)
    with pytest.raises(Filtered, match="800x400 has a side below 401"):
        Preprocess(16, WHITE, 401, 2.0)(data)
