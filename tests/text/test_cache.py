"""The embedding cache with a toy encoder: round trips, kills, neighbours."""

import multiprocessing
import os
import pickle
import signal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.numpy import load_file
from toy_cache import CAPTIONS, Toy, assert_holds, opened, segments

import cascade.text.cache as cache_module
from cascade.errors import UserError
from cascade.parallel.mesh import make_mesh
from cascade.text.encoders import minilm
from cascade.text.segment import DTYPES, restored, rounded

FLOAT16 = 2**-11  # what a cache rounds by
FLOAT32 = 1e-5  # of sums in another order
pytestmark = pytest.mark.usefixtures("small_segments")


@pytest.mark.parametrize("dtype", DTYPES)
def test_round_trip(tmp_path, dtype):
    folder = tmp_path / "new" / "folder"
    cache = opened(folder, dtype=dtype)
    cache.ensure([*CAPTIONS, ""])
    assert len(cache) == 31 and len(segments(folder, dtype=dtype)) == 4
    assert_holds(cache, [*CAPTIONS, ""], Toy(), dtype)
    assert_holds(opened(folder, dtype=dtype), [*CAPTIONS, ""], Toy(), dtype)


@given(
    hnp.arrays(
        np.float32,
        (3, 5),
        elements=st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False),
    )
)
def test_int8_is_off_by_half_a_scale_at_most(states):
    stored = rounded(states, "int8")
    assert stored["states"].dtype == np.int8
    most = np.abs(states).max(axis=1, keepdims=True)
    error = np.abs(np.float64(restored(**stored)) - states)
    assert (error <= most / 254 * (1 + 1e-5) + 1e-35).all()  # float32 rounds, and ends at 1e-38


@pytest.mark.parametrize(
    ("dtype", "scale"), [("float16", 1e6), ("float16", np.nan), ("int8", np.inf)]
)
def test_states_beyond_the_dtype_are_refused(tmp_path, dtype, scale):
    with pytest.raises(UserError, match=f"states that {dtype} can't hold"):
        opened(tmp_path, Toy(scale=scale), dtype).ensure(CAPTIONS)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_an_encoder_that_hands_on_padding_has_all_of_it_stored(tmp_path):
    encoder = Toy(keep_padding=True)
    cache = opened(tmp_path, encoder)
    cache.ensure(CAPTIONS)
    assert cache.tokens == 30 * encoder.max_length
    assert cache.lookup(CAPTIONS)["text_mask"].all()
    assert_holds(cache, CAPTIONS, encoder)


def test_a_mesh_gives_the_same_and_keeps_no_weights(tmp_path):
    encoder = minilm(max_length=16, weights="")
    cache = opened(tmp_path, encoder)
    cache.ensure(CAPTIONS, make_mesh(data=2, fsdp=2, tensor=2))
    emb, mask = minilm(max_length=16, weights="").encode(CAPTIONS)
    found = cache.lookup(CAPTIONS)
    np.testing.assert_allclose(found["text_emb"], emb, rtol=FLOAT16, atol=FLOAT32)
    np.testing.assert_array_equal(found["text_mask"], mask)
    assert not {"_params", "_apply"} & vars(encoder).keys()


def test_segments_have_a_size_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(cache_module, "SEGMENT_BYTES", 5 * 6 * 3 * 2)  # 5 captions of 6 states
    opened(tmp_path).ensure(CAPTIONS)
    assert len(segments(tmp_path)) == 6


def test_round_trip_of_the_real_encoder(tmp_path):
    encoder = minilm(max_length=16, weights="")
    cache = opened(tmp_path, encoder)
    captions = ["a red apple", "", "ein Kätzchen 🐱", "word " * 40]
    cache.ensure(captions)
    assert_holds(cache, captions, encoder)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.lists(st.text(max_size=12), max_size=12), max_size=3))
def test_every_caption_is_embedded_once(tmp_path_factory, parts):
    encoder = Toy()
    cache = opened(tmp_path_factory.mktemp("cache"), encoder)
    for part in parts:
        cache.ensure(part + part)
    every = {caption for part in parts for caption in part}
    assert encoder.tokenized == len(cache) == len(every)
    assert_holds(cache, sorted(every), Toy())


def test_captions_are_stored_as_halves_without_padding(tmp_path):
    encoder = Toy(max_length=1000)
    opened(tmp_path, encoder).ensure(["one two three"] * 2 + ["four"])
    (segment,) = segments(tmp_path, encoder)
    states = load_file(segment)["states"]
    assert states.dtype == np.float16 and states.shape == (4, 3)


def test_a_missing_caption_is_named(tmp_path):
    cache = opened(tmp_path)
    cache.ensure(CAPTIONS)
    assert "a cat" not in cache
    with pytest.raises(UserError, match="'a cat' is not in the embedding cache"):
        cache.lookup(["a cat"])


