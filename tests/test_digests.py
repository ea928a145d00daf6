"""Digests are remembered, but never believed without looking; files are written whole."""

import threading

import pytest

from cascade import digests
from cascade.digests import remembered
from cascade.files import write_whole

RIGHT, CHANGED = "a" * 64, "b" * 64


@pytest.fixture
def memory(monkeypatch, tmp_path):
    """The folder of remembered digests, below a home of its own; small files are remembered too."""
    monkeypatch.setattr(digests, "LEAST_BYTES", 0)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home" / ".cache" / "cascade" / "digests"


def ask(path, result):
    return remembered("sum", [path], lambda: result)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "file"
    path.write_text("contents")
    return path


def test_what_was_computed_is_remembered(memory, file):
    assert ask(file, RIGHT) == ask(file, CHANGED) == RIGHT


@pytest.mark.parametrize(
    "entry", ["", "a" * 63, "a" * 65, "A" * 64, "g" * 64, "a" * 64 + "\n", "\u00e4"]
)
def test_an_entry_that_is_no_digest_is_computed_again(memory, file, entry):
    ask(file, RIGHT)
    (known,) = memory.iterdir()
    known.write_text(entry, encoding="utf-8")
    assert ask(file, CHANGED) == CHANGED
    assert ask(file, RIGHT) == CHANGED


def test_another_version_of_the_digest_is_computed_again(memory, file, monkeypatch):
    ask(file, RIGHT)
    monkeypatch.setattr(digests, "VERSION", digests.VERSION + 1)
    assert ask(file, CHANGED) == CHANGED


def test_many_write_one_file_at_once(tmp_path):
    path, failed = tmp_path / "file", []
    texts = [str(i) * 10_000 for i in range(4)]

    def write(text):
        for _ in range(50):
            try:
                write_whole(path, text)
                assert path.read_text() in texts
            except (OSError, AssertionError) as error:
                failed.append(error)

    writers = [threading.Thread(target=write, args=(text,)) for text in texts]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert not failed
    assert list(tmp_path.iterdir()) == [path]
