"""What one process of several can't read, the others are told, who would wait for ever."""

import numpy as np
import pytest

from cascade.errors import UserError
from cascade.evaluation import drawn, features
from cascade.evaluation.record import Record
from cascade.parallel import mesh as meshes


class Together:
    """In the place of a mesh, one of several processes."""

    is_multi_process = True


@pytest.fixture
def told(monkeypatch):
    """Whether this process failed, each time it told the others."""
    told = []
    monkeypatch.setattr(meshes, "first_failing", lambda failed: told.append(failed))
    return told


def unreadable(*_):
    raise UserError("It can't be read.")


def test_weights_that_cannot_be_fetched_or_read(told, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="Can't read the weights"):
        features.fid_inception(tmp_path / "none.pth", Together)
    assert told == [True]
    monkeypatch.setattr(features, "fetch", unreadable)
    with pytest.raises(UserError, match="It can't"):
        features.fid_inception("download", Together)
    assert told == [True, True]


def test_pictures_that_cannot_be_enlarged(told, tmp_path):
    record = Record(tmp_path / "out", {}, Together)
    told.clear()
    how = (drawn.Setting(), 0, 1, 8, (), "", drawn.Enlarged(0, unreadable))
    with pytest.raises(UserError, match="It can't"):
        drawn.measure(record, None, ["a thing"], *how)
    assert told == [True]


def test_a_damaged_part(told, tmp_path):
    record = Record(tmp_path / "out", {}, Together)
    record.add(place=np.arange(5))
    record.write()
    assert record.shared("place").tolist() == [0, 1, 2, 3, 4] and record.following("place") == 5
    assert not any(told)
    for part in (tmp_path / "out").glob("*.safetensors"):
        part.write_bytes(b"damaged")
    for read in (record.shared, record.following):
        told.clear()
        with pytest.raises(UserError, match="is damaged"):
            read("place")
        assert told == [True]
