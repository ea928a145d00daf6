"""Fixtures of the embedding cache's tests."""

import pytest

from cascade.text import cache


@pytest.fixture
def small_segments(monkeypatch):
    """Caches are written in segments of eight captions."""
    monkeypatch.setattr(cache, "SEGMENT", 8)
