"""What lies between two texts: their own states at the ends, a straight line in the middle."""

import numpy as np
import pytest

from cascade.errors import UserError
from cascade.text.between import Between


def condition(seed, tokens):
    """States of a text of so many of five tokens, zero outside its mask."""
    mask = np.arange(5) < tokens
    states = np.random.default_rng(seed).normal(size=(5, 3)).astype(np.float32)
    return states * mask[:, None], mask


LONG, SHORT = condition(0, 4), condition(1, 2)


@pytest.mark.parametrize(("fraction", "end"), [(0, LONG), (0.0, LONG), (1, SHORT), (1.0, SHORT)])
def test_the_ends_are_the_texts(fraction, end):
    for got, wanted in zip(Between("a", "b", fraction).blend(LONG, SHORT), end, strict=True):
        np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("fraction", [0.25, 0.5])
def test_the_shorter_text_goes_on_with_its_last_state(fraction):
    emb, mask = Between("a", "b", fraction).blend(LONG, SHORT)
    np.testing.assert_array_equal(mask, LONG[1])
    assert emb.dtype == np.float32 and not emb[~mask].any()
    continued = SHORT[0][[0, 1, 1, 1]]
    np.testing.assert_allclose(emb[:4], LONG[0][:4] + fraction * (continued - LONG[0][:4]), 1e-6)


def test_the_way_back_is_the_same():
    there = Between("a", "b", 0.25).blend(LONG, SHORT)
    back = Between("b", "a", 0.75).blend(SHORT, LONG)
    for a, b in zip(there, back, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_text_and_itself():
    emb, mask = Between("a", "a", 0.3).blend(SHORT, SHORT)
    np.testing.assert_allclose(emb, SHORT[0], rtol=1e-6)
    np.testing.assert_array_equal(mask, SHORT[1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("moon", " ", 0.5), "no text"),
        (("", "moon", 0.5), "no text"),
        (("moon", 3, 0.5), "string"),
        (("moon", "\ud800", 0.5), "surrogate"),
        (("moon", "sun", -0.1), "fraction"),
        (("moon", "sun", 1.1), "fraction"),
        (("moon", "sun", float("nan")), "fraction"),
        (("moon", "sun", "half"), "fraction is 'half'"),
        (("moon", "sun", None), "fraction is None"),
    ],
)
def test_what_nothing_lies_between(arguments, message):
    with pytest.raises(UserError, match=message):
        Between(*arguments)
