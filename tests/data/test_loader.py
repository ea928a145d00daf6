"""The loader: order, resume, sharding, workers, broken records, evaluation, the decoded cache."""

import io
import json
import logging
import re

import ml_collections
import numpy as np
import pytest
from PIL import Image

from cascade.data.loader import make_loader, make_source
from cascade.errors import UserError

RECORDS = 23
ROUNDING = 1e-3  # of float32 sums over values up to 255
FLOAT32 = 1e-5


def spelling(captions):
    """A stand-in for the embedding cache: embeddings that spell their captions."""
    codes = np.zeros((len(captions), 40, 1), np.float32)
    for row, caption in zip(codes, captions, strict=True):
        row[: len(caption), 0] = [ord(c) for c in caption]
    return {"text_emb": codes, "text_mask": codes[..., 0] > 0}


def spelled(batch) -> list[str]:
    return ["".join(chr(int(c)) for c in emb[:, 0] if c) for emb in batch["text_emb"]]


def picture(i: int, size=(16, 16)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (i * 10, 0, 255 - i * 10)).save(buffer, "png")
    return buffer.getvalue()


def name(record: str) -> str:
    return record.split(" of ")[-1]


@pytest.fixture
def pictures(tmp_path):
    """Pictures 00..22, each of one colour, with two captions: "first of 07" and "second of 07"."""
    for i in range(RECORDS):
        (tmp_path / f"{i:02d}.png").write_bytes(picture(i))
        (tmp_path / f"{i:02d}.txt").write_text(f"first of {i:02d}\nsecond of {i:02d}")
    return tmp_path


def section(folder, **changes) -> ml_collections.ConfigDict:
    source = {"name": "folder", "path": str(folder)}
    return ml_collections.ConfigDict(
        {
            "source": source,
            "eval_source": source,
            "filter": {"min_side": 0, "max_aspect": 100.0},
            "ground": "#ffffff",
            "crop": "centre",
            "buckets": (),
            "mirror": 0.0,
            "workers": 0,
            "max_broken_rate": 0.1,
            "cache_decoded": False,
            **changes,
        }
    )


def loader(data, **changes):
    settings = dict(
        resolution=8,
        lowres_resolution=0,
        crop_resolution=0,
        texts=spelling,
        seed=0,
        batch_size=4,
        train=True,
    )
    return make_loader(data, **{**settings, **changes})


def take(iterator, count: int) -> list[dict]:
    return [next(iterator) for _ in range(count)]


def assert_same(one: list[dict], two: list[dict]):
    assert len(one) == len(two)
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])


def test_batches(pictures):
    batch = next(loader(section(pictures), lowres_resolution=2, crop_resolution=4))
    assert {k: (v.shape, v.dtype.name) for k, v in batch.items()} == {
        "image": ((4, 4, 4, 3), "float32"),
        "lowres": ((4, 1, 1, 3), "float32"),
        "text_emb": ((4, 40, 1), "float32"),
        "text_mask": ((4, 40), "bool"),
    }
    for text, image, low in zip(spelled(batch), batch["image"], batch["lowres"], strict=True):
        i = int(name(text))
        expected = np.array([i * 10, 0, 255 - i * 10]) / 127.5 - 1
        np.testing.assert_allclose(image, np.broadcast_to(expected, (4, 4, 3)), rtol=FLOAT32)
        np.testing.assert_allclose(low, np.broadcast_to(expected, (1, 1, 3)), rtol=FLOAT32)


def test_each_pass_visits_every_record_once_in_a_new_order(pictures):
    texts = [t for b in take(loader(section(pictures), batch_size=RECORDS), 2) for t in spelled(b)]
    first, second = [name(t) for t in texts[:RECORDS]], [name(t) for t in texts[RECORDS:]]
    everything = [f"{i:02d}" for i in range(RECORDS)]
    assert sorted(first) == sorted(second) == everything
    assert first != second and first != everything
    assert {t.split(" ")[0] for t in texts} == {"first", "second"}


def test_order_is_the_seed_s(pictures):
    data = section(pictures)
    assert_same(take(loader(data), 12), take(loader(data), 12))
    one, two = (spelled(next(loader(data, seed=seed, batch_size=RECORDS))) for seed in (0, 1))
    assert one != two


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_in_the_middle_of_a_pass(pictures, workers):
    data = section(pictures, workers=workers)
    unbroken = loader(data)
    take(unbroken, 7)
    state = unbroken.get_state()
    rest = take(unbroken, 8)
    resumed = loader(data)
    resumed.set_state(state)
    assert_same(take(resumed, 8), rest)
    unbroken.close()
    resumed.close()


