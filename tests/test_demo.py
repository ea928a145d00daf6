"""`cascade demo` from end to end with shrunken networks; and what its report claims is so."""

import json
import re

import pytest
from one_level import ONE_LEVEL

from cascade import config, demo
from cascade.configs import smoke
from cascade.data.loader import make_source
from cascade.data.prepare import build_emoji
from cascade.errors import UserError


@pytest.fixture
def quick(one_device, monkeypatch):
    """Networks of one level and a few channels, of pictures half the size; four training steps,
    one sampling step."""
    full_size = demo.experiment

    def shrunken(stage, workdir, minutes):
        loaded = full_size(stage, workdir, minutes)
        halved = {k: loaded.stage[k] // 2 for k in ("resolution", "lowres_resolution")}
        smoke.shrink_stage(loaded.stage)
        loaded.stage.update(halved)
        level = {key.removeprefix("stage.network."): value for key, value in ONE_LEVEL.items()}
        loaded.stage.network.update({**level, "strides": (2,)})
        loaded.stage.crop_resolution = 32 if loaded.stage.lowres_resolution else 0
        loaded.stage.sampling.steps = 1
        loaded.train.steps, loaded.train.batch_size, loaded.train.log_every = 4, 8, 2
        loaded.train.learning_rate.update(decay_steps=4, warmup_steps=1)
        return loaded

    monkeypatch.setattr(demo, "experiment", shrunken)


def test_it_draws_reports_and_reuses(quick, tmp_path, capsys, monkeypatch):
    demo.run(tmp_path, minutes=1)
    said = capsys.readouterr().out
    command = re.search(r"Draw your own: (cascade sample .*)", said)[1]
    assert str(tmp_path / "bundle") in command
    html = (tmp_path / "report.html").read_text()
    assert html.count("<figure") == 64 + 8 and "http" not in re.sub(r"data:[^\"]*", "", html)
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 64 + 8 + 1
    recognised = re.search(r"(\d+) of 64 pictures", said)[1]
    assert html.count('class="missed"') == 64 - int(recognised)

    written = (tmp_path / "report.html").stat().st_mtime_ns
    monkeypatch.setattr(demo, "draw", lambda *_: pytest.fail("drew again"))
    demo.run(tmp_path, minutes=1)
    assert (tmp_path / "report.html").stat().st_mtime_ns == written
    rows = json.loads((tmp_path / "parts.json").read_text())["rows"]
    assert set(rows) == {"build the data", "train base", "train sr", "sample"}


@pytest.fixture(scope="module")
def captions(tmp_path_factory):
    """Every caption the demo trains on."""
    folder = tmp_path_factory.mktemp("data")
    build_emoji(folder, variant="demo")
    section = config.load("configs/emoji/demo_base.py").data
    section.source.data_dir = str(folder)
    source = make_source(section, train=True)
    return [caption for index in range(len(source)) for caption in source.captions(index)]


def words(text):
    return set(re.findall(r"[a-z]+", text.lower()))


def test_the_unseen_prompts_are_unseen(captions):
    known = set().union(*map(words, captions))
    assert not {*demo.RECOMBINED, *demo.NEW_WORDS} & set(captions)
    assert all(words(prompt) <= known for prompt in demo.RECOMBINED)
    assert all(words(prompt) - known for prompt in demo.NEW_WORDS)


@pytest.mark.parametrize("minutes", [0, -1, float("nan"), float("inf")])
def test_bad_minutes(minutes, tmp_path):
    with pytest.raises(UserError, match="minutes"):
        demo.run(tmp_path, minutes=minutes)


@pytest.mark.parametrize("minutes", [0.01, 1, 60])
def test_steps_scale_with_minutes(minutes, tmp_path):
    full = config.load("configs/emoji/demo_base.py").train.steps
    loaded = demo.experiment("base", tmp_path, minutes)
    assert loaded.train.steps == max(round(full * minutes / 15), 2)
    assert loaded.train.learning_rate.warmup_steps < loaded.train.steps


@pytest.mark.parametrize("written", ["{bad", "[]", '{"rows": 3, "notes": {}}'])
def test_damaged_times_are_refused(tmp_path, written):
    (tmp_path / "parts.json").write_text(written)
    with pytest.raises(UserError, match=r"parts\.json is damaged .* remove it"):
        demo.Parts(tmp_path / "parts.json")
