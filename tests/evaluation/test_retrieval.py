"""Nearest neighbours by the expanded square are those of the plain definition."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from cascade.evaluation.retrieval import nearest


@given(st.integers(1, 6), st.integers(1, 9), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_equals_the_definition(drawn, known, side, seed):
    rng = np.random.default_rng(seed)
    a = rng.uniform(-1, 1, (drawn, side, side, 3))
    b = rng.uniform(-1, 1, (known, side, side, 3))
    plain = ((a[:, None] - b[None]) ** 2).mean((2, 3, 4)).argmin(1)
    assert nearest(a, b).tolist() == plain.tolist()


def test_uint8_doesnt_overflow():
    known = np.stack([np.full((2, 2, 3), value, np.uint8) for value in (0, 128, 255)])
    assert nearest(np.full((1, 2, 2, 3), 250, np.uint8), known).tolist() == [2]
