"""What a loader does to pictures by chance: crops, and turning them left for right."""

import numpy as np
import pytest
from PIL import Image
from tiny_loader import ROUNDING, assert_same, loader, section, shared, spelled, take, together


def test_crops_are_drawn_and_lowres_goes_with_them(tmp_path):
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    Image.fromarray(np.dstack([ramp] * 3)).save(tmp_path / "ramp.png")
    (tmp_path / "ramp.txt").write_text("a ramp")
    stage = dict(resolution=16, lowres_resolution=4, crop_resolution=8)
    starts = set()
    for batch in take(loader(section(tmp_path), **stage), 20):
        pixels = (batch["image"] + 1) * 127.5
        for crop, low in zip(pixels, (batch["lowres"] + 1) * 127.5, strict=True):
            starts.add(round(float(crop[0, 0, 0])))
            blocks = crop.reshape(2, 4, 2, 4, 3).mean((1, 3))
            np.testing.assert_allclose(low, blocks, atol=ROUNDING)
    assert starts == {16 * row + column for row in (0, 4, 8) for column in (0, 4, 8)}


def test_random_crop_of_a_long_picture(tmp_path):
    wide = np.repeat(np.arange(64, dtype=np.uint8)[None], 8, axis=0)
    Image.fromarray(np.dstack([wide] * 3)).save(tmp_path / "wide.png")
    (tmp_path / "wide.txt").write_text("wide")
    batches = take(loader(section(tmp_path, crop="random")), 100)
    starts = {round(float(v)) for b in batches for v in (b["image"][:, 0, 0, 0] + 1) * 127.5}
    assert starts == set(range(57))
    central = next(loader(section(tmp_path)))["image"]
    np.testing.assert_allclose((central[0, 0, :, 0] + 1) * 127.5, np.arange(28, 36), atol=ROUNDING)


def random_pictures(folder, records=8):
    """Pictures of noise, 16 pixels a side, no two rows or columns of which are alike."""
    rng = np.random.default_rng(0)
    for i in range(records):
        noise = rng.integers(256, size=(16, 16, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"{i}\n{i} again")
    return folder


# A base stage's pictures, and a super-resolution stage's crops with their lowres.
WHOLE = dict(resolution=16, batch_size=8)
CROPS = dict(resolution=16, lowres_resolution=4, crop_resolution=8, batch_size=8)


@pytest.mark.parametrize("stage", [WHOLE, CROPS])
def test_a_picture_is_mirrored_exactly_or_not_at_all(tmp_path, stage):
    folder, batches, share = random_pictures(tmp_path), 60, 0.3
    plain, some, every = (
        take(loader(section(folder, mirror=p), **stage), batches) for p in (0.0, share, 1.0)
    )
    mirrored = {name: [] for name in ("image", "lowres") if name in plain[0]}
    for batch, before, turned in zip(some, plain, every, strict=True):
        assert spelled(batch) == spelled(before) == spelled(turned)
        for name, found in mirrored.items():
            np.testing.assert_array_equal(turned[name], before[name][:, :, ::-1])
            changed = (batch[name] != before[name]).any((1, 2, 3))
            found += changed.tolist()
            which = changed[:, None, None, None]
            np.testing.assert_array_equal(batch[name], np.where(which, turned[name], before[name]))
    assert len({tuple(found) for found in mirrored.values()}) == 1
    found = mirrored["image"]
    deviation = np.sqrt(share * (1 - share) / len(found))
    assert abs(np.mean(found) - share) < 4 * deviation
    assert len(set(map(tuple, np.reshape(found, (-1, 8))))) > 10  # drawn anew in every pass


def test_what_is_mirrored_is_the_position_s(tmp_path):
    data = section(random_pictures(tmp_path), mirror=0.5)
    unbroken = loader(data, **CROPS)
    take(unbroken, 3)
    state, rest = unbroken.get_state(), take(unbroken, 4)
    helped = loader(section(tmp_path, mirror=0.5, workers=2), **CROPS)
    helped.set_state(state)
    assert_same(take(helped, 4), rest)
    helped.close()
    whole, shares = (together(shared(data, n, resolution=16), 6) for n in (1, 3))
    assert_same(whole, shares)


def test_evaluation_mirrors_nothing(tmp_path):
    folder = random_pictures(tmp_path)
    plain, mirrored = (
        take(loader(section(folder, mirror=p), train=False, **WHOLE), 1) for p in (0.0, 1.0)
    )
    assert_same(plain, mirrored)
