"""Shared by the tests of loaders."""

import pytest
from tiny_loader import RECORDS, picture


@pytest.fixture
def pictures(tmp_path):
    """Pictures 00..22, each of one colour, with two captions: "first of 07" and "second of 07"."""
    for i in range(RECORDS):
        (tmp_path / f"{i:02d}.png").write_bytes(picture(i))
        (tmp_path / f"{i:02d}.txt").write_text(f"first of {i:02d}\nsecond of {i:02d}")
    return tmp_path
