"""Sources of pictures: which of their files count, and what they say."""

import shutil

import numpy as np
import pytest

from cascade.data.record_files import to_example, write_file
from cascade.errors import UserError
from cascade.evaluation import pictures
from cascade.evaluation.job import first_caption
from cascade.images import save_png


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three captioned pictures, 16×16."""
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(3):
        save_png(folder / "real" / f"{i:02d}.png", np.full((16, 16, 3), i, np.uint8))
        (folder / "real" / f"{i:02d}.txt").write_text(f"thing {chr(97 + i)}\nanother\n")
    return folder


def test_hidden_files_are_no_pictures(folder, tmp_path):
    made = tmp_path / "made"
    shutil.copytree(folder / "real", made)
    (made / "._00.png").write_bytes(b"what an archiver leaves")
    (made / ".cache").mkdir()
    (made / ".cache" / "00.png").write_bytes(b"a thumbnail")
    source = pictures.Made(str(made))
    assert [source.key(i) for i in range(len(source))] == [f"{i:02d}.png" for i in range(3)]
    assert source.captions(1) == ["thing b", "another"]


def test_a_configs_splits():
    """The held-out one by default, limits and ground as the config has them."""
    spec = "configs/emoji/base64.py:smoke"
    data = pictures.open_data(spec, "heldout", ["--config.data.ground=#000000"])
    assert data.about != pictures.open_data(spec, "heldout").about
    assert data.ground == (0, 0, 0) and len(data.source) == data.about["records"]
    train = pictures.open_data(spec, "train", ["--config.data.source.records=9"])
    assert len(train.source) == 9 and train.about != data.about
    with pytest.raises(UserError, match="Unknown split"):
        pictures.open_data(spec, "test")


def test_record_files_are_a_source(folder, tmp_path):
    picture = (folder / "real" / "00.png").read_bytes()
    examples = [to_example({"image": picture, "captions": [f"thing {i}", "another"]}) for i in "ab"]
    write_file(tmp_path / "x-00000.array_record", examples)
    data = pictures.open_data(str(tmp_path / "*.array_record"))
    assert [first_caption(data, i) for i in range(2)] == ["thing a", "thing b"]
    assert data.preprocess(16)(data.source[1]["image"]).shape == (16, 16, 3)
