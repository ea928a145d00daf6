"""A section is built exactly as its factory's signature says, or refused in a sentence."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ml_collections import ConfigDict

from cascade.errors import UserError
from cascade.registry import build, check


def brush(*, width: int, ink: float, tip: str):
    """A factory that returns what it was given."""
    return width, ink, tip


BRUSHES = {"brush": brush}
GOOD = {"name": "brush", "width": 3, "ink": 0.5, "tip": "round"}


def test_a_section_becomes_keywords():
    assert build("brush", BRUSHES, GOOD) == (3, 0.5, "round")
    assert build("brush", BRUSHES, ConfigDict({**GOOD, "ink": 1})) == (3, 1, "round")


def test_what_the_program_supplies_is_not_the_sections():
    rest = {key: GOOD[key] for key in ("name", "width", "ink")}
    assert build("brush", BRUSHES, rest, tip="flat") == (3, 0.5, "flat")
    with pytest.raises(UserError, match="Unknown key 'tip'"):
        check("brush", BRUSHES, GOOD, supplied=("tip",))


KEYS = st.text(max_size=2).filter(lambda key: "." not in key)  # a ConfigDict takes no dots


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=3),
        lambda inner: st.lists(inner, max_size=2) | st.dictionaries(KEYS, inner),
        max_leaves=4,
    )
)
def test_any_other_name_is_refused_in_one_line(name):
    for section in ({**GOOD, "name": name}, ConfigDict({**GOOD, "name": name})):
        with pytest.raises(UserError, match=r"Unknown brush name .*choose from brush") as caught:
            check("brush", BRUSHES, section)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"width": 3.0}, "'width' .* is 3.0 .*give int"),
        ({"width": True}, "'width' .* is True .*give int"),
        ({"ink": "wet"}, "'ink' .* is 'wet' .*give float"),
        ({"tipp": "round"}, "'tipp' .*did you mean 'tip'.*; it takes ink, tip, width"),
    ],
)
def test_a_wrong_or_foreign_value_is_named(changes, said):
    with pytest.raises(UserError, match=said):
        build("brush", BRUSHES, {**GOOD, **changes})


@pytest.mark.parametrize("key", GOOD)
def test_a_missing_key_is_named(key):
    with pytest.raises(UserError, match=rf"['`]{key}['`]"):
        build("brush", BRUSHES, {k: v for k, v in GOOD.items() if k != key})
