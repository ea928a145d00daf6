"""What is damaged in an embedding cache is noticed, never handed on, and made again."""

import contextlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from toy_cache import CAPTIONS, Toy, assert_holds, opened, segments

from cascade.errors import UserError
from cascade.text.segment import DTYPES

pytestmark = pytest.mark.usefixtures("small_segments")


@pytest.mark.parametrize("left", [0, 5, 100, -1])
def test_a_truncated_segment_is_noticed_and_made_again(tmp_path, caplog, left):
    opened(tmp_path).ensure(CAPTIONS)
    victim = segments(tmp_path)[0]
    victim.write_bytes(victim.read_bytes()[:left])
    encoder = Toy()
    cache = opened(tmp_path, encoder)
    assert f"{victim} is damaged" in caplog.text
    lost = [caption for caption in CAPTIONS if caption not in cache]
    assert len(lost) in (6, 8)
    cache.verify()
    cache.ensure(CAPTIONS)
    assert encoder.tokenized == len(lost)
    assert caplog.text.count("is damaged") == 1
    assert_holds(opened(tmp_path), CAPTIONS, Toy())


@given(st.data())
@settings(max_examples=100)
def test_a_flipped_bit_is_never_handed_on(tmp_path_factory, data):
    folder, dtype = tmp_path_factory.mktemp("cache"), data.draw(st.sampled_from(list(DTYPES)))
    opened(folder, dtype=dtype).ensure(CAPTIONS[:8])
    (victim,) = segments(folder, dtype=dtype)
    contents = bytearray(victim.read_bytes())
    contents[data.draw(st.integers(0, len(contents) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    victim.write_bytes(contents)

    cache = opened(folder, dtype=dtype)
    for caption in CAPTIONS[:8]:  # notices, or isn't concerned
        if caption in cache:
            with contextlib.suppress(UserError):
                assert_holds(cache, [caption], Toy(), dtype)
    cache.verify(progress=False)
    cache.ensure(CAPTIONS[:8])
    assert_holds(opened(folder, dtype=dtype), CAPTIONS[:8], Toy(), dtype)


def with_a_flipped_state(folder, caption):
    """A filled cache, and its segment in which a state of the caption differs in one bit."""
    opened(folder).ensure(CAPTIONS)
    (state,) = np.float16(Toy().encode([caption])[0][0, 1:2])
    for victim in segments(folder):
        contents = victim.read_bytes()
        at = contents.find(state.tobytes())
        if at >= 0:
            flipped = bytearray(contents)
            flipped[at] ^= 1
            victim.write_bytes(flipped)
            return victim
    raise AssertionError("no segment holds the caption")


def test_damaged_states_are_noticed_when_they_are_used_and_made_again(tmp_path):
    victim = with_a_flipped_state(tmp_path, CAPTIONS[17])
    cache = opened(tmp_path)
    assert_holds(cache, CAPTIONS[:8], Toy())
    with pytest.raises(UserError, match=r"damaged.*start again") as caught:
        cache.lookup([CAPTIONS[17]])
    assert str(victim) in str(caught.value) and not victim.exists()
    encoder = Toy()
    opened(tmp_path, encoder).ensure(CAPTIONS)
    assert encoder.tokenized == 8
    assert_holds(opened(tmp_path), CAPTIONS, Toy())


def test_verifying_finds_damage_that_nobody_used(tmp_path, caplog):
    victim = with_a_flipped_state(tmp_path, CAPTIONS[17])
    cache = opened(tmp_path)
    assert len(cache) == 30
    cache.verify(progress=False)
    assert f"{victim} is damaged" in caplog.text and len(cache) == 22
    cache.ensure(CAPTIONS)
    assert_holds(cache, CAPTIONS, Toy())


@pytest.mark.parametrize("where", ["index", "states"])
def test_a_segment_that_another_builder_mended_stays(tmp_path, monkeypatch, where):
    """Two see the damage, and the second acts on it once the first has made the segment again."""
    opened(tmp_path).ensure(CAPTIONS[:8])
    (victim,) = segments(tmp_path)
    whole = victim.read_bytes()
    victim.write_bytes(whole[:100] if where == "index" else whole[:-1] + bytes([whole[-1] ^ 1]))
    first, second = opened(tmp_path), opened(tmp_path)

    def mend(*_):
        first.verify(progress=False)
        first.ensure(CAPTIONS[:8])

    if where == "states":
        mend()
        second.verify(progress=False)
    else:
        monkeypatch.setattr(second, "_tell_siblings", mend)  # after it looked, before it removes
    second.ensure(CAPTIONS[8:16])
    assert_holds(opened(tmp_path), CAPTIONS[:16], Toy())


@pytest.mark.parametrize("change", ["states", "keys", "header", "checks"])
def test_a_segment_whose_parts_disagree_is_made_again(tmp_path, caplog, change):
    opened(tmp_path).ensure(CAPTIONS[:8])
    (victim,) = segments(tmp_path)
    with safe_open(victim, "np") as file:
        header = file.metadata()
    tensors = load_file(victim)
    if change == "header":
        header = None
    else:
        tensors[change] = tensors[change][1:].copy()
    save_file(tensors, victim, header)
    cache = opened(tmp_path)
    assert len(cache) == 0 and "is damaged" in caplog.text
    cache.ensure(CAPTIONS[:8])
    assert_holds(cache, CAPTIONS[:8], Toy())
