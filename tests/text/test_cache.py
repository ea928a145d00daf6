"""The embedding cache with a toy encoder: round trips, kills, neighbours, damage, foreigners."""

import multiprocessing
import os
import pickle
import signal
from hashlib import sha256

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import cascade.text.cache as cache_module
from cascade.errors import UserError
from cascade.text.cache import EmbeddingCache
from cascade.text.encoders import minilm
from cascade.text.interface import TextEncoder, Tokens

CAPTIONS = [f"caption {i} " + "word " * (i % 5) for i in range(30)]


class Toy(TextEncoder):
    """One token a word, whose states are drawn from a generator seeded by the word.

    It counts the prompts that it tokenizes, and kills its own process at the `dies_at`-th.
    """

    def __init__(self, max_length=6, dies_at=None):
        self.name, self.width, self.max_length = "toy", 3, max_length
        self.tokenized, self.dies_at = 0, dies_at

    @property
    def fingerprint(self):
        return sha256(f"toy {self.max_length}".encode()).hexdigest()

    def tokenize(self, prompts):
        self.tokenized += len(prompts)
        if self.dies_at is not None and self.tokenized >= self.dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        shape = (len(prompts), self.max_length)
        tokens = Tokens(np.zeros(shape, np.int32), np.zeros(shape, bool), np.zeros(shape[0], bool))
        for i, prompt in enumerate(prompts):
            words = prompt.split()
            tokens.truncated[i] = len(words) > self.max_length
            for j, word in enumerate(words[: self.max_length]):
                tokens.ids[i, j] = int.from_bytes(sha256(word.encode()).digest()[:3])
                tokens.mask[i, j] = True
        return tokens

    def embed(self, ids, mask):
        drawn = [[np.random.default_rng(i).normal(size=self.width) for i in row] for row in ids]
        return np.where(mask[..., None], np.float32(drawn), 0)

    def save_tokenizer(self, folder):
        raise AssertionError("the cache has no business with the tokenizer's files")

    def null(self):
        return np.zeros((self.max_length, self.width), np.float32), np.zeros(self.max_length, bool)


@pytest.fixture(autouse=True)
def small_segments(monkeypatch):
    monkeypatch.setattr(cache_module, "SEGMENT", 8)


def segments(folder, encoder=None):
    """The files of an encoder's cache; the usual Toy's by default."""
    own = (encoder or Toy()).fingerprint[:16]
    return sorted((folder / own).glob("captions-*.safetensors"))


def assert_holds(cache, captions, encoder):
    emb, mask = encoder.encode(captions)
    for i, caption in enumerate(captions):
        cached_emb, cached_mask = cache.lookup(caption)
        np.testing.assert_array_equal(cached_emb, np.float32(np.float16(emb[i])))
        np.testing.assert_array_equal(cached_mask, mask[i])
        assert cached_emb.dtype == np.float32 and cached_mask.dtype == bool


def test_round_trip(tmp_path):
    cache = EmbeddingCache(tmp_path / "new" / "folder", Toy())
    cache.ensure(CAPTIONS)
    assert len(cache) == 30 and len(segments(tmp_path / "new" / "folder")) == 4
    assert_holds(cache, CAPTIONS, Toy())
    assert_holds(EmbeddingCache(tmp_path / "new" / "folder", Toy()), CAPTIONS, Toy())


def test_round_trip_of_the_real_encoder(tmp_path):
    encoder = minilm(max_length=16, weights="")
    cache = EmbeddingCache(tmp_path, encoder)
    captions = ["a red apple", "", "ein Kätzchen 🐱", "word " * 40]
    cache.ensure(captions)
    assert_holds(cache, captions, encoder)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.lists(st.text(max_size=12), max_size=12), max_size=3))
def test_every_caption_is_embedded_once(tmp_path_factory, parts):
    encoder = Toy()
    cache = EmbeddingCache(tmp_path_factory.mktemp("cache"), encoder)
    for part in parts:
        cache.ensure(part + part)
    every = {caption for part in parts for caption in part}
    assert encoder.tokenized == len(cache) == len(every)
    assert_holds(cache, sorted(every), Toy())


def test_captions_are_stored_as_halves_without_padding(tmp_path):
    encoder = Toy(max_length=1000)
    EmbeddingCache(tmp_path, encoder).ensure(["one two three"] * 2 + ["four"])
    (segment,) = segments(tmp_path, encoder)
    states = load_file(segment)["states"]
    assert states.dtype == np.float16 and states.shape == (4, 3)


def test_a_missing_caption_is_named(tmp_path):
    cache = EmbeddingCache(tmp_path, Toy())
    cache.ensure(CAPTIONS)
    assert "a cat" not in cache
    with pytest.raises(UserError, match="'a cat' is not in the embedding cache"):
        cache.lookup("a cat")


def test_a_reader_finds_what_another_adds(tmp_path):
    reader = EmbeddingCache(tmp_path, Toy())
    EmbeddingCache(tmp_path, Toy()).ensure(CAPTIONS)
    assert_holds(reader, CAPTIONS, Toy())


def test_a_pickled_copy_reads_the_same(tmp_path):
    cache = EmbeddingCache(tmp_path, Toy())
    cache.ensure(CAPTIONS)
    packed = pickle.dumps(cache)
    assert len(packed) < 2000
    assert_holds(pickle.loads(packed), CAPTIONS, Toy())


def build(folder, dies_at):
    """A process of its own that embeds all captions, or dies on the way."""
    cache_module.SEGMENT = 8
    EmbeddingCache(folder, Toy(dies_at=dies_at)).ensure(CAPTIONS)