def test_workers_change_nothing_but_speed(pictures):
    (pictures / "03.png").write_bytes(b"broken")
    alone, helped = (loader(section(pictures, workers=w), resolution=4) for w in (0, 2))
    assert_same(take(alone, 14), take(helped, 14))
    helped.close()


def shared(data, count: int, **changes) -> list:
    """The loaders of `count` processes that share global batches of 6."""
    part = dict(batch_size=6 // count, process_count=count, **changes)
    return [loader(data, process_index=p, **part) for p in range(count)]


def together(parts: list, batches: int) -> list[dict]:
    """Global batches, as devices in the order of their processes hold them."""
    found = []
    for _ in range(batches):
        mine = [next(part) for part in parts]
        found.append({key: np.concatenate([batch[key] for batch in mine]) for key in mine[0]})
    return found


@pytest.mark.parametrize("count", [2, 3])
def test_processes_share_each_batch_as_one_would_load_it(pictures, count):
    data = section(pictures, crop="random")
    passes = 6 * RECORDS // 6
    whole, shares = (together(shared(data, n), passes) for n in (1, count))
    assert_same(whole, shares)
    texts = [name(t) for batch in shares for t in spelled(batch)]
    assert sorted(texts) == sorted(6 * [f"{i:02d}" for i in range(RECORDS)])


@pytest.mark.parametrize(("before", "after"), [(1, 2), (3, 1), (2, 3)])
def test_another_number_of_processes_goes_on_with_the_next_batch(pictures, before, after):
    data = section(pictures)
    unbroken = shared(data, before)
    together(unbroken, 5)
    states = [part.get_state() for part in unbroken]
    rest = together(unbroken, 9)
    resumed = shared(data, after)
    for part in resumed:
        part.set_state(states)
    assert_same(together(resumed, 9), rest)


def test_skipped_pictures_lose_none_to_another_number_of_processes(pictures):
    for i in (3, 11):
        (pictures / f"{i:02d}.png").write_bytes(b"broken")
    data = section(pictures)
    before = shared(data, 3)
    texts = [t for batch in together(before, 2) for t in spelled(batch)]
    resumed = shared(data, 2)
    for part in resumed:
        part.set_state([part.get_state() for part in before])
    texts += [t for batch in together(resumed, 3) for t in spelled(batch)]
    assert {name(t) for t in texts} == {f"{i:02d}" for i in range(RECORDS)} - {"03", "11"}


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


@pytest.mark.parametrize("count", [1, 2])
def test_evaluation_is_one_pass_in_order_with_first_captions(pictures, count):
    parts = shared(section(pictures), count, train=False)
    batches = together(parts, -(-RECORDS // 6))
    assert all(next(part, None) is None for part in parts)
    texts = [t for batch in batches for t in spelled(batch)]
    valid = np.concatenate([batch["valid"] for batch in batches])
    assert valid.sum() == RECORDS and valid[:RECORDS].all()
    assert texts[:RECORDS] == [f"first of {i:02d}" for i in range(RECORDS)]


def test_broken_records_are_logged_and_skipped(pictures, caplog):
    (pictures / "05.png").write_bytes(picture(5)[:60])
    with caplog.at_level(logging.WARNING):
        batches = take(loader(section(pictures, max_broken_rate=0.2)), 20)
    seen = {name(t) for b in batches for t in spelled(b)}
    assert seen == {f"{i:02d}" for i in range(RECORDS)} - {"05"}
    assert "record '05.png':" in caplog.text


def test_evaluation_marks_a_broken_record_and_keeps_its_shape(pictures):
    (pictures / "05.png").write_bytes(b"broken")
    batches = list(loader(section(pictures), train=False))
    valid = np.concatenate([b["valid"] for b in batches])
    assert list(np.flatnonzero(~valid)) == [5, RECORDS]
    assert {b["image"].shape for b in batches} == {(4, 8, 8, 3)}


def test_a_caption_that_is_no_text_breaks_its_record(pictures, caplog):
    for text in pictures.glob("*.txt"):
        text.unlink()
    rows = [{"file_name": f"{i:02d}.png", "caption": f"of {i:02d}"} for i in range(RECORDS)]
    rows[5]["caption"] += "\ud800"
    (pictures / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for cached in (False, True):
        data = section(pictures, cache_decoded=cached)
        seen = {name(t) for b in take(loader(data), 20) for t in spelled(b)}
        assert len(seen) == RECORDS - 1 and not any(t.startswith("05") for t in seen)
        assert "record '05.png': its caption 'of 05\\ud800' holds a lone surrogate" in caplog.text
        caplog.clear()


def test_the_counts_of_skipped_records_are_told(pictures, caplog):
    (pictures / "05.png").write_bytes(b"broken")
    for i in (1, 7):
        (pictures / f"{i:02d}.png").write_bytes(picture(i, (16, 4)))
    data = section(pictures, filter={"min_side": 5, "max_aspect": 9.0}, max_broken_rate=0.5)
    take(loader(data, batch_size=RECORDS - 3), 4)
    told = [m for m in caplog.messages if m.startswith("Skipped ") and " so far" in m]
    counts = [tuple(int(n) for n in re.findall(r"\d+", message)) for message in told]
    skipped, _, broken, filtered = np.array(counts).T
    assert (skipped == broken + filtered).all()
    assert (3, RECORDS, 1, 2) in counts  # at the end of the first pass
    assert list(skipped) == [1, 2, 3]  # later passes meet the same ones
    assert sum("Skipped broken record '05.png'" in m for m in caplog.messages) == 1


def test_sound_data_is_not_spoken_of(pictures, caplog):
    take(loader(section(pictures)), 20)
    assert not [m for m in caplog.messages if m.startswith("Skipped")]


@pytest.mark.parametrize("cached", [False, True])
def test_too_many_broken_records_are_fatal(pictures, cached):
    for i in range(8):
        (pictures / f"{i:02d}.png").write_bytes(b"broken")
    data = section(pictures, max_broken_rate=0.1, cache_decoded=cached)
    with pytest.raises(
        UserError, match=r"3 of the first \d+ records .*rate 0\.1 of 23 \(the last: '0\d\.png'"
    ):
        take(loader(data), 20)
    tolerant = section(pictures, max_broken_rate=0.5, cache_decoded=cached)
    assert len(take(loader(tolerant), 20)) == 20


def test_filtered_records_are_no_fault_unless_none_is_left(pictures):
    (pictures / "05.png").write_bytes(picture(5, (16, 4)))
    data = section(pictures, filter={"min_side": 5, "max_aspect": 2.0}, max_broken_rate=0.0)
    seen = {name(t) for b in take(loader(data), 20) for t in spelled(b)}
    assert len(seen) == RECORDS - 1 and "05" not in seen
    with pytest.raises(UserError, match="None of"):
        next(loader(section(pictures, filter={"min_side": 99, "max_aspect": 2.0})))


def test_the_decoded_cache_changes_nothing_and_is_reused(pictures, monkeypatch):
    (pictures / "05.png").write_bytes(b"broken")
    plain, cached = (section(pictures, cache_decoded=c) for c in (False, True))
    stage = dict(lowres_resolution=2, crop_resolution=4)
    expected = take(loader(plain, **stage), 12)
    assert_same(take(loader(cached, **stage), 12), expected)
    from cascade.data import decoded

    def forbidden(*arguments):
        raise AssertionError("decoded again")

    monkeypatch.setattr(decoded, "_write", forbidden)
    assert_same(take(loader(cached, **stage), 12), expected)
    with pytest.raises(AssertionError, match="decoded again"):
        loader(cached, resolution=4)
    (pictures / "07.png").write_bytes(picture(1))
    with pytest.raises(AssertionError, match="decoded again"):
        loader(cached)


def test_the_filter_is_for_originals_not_for_what_was_cached(pictures):
    (pictures / "05.png").write_bytes(picture(5, (11, 11)))
    strict = {"filter": {"min_side": 12, "max_aspect": 1.0}}
    expected = take(loader(section(pictures, **strict)), 12)
    assert_same(take(loader(section(pictures, cache_decoded=True, **strict)), 12), expected)


@pytest.mark.parametrize("train", [True, False])
def test_a_source_can_be_built_beforehand(pictures, monkeypatch, train):
    data = section(pictures)
    source = make_source(data, train=train)
    expected = take(loader(data, train=train), 6)
    monkeypatch.setattr("cascade.data.loader.build", None)
    assert_same(take(loader(data, train=train, source=source), 6), expected)


def test_a_stopped_cache_is_not_read(pictures, monkeypatch):
    from cascade.data import decoded

    def stop(*arguments, **keywords):
        raise KeyboardInterrupt

    data = section(pictures, cache_decoded=True)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(decoded.json, "dumps", stop)
        loader(data)
    assert list((pictures / ".decoded").iterdir()) == []
    assert_same(take(loader(data), 6), take(loader(section(pictures)), 6))


def test_contradictions_are_named(pictures):
    with pytest.raises(UserError, match=r"'random'.*cache_decoded"):
        loader(section(pictures, crop="random", cache_decoded=True))
    with pytest.raises(UserError, match="crop 'middle'"):
        loader(section(pictures, crop="middle"))
    with pytest.raises(UserError, match="lowres_resolution 3"):
        loader(section(pictures), lowres_resolution=3)
    with pytest.raises(UserError, match=r"'pth'.*'path'"):
        make_source(section(pictures, source={"name": "folder", "pth": "x"}), train=True)