def test_a_reader_finds_what_another_adds(tmp_path):
    reader = opened(tmp_path)
    opened(tmp_path).ensure(CAPTIONS)
    assert_holds(reader, CAPTIONS, Toy())


def test_a_pickled_copy_reads_the_same(tmp_path):
    cache = opened(tmp_path)
    cache.ensure(CAPTIONS)
    packed = pickle.dumps(cache)
    assert len(packed) < 2000
    assert_holds(pickle.loads(packed), CAPTIONS, Toy())


def build(folder, dies_at):
    """A process of its own that embeds all captions, or dies on the way."""
    cache_module.SEGMENT = 8
    opened(folder, Toy(dies_at=dies_at)).ensure(CAPTIONS)


def start(folder, dies_at=None):
    process = multiprocessing.get_context("spawn").Process(target=build, args=(folder, dies_at))
    process.start()
    return process


def test_a_killed_run_keeps_its_segments_and_is_completed(tmp_path):
    process = start(tmp_path, dies_at=20)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    encoder = Toy()
    cache = opened(tmp_path, encoder)
    assert len(cache) == 16
    cache.ensure(CAPTIONS)
    assert encoder.tokenized == 14
    assert_holds(cache, CAPTIONS, Toy())


def test_two_processes_build_one_cache(tmp_path):
    processes = [start(tmp_path), start(tmp_path)]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    cache = opened(tmp_path)
    assert len(cache) == 30
    assert_holds(cache, CAPTIONS, Toy())
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".safetensors"}


def test_a_failed_write_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match=r"No space left on device.*make room"):
        opened(tmp_path).ensure(CAPTIONS)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="Cannot write the embedding cache"):
        opened(tmp_path / "file").ensure(CAPTIONS)


def test_encoders_share_a_folder(tmp_path):
    for missing in (30, 0):  # the second time, each finds its own
        for encoder in (Toy(max_length=6), Toy(max_length=3)):
            cache = opened(tmp_path, encoder)
            cache.ensure(CAPTIONS)
            assert encoder.tokenized == missing
            assert_holds(cache, CAPTIONS, encoder)


def test_segments_of_another_encoder_are_refused(tmp_path):
    theirs, ours = Toy(max_length=6), Toy(max_length=7)
    opened(tmp_path, theirs).ensure(CAPTIONS)
    segments(tmp_path, theirs)[0].parent.rename(opened(tmp_path, ours).folder)
    with pytest.raises(UserError, match=r"max_length 6 .*, not by toy with max_length 7 .*delete"):
        opened(tmp_path, ours)


def test_the_same_captions_in_another_dtype_are_pointed_at(tmp_path, caplog):
    opened(tmp_path, dtype="int8").ensure(CAPTIONS)
    assert not caplog.text
    opened(tmp_path, dtype="bfloat16").ensure(CAPTIONS)
    assert "30 captions aren't stored as bfloat16" in caplog.text
    assert "config.text_cache.dtype to 'int8'" in caplog.text


def test_a_cache_of_an_earlier_version_is_pointed_at(tmp_path, caplog):
    (tmp_path / Toy().fingerprint[:16]).mkdir()
    opened(tmp_path).ensure(CAPTIONS)
    assert "is of an earlier version and isn't read; delete it" in caplog.text


def test_captions_stored_twice_are_counted_once(tmp_path):
    opened(tmp_path / "a").ensure(CAPTIONS[:8])
    opened(tmp_path / "b").ensure(CAPTIONS[4:12])
    for segment in segments(tmp_path / "b"):
        segment.rename(tmp_path / "a" / segment.relative_to(tmp_path / "b"))
    cache = opened(tmp_path / "a")
    assert len(cache) == 12
    assert_holds(cache, CAPTIONS[:12], Toy())


def test_keys_that_agree_in_their_first_half_are_told_apart(tmp_path, monkeypatch):
    whole = cache_module._key
    monkeypatch.setattr(cache_module, "_key", lambda c: whole(c) * np.array([0, 1], np.uint64))
    cache = opened(tmp_path)
    cache.ensure(CAPTIONS)
    assert len(cache) == 30 and "a cat" not in cache
    assert_holds(cache, CAPTIONS, Toy())


def test_cut_captions_are_counted(tmp_path, caplog):
    opened(tmp_path, Toy(max_length=3)).ensure(["one", "one two three", "a b c d", "a b c d e"])
    assert "2 of 4 captions are longer than the 3 tokens that toy reads" in caplog.text


def test_progress_is_shown(tmp_path, capsys):
    opened(tmp_path).ensure(CAPTIONS)
    shown = capsys.readouterr().err
    assert "30/30" in shown and "caption/s" in shown


def test_a_caption_with_a_surrogate_is_refused(tmp_path):
    with pytest.raises(UserError, match="surrogate"):
        opened(tmp_path).ensure(["fine", "\ud800"])