def start(folder, dies_at=None):
    process = multiprocessing.get_context("spawn").Process(target=build, args=(folder, dies_at))
    process.start()
    return process


def test_a_killed_run_keeps_its_segments_and_is_completed(tmp_path):
    process = start(tmp_path, dies_at=20)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    encoder = Toy()
    cache = EmbeddingCache(tmp_path, encoder)
    assert len(cache) == 16
    cache.ensure(CAPTIONS)
    assert encoder.tokenized == 14
    assert_holds(cache, CAPTIONS, Toy())


def test_two_processes_build_one_cache(tmp_path):
    processes = [start(tmp_path), start(tmp_path)]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    cache = EmbeddingCache(tmp_path, Toy())
    assert len(cache) == 30
    assert_holds(cache, CAPTIONS, Toy())
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".safetensors"}


def test_a_failed_write_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache_module.os, "replace", full)
    with pytest.raises(UserError, match=r"No space left on device.*make room"):
        EmbeddingCache(tmp_path, Toy()).ensure(CAPTIONS)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="Cannot write the embedding cache"):
        EmbeddingCache(tmp_path / "file", Toy()).ensure(CAPTIONS)


def test_encoders_share_a_folder(tmp_path):
    for missing in (30, 0):  # the second time, each finds its own
        for encoder in (Toy(max_length=6), Toy(max_length=3)):
            cache = EmbeddingCache(tmp_path, encoder)
            cache.ensure(CAPTIONS)
            assert encoder.tokenized == missing
            assert_holds(cache, CAPTIONS, encoder)


def test_segments_of_another_encoder_are_refused(tmp_path):
    theirs, ours = Toy(max_length=6), Toy(max_length=7)
    EmbeddingCache(tmp_path, theirs).ensure(CAPTIONS)
    segments(tmp_path, theirs)[0].parent.rename(tmp_path / ours.fingerprint[:16])
    with pytest.raises(UserError, match=r"max_length 6 .*, not by toy with max_length 7 .*delete"):
        EmbeddingCache(tmp_path, ours)


@pytest.mark.parametrize("left", [0, 5, 100, -1])
def test_a_truncated_segment_is_noticed_and_made_again(tmp_path, caplog, left):
    EmbeddingCache(tmp_path, Toy()).ensure(CAPTIONS)
    victim = segments(tmp_path)[0]
    victim.write_bytes(victim.read_bytes()[:left])
    encoder = Toy()
    cache = EmbeddingCache(tmp_path, encoder)
    assert f"{victim} is damaged" in caplog.text
    lost = [caption for caption in CAPTIONS if caption not in cache]
    assert len(lost) in (6, 8)
    cache.ensure(CAPTIONS)
    assert encoder.tokenized == len(lost)
    assert_holds(EmbeddingCache(tmp_path, Toy()), CAPTIONS, Toy())


@pytest.mark.parametrize("change", ["states", "keys", "header"])
def test_a_segment_whose_parts_disagree_is_made_again(tmp_path, caplog, change):
    EmbeddingCache(tmp_path, Toy()).ensure(CAPTIONS[:8])
    (victim,) = segments(tmp_path)
    with safe_open(victim, "np") as file:
        header = file.metadata()
    tensors = load_file(victim)
    if change == "header":
        header = None
    else:
        tensors[change] = tensors[change][1:].copy()
    save_file(tensors, victim, header)
    cache = EmbeddingCache(tmp_path, Toy())
    assert len(cache) == 0 and "is damaged" in caplog.text
    cache.ensure(CAPTIONS[:8])
    assert_holds(cache, CAPTIONS[:8], Toy())


def test_captions_stored_twice_are_counted_once(tmp_path):
    EmbeddingCache(tmp_path / "a", Toy()).ensure(CAPTIONS[:8])
    EmbeddingCache(tmp_path / "b", Toy()).ensure(CAPTIONS[4:12])
    for segment in segments(tmp_path / "b"):
        segment.rename(tmp_path / "a" / segment.relative_to(tmp_path / "b"))
    cache = EmbeddingCache(tmp_path / "a", Toy())
    assert len(cache) == 12
    assert_holds(cache, CAPTIONS[:12], Toy())


def test_keys_that_agree_in_their_first_half_are_told_apart(tmp_path, monkeypatch):
    whole = cache_module._key
    monkeypatch.setattr(cache_module, "_key", lambda c: whole(c) * np.array([0, 1], np.uint64))
    cache = EmbeddingCache(tmp_path, Toy())
    cache.ensure(CAPTIONS)
    assert len(cache) == 30 and "a cat" not in cache
    assert_holds(cache, CAPTIONS, Toy())


def test_cut_captions_are_counted(tmp_path, caplog):
    EmbeddingCache(tmp_path, Toy(max_length=3)).ensure(
        ["one", "one two three", "a b c d", "a b c d e"]
    )
    assert "2 of 4 captions are longer than the 3 tokens that toy reads" in caplog.text


def test_progress_is_shown(tmp_path, capsys):
    EmbeddingCache(tmp_path, Toy()).ensure(CAPTIONS)
    shown = capsys.readouterr().err
    assert "30/30" in shown and "caption/s" in shown


def test_a_caption_with_a_surrogate_is_refused(tmp_path):
    with pytest.raises(UserError, match="surrogate"):
        EmbeddingCache(tmp_path, Toy()).ensure(["fine", "\ud800"])
