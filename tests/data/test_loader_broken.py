"""What a loader leaves out, broken or filtered, and the decoded pictures it keeps."""

import json
import logging
import re

import numpy as np
import pytest
from tiny_loader import RECORDS, assert_same, loader, name, picture, section, spelled, take

from cascade.errors import UserError


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
