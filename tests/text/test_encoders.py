"""Tokens, states and conditions of the text encoder, with the real model."""

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from cascade.errors import UserError
from cascade.registry import build
from cascade.text.bert import FILES, VENDORED
from cascade.text.encoders import ENCODERS, minilm
from cascade.text.interface import padded_lengths

CLS, SEP = 101, 102
ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=60)  # surrogates too


@pytest.fixture(scope="module")
def encoder():
    return minilm(max_length=24, weights="")


def ids_of(encoder, prompt):
    tokens = encoder.tokenize([prompt])
    return tokens.ids[0][tokens.mask[0]].tolist()


def pooled(encoder, prompts):
    """Mean over tokens, normalised: the sentence embedding that the model was trained for."""
    emb, mask = encoder.encode(prompts)
    mean = emb.sum(axis=1) / mask.sum(axis=1, keepdims=True)
    return mean / np.linalg.norm(mean, axis=1, keepdims=True)


def test_a_config_section_builds_it():
    encoder = build("text", ENCODERS, {"name": "minilm", "max_length": 16, "weights": ""})
    assert (encoder.name, encoder.width, encoder.max_length) == ("minilm", 384, 16)


# Ids are line numbers of the model's published vocabulary.
@pytest.mark.parametrize(
    ("prompt", "ids"),
    [
        ("a red apple", [1037, 2417, 6207]),
        ("Hello, World!", [7592, 1010, 2088, 999]),
        ("Café", [7668]),
        ("embeddings", [7861, 8270, 4667, 2015]),
        ("猫", [100]),
        ("[PAD]", [1031, 11687, 1033]),
    ],
)
def test_known_ids(encoder, prompt, ids):
    assert ids_of(encoder, prompt) == [CLS, *ids, SEP]


@pytest.mark.parametrize("prompt", ["", " \t\n", "\u200b\x00"])
def test_a_prompt_without_text_is_the_null_condition_and_said_so(encoder, prompt, caplog):
    emb, mask = encoder.encode([prompt])
    null_emb, null_mask = encoder.null()
    np.testing.assert_array_equal(emb[0], null_emb)
    np.testing.assert_array_equal(mask[0], null_mask)
    assert "unconditional" in caplog.text


def test_the_null_condition_is_zeros_and_a_cleared_mask(encoder):
    emb, mask = encoder.null()
    assert emb.shape == (24, 384) and emb.dtype == np.float32 and not emb.any()
    assert mask.shape == (24,) and mask.dtype == bool and not mask.any()


@settings(deadline=None)
@given(st.lists(ANY_TEXT, max_size=4))
def test_any_text_is_tokenized_or_refused_for_its_surrogates(encoder, prompts):
    if any("\ud800" <= character <= "\udfff" for prompt in prompts for character in prompt):
        with pytest.raises(UserError, match="surrogate"):
            encoder.tokenize(prompts)
        return
    ids, mask, truncated = encoder.tokenize(prompts)
    assert ids.shape == mask.shape == (len(prompts), 24) and truncated.shape == (len(prompts),)
    np.testing.assert_array_equal(mask, ids != 0)
    for row, count in zip(ids, mask.sum(axis=1), strict=True):
        assert count != 1 and count != 2
        assert count == 0 or (row[0] == CLS and row[count - 1] == SEP and row[:count].all())
    assert (mask.sum(axis=1)[truncated] == 24).all()


def test_a_surrogate_is_located_in_one_sentence(encoder):
    with pytest.raises(UserError, match=r"position 4; give valid Unicode text\.$"):
        encoder.encode(["fine", "cat \udc00"])


@pytest.mark.parametrize("prompt", [None, 7, b"cat"])
def test_a_prompt_that_is_no_string_is_refused(encoder, prompt):
    with pytest.raises(UserError, match="give a string"):
        encoder.encode([prompt])


def test_one_bare_string_is_not_taken_for_a_list_of_letters(encoder):
    with pytest.raises(UserError, match="list"):
        encoder.encode("cat")


@pytest.mark.parametrize("words", [22, 23, 24])
def test_truncation_starts_one_past_the_room_for_words(encoder, words):
    tokens = encoder.tokenize(["cat " * words])
    assert tokens.truncated.tolist() == [words > 22]
    assert ids_of(encoder, "cat " * words) == [CLS, *[4937] * 22, SEP]


