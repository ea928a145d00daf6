"""Pictures at the file edge keep their pixels, their texts and their shape."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cascade import images
from cascade.errors import UserError


def test_uint8_survives_the_trip_through_floats():
    every = np.arange(256, dtype=np.uint8)
    x = images.to_float(every)
    assert x[0] == -1.0 and x[255] == 1.0
    np.testing.assert_array_equal(images.to_uint8(x), every)


@given(st.floats(-3, 3, width=32))
def test_floats_are_rounded_to_the_nearest_level_and_clipped(x):
    back = images.to_float(images.to_uint8(np.float32([x])))
    assert abs(back[0] - np.clip(x, -1, 1)) <= 1 / 255 + 1e-6


@settings(deadline=None, max_examples=50)
@given(text=st.text(max_size=300), key=st.text("abcdef", min_size=1, max_size=20))
def test_png_keeps_pixels_and_any_text(tmp_path_factory, text, key):
    path = tmp_path_factory.mktemp("png") / "a.png"
    picture = np.random.default_rng(0).integers(0, 256, (3, 5, 3), np.uint8)
    images.save_png(path, picture, {key: text, "seed": "7"})
    np.testing.assert_array_equal(images.read_image(path), picture)
    assert images.read_metadata(path) == {"seed": "7", key: text}
    assert [p.name for p in path.parent.iterdir()] == ["a.png"]


def test_png_refuses_half_a_character(tmp_path):
    with pytest.raises(UserError, match="Unicode"):
        images.save_png(tmp_path / "a.png", np.zeros((2, 2, 3), np.uint8), {"prompt": "\ud800"})


def test_a_failed_write_leaves_the_old_picture(tmp_path, monkeypatch):
    path = images.save_png(tmp_path / "a.png", np.full((2, 2, 3), 9, np.uint8))

    def full_disk(self, file, *_, **__):
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full_disk)
    with pytest.raises(UserError, match="No space left"):
        images.save_png(path, np.zeros((2, 2, 3), np.uint8))
    assert images.read_image(path)[0, 0, 0] == 9
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_writable_folder_makes_the_folder_and_leaves_nothing_in_it(tmp_path):
    folder = images.writable_folder(tmp_path / "a" / "b")
    assert folder.is_dir() and not list(folder.iterdir())


def test_writable_folder_says_what_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file"):
        images.writable_folder(tmp_path / "file" / "folder")


def test_a_path_that_is_a_file_or_holds_a_nul(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file, not a folder"):
        images.writable_folder(tmp_path / "file")
    for read_or_write in (images.writable_folder, images.read_image):
        with pytest.raises(UserError, match="null"):
            read_or_write("a\0b")


@pytest.mark.parametrize("name", ["", "folder.png", "a.jpg", "a"])
def test_what_is_no_png_file_to_write(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(UserError, match="PNG"):
        images.check_png(name)
    assert images.check_png("new/a.PNG") and not (tmp_path / "new").exists()


@pytest.mark.parametrize("content", [b"", b"not a picture", b"\x89PNG\r\n\x1a\n"])
def test_reading_what_is_no_picture(tmp_path, content):
    path = tmp_path / "x.png"
    path.write_bytes(content)
    for read in (images.read_image, images.read_metadata):
        with pytest.raises(UserError, match=r"x\.png"):
            read(path)
        with pytest.raises(UserError, match=r"gone\.png"):
            read(tmp_path / "gone.png")


@pytest.mark.parametrize("captions", [None, ["one", "a " * 200, "", "日本 🍎", "x" * 300]])
def test_contact_sheet_shows_each_picture_pixel_for_pixel(captions):
    rng = np.random.default_rng(1)
    pictures = [rng.integers(0, 256, (16, 16, 3), np.uint8) for _ in range(5)]
    sheet = images.contact_sheet(pictures, captions, columns=2, cell=32, margin=4)
    height = (sheet.shape[0] - 4) // 3
    for i, picture in enumerate(pictures):
        top, left = 4 + (i // 2) * height, 4 + (i % 2) * 36
        doubled = picture.repeat(2, 0).repeat(2, 1)
        np.testing.assert_array_equal(sheet[top : top + 32, left : left + 32], doubled)


def test_contact_sheet_fits_a_large_oblong_picture():
    sheet = images.contact_sheet([np.zeros((50, 400, 3), np.uint8)], cell=40, margin=5)
    assert sheet.shape == (50, 50, 3)
    dark = (sheet < 128).all(-1)
    assert dark.any(axis=0).sum() == 40 and dark.any(axis=1).sum() == 5


def test_contact_sheet_needs_a_caption_for_each_picture():
    with pytest.raises(UserError, match="2 captions"):
        images.contact_sheet([np.zeros((4, 4, 3), np.uint8)], ["a", "b"])
    with pytest.raises(UserError, match="at least one"):
        images.contact_sheet([])


def test_lowres_of_the_right_size_is_left_alone():
    pictures = np.random.default_rng(2).integers(0, 256, (3, 8, 12, 3), np.uint8)
    lowres, size = images.as_lowres(pictures, 8, 32, divisor=8)
    np.testing.assert_array_equal(lowres, pictures)
    assert size == (32, 48)


def test_lowres_is_the_mean_of_what_it_covers():
    checks = (np.indices((32, 32)).sum(0) % 2 * 255).astype(np.uint8)
    lowres, size = images.as_lowres(np.repeat(checks[..., None], 3, 2), 8, 16, divisor=4)
    assert size == (16, 16) and np.isin(lowres, (127, 128)).all()


@settings(deadline=None)
@given(
    height=st.integers(1, 60),
    width=st.integers(1, 60),
    divisor=st.sampled_from([1, 2, 4, 8]),
    factor=st.sampled_from([2, 4]),
)
def test_drawn_size_suits_the_network_and_keeps_the_shape(height, width, divisor, factor):
    picture = np.full((height, width, 3), 77, np.uint8)
    if max(height, width) > images.MAX_ASPECT * min(height, width):
        with pytest.raises(UserError, match="as long as"):
            images.as_lowres(picture, 8, 8 * factor, divisor)
        return
    lowres, size = images.as_lowres(picture, 8, 8 * factor, divisor)
    assert min(size) == 8 * factor and all(side % divisor == 0 for side in size)
    assert lowres.shape == (1, size[0] // factor, size[1] // factor, 3)
    assert (lowres == 77).all()
    unit = max(divisor, factor)
    assert abs(max(size) - 8 * factor * max(height, width) / min(height, width)) <= unit / 2


def test_pictures_come_as_arrays_floats_and_pil():
    array = np.random.default_rng(3).integers(0, 256, (8, 8, 3), np.uint8)
    clear = Image.fromarray(np.zeros((8, 8, 4), np.uint8))
    for same in (array, array[None], [array], images.to_float(array), Image.fromarray(array)):
        np.testing.assert_array_equal(images.as_lowres(same, 8, 16, 4)[0][0], array)
    assert (images.as_lowres(clear, 8, 16, 4)[0] == 255).all()


@pytest.mark.parametrize(
    "bad",
    [
        [],
        np.zeros((8, 8), np.uint8),
        np.zeros((8, 8, 4), np.uint8),
        np.zeros((0, 8, 3), np.uint8),
        np.zeros((8, 8, 3), np.int64),
        np.full((8, 8, 3), 1.5),
        np.full((8, 8, 3), np.nan),
        [np.zeros((8, 8, 3), np.uint8), np.zeros((8, 16, 3), np.uint8)],
    ],
)
def test_what_is_no_picture_to_enlarge(bad):
    with pytest.raises(UserError):
        images.as_lowres(bad, 8, 16, 4)