def test_the_tokenizer_files_own_limit_of_128_tokens_is_lifted():
    tokens = minilm(max_length=200, weights="").tokenize(["cat " * 150])
    assert tokens.mask.sum() == 152 and not tokens.truncated.any()


def test_a_prompt_of_100000_characters_is_cut_and_said_so(encoder, caplog):
    emb, _ = encoder.encode(["a cat. " * 14286, "a cat. " * 8])
    np.testing.assert_array_equal(emb[0], emb[1])
    assert "longer than the 24 tokens" in caplog.text
    assert max(map(len, caplog.messages)) < 200


def test_a_prompt_does_not_depend_on_its_mates(encoder):
    prompts = ["a cat", "", "a red apple on a wide green field of grass", "two dogs"]
    together, mask = encoder.encode(prompts)
    for i, prompt in enumerate(prompts):
        alone, alone_mask = encoder.encode([prompt])
        np.testing.assert_array_equal(alone[0], together[i])
        np.testing.assert_array_equal(alone_mask[0], mask[i])
    assert together.dtype == np.float32 and not together[~mask].any()


def test_batches_cover_every_prompt_once(encoder):
    tokens = encoder.tokenize(["word " * (i % 20) for i in range(40)])
    rows = np.concatenate([rows for rows, _ in encoder.embed_in_batches(tokens)])
    assert sorted(rows) == list(range(40))


def test_no_prompts_give_no_embeddings(encoder):
    emb, mask = encoder.encode([])
    assert emb.shape == (0, 24, 384) and mask.shape == (0, 24)


@given(st.integers(3, 512), st.data())
def test_padded_lengths_fit_and_are_few(max_length, data):
    counts = np.array(data.draw(st.lists(st.integers(0, max_length), min_size=1)))
    lengths = padded_lengths(counts, max_length)
    assert (lengths >= counts).all() and (lengths <= np.minimum(max_length, 1.5 * counts + 8)).all()
    assert len(np.unique(padded_lengths(np.arange(max_length + 1), max_length))) <= 13


def test_meaning_survives(encoder):
    kitten, cat, truck = pooled(encoder, ["kitten", "cat", "truck"])
    assert kitten @ cat > kitten @ truck + 0.2


def test_a_pickled_copy_embeds_the_same(encoder):
    emb, _ = encoder.encode(["a cat"])
    packed = pickle.dumps(encoder)
    assert len(packed) < 10_000
    copy = pickle.loads(packed)
    assert copy.fingerprint == encoder.fingerprint
    np.testing.assert_array_equal(copy.encode(["a cat"])[0], emb)


def test_the_saved_tokenizer_gives_the_same_ids(encoder, tmp_path):
    (file,) = encoder.save_tokenizer(tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / file))
    tokenizer.no_padding()
    assert tokenizer.encode("a red apple").ids == ids_of(encoder, "a red apple")


def a_folder(folder, changed):
    """Fills a folder with the vendored files, by links, and with the changed ones' bytes."""
    for file in FILES:
        if file in changed:
            (folder / file).write_bytes(changed[file])
        else:
            (folder / file).symlink_to(VENDORED / file)
    return str(folder)


def test_the_fingerprint_tells_settings_and_files_apart(encoder, tmp_path):
    (tmp_path / "same").mkdir()
    (tmp_path / "other").mkdir()
    same = a_folder(tmp_path / "same", {})
    config = (VENDORED / "config.json").read_bytes() + b" "
    other = a_folder(tmp_path / "other", {"config.json": config})
    assert minilm(24, same).fingerprint == encoder.fingerprint
    prints = {encoder.fingerprint, minilm(24, other).fingerprint, minilm(23, "").fingerprint}
    assert len(prints) == 3


@pytest.mark.parametrize("max_length", [-1, 2, 513])
def test_an_impossible_max_length_is_refused(max_length):
    with pytest.raises(UserError, match="3 to 512"):
        minilm(max_length, "")


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"No config\.json in"):
        minilm(24, str(tmp_path))


@pytest.mark.parametrize("file", FILES)
def test_a_damaged_file_is_refused(tmp_path, file):
    cut = (VENDORED / file).read_bytes()[:500]
    with pytest.raises(UserError, match=f"{file}.*again"):
        minilm(24, a_folder(tmp_path, {file: cut})).encode(["a cat"])
