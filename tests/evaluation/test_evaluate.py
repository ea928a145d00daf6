"""`cascade evaluate`: what it measures, that it goes on, and what it refuses."""

import functools
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from processes import cluster, run_processes
from tiny_cascade import stage_config, trained

from cascade.cli import main
from cascade.evaluation import drawn, evaluate, job, page, record
from cascade.evaluation.evaluate import Against, score_bundles, score_folders
from cascade.evaluation.features import Extractor
from cascade.evaluation.moments import Moments, frechet_distance
from cascade.images import read_image, save_png
from cascade.parallel.mesh import all_devices
from cascade.pipeline import Cascade, load
from cascade.text.encoders import minilm

TESTS = Path(__file__).parents[1]
PATHS = (TESTS.parent, TESTS, TESTS / "evaluation")
RNG = np.random.default_rng(0)
TEXTS = [f"{i:02d}.txt" for i in range(24)]


def quarters(mesh):
    """In the place of EfficientNet: the mean colours of a picture's quarters, 12 features."""

    def network(unit, x):
        side = x.shape[1] // 2
        return x.reshape(len(x), 2, side, 2, side, 3).mean((2, 4)).reshape(len(x), 12)

    return Extractor("quarters", network, lambda pictures: pictures / 255.0, {}, "1", mesh)


@functools.cache
def loaded(bundle, text_weights, mesh):
    """Once for all tests, and its programs with it."""
    return load(bundle, text_weights=text_weights, mesh=mesh)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(job, "efficientnet_lite0", quarters)
    monkeypatch.setattr(drawn, "load", loaded)
    monkeypatch.setattr(job, "minilm", functools.cache(minilm))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Bundles that draw 8×8, enlarge that to 16×16, or both; and 24 captioned pictures, 16×16."""
    folder = tmp_path_factory.mktemp("evaluate")
    text, encoder = {"name": "minilm", "max_length": 8, "weights": ""}, minilm(8, "")
    stages = [
        trained(stage_config(*sides, text_width=384, text_length=8)) for sides in ((8, 0), (16, 8))
    ]
    made = {"bundle": stages[:1], "enlarger": stages[1:], "both": stages}
    for name, those in made.items():
        Cascade(those, text, encoder).save(folder / name)
    Cascade(stages[:1], text, encoder).save(folder / "half", dtype="bfloat16")
    for i in range(24):
        colours = RNG.integers(0, 256, (4, 4, 3)).astype(np.uint8)
        save_png(folder / "real" / f"{i:02d}.png", np.kron(colours, np.ones((4, 4, 1), np.uint8)))
        (folder / "real" / f"{i:02d}.txt").write_text(f"thing {chr(97 + i)}\nanother\n")
    return folder


def against(folder, out, **changes):
    return Against(str(folder / "real"), out, **changes)


def scored(folder, out, num=12, **changes):
    ways = {"steps": [2], "guidance": [1.0], "batch_size": 4} | changes
    return score_bundles(against(folder, out), [folder / "bundle"], num=num, **ways)


def metrics(out):
    return json.loads((out / "metrics.json").read_text())["rows"]


WAY = "guidance-1_steps-2_sampler-ancestral"


def test_numbers_are_those_of_what_is_drawn(folder, tmp_path):
    table = scored(folder, tmp_path / "out")
    found, real = metrics(tmp_path / "out")
    prompts = [f"thing {chr(97 + i)}" for i in np.random.default_rng(0).permutation(24)[:12]]
    pipe = loaded(folder / "bundle", text_weights="", mesh=all_devices())
    pictures = pipe(prompts, seed=0, steps=2, guidance=1.0, batch_size=4, progress=False)
    ours = pictures.reshape(12, 2, 4, 2, 4, 3).mean((2, 4)).reshape(12, 12) / 255.0
    theirs = [read_image(folder / "real" / f"{i:02d}.png") for i in range(24)]
    theirs = np.stack(theirs).reshape(24, 2, 8, 2, 8, 3).mean((2, 4)).reshape(24, 12) / 255.0
    wanted = frechet_distance(Moments.of(ours), Moments.of(theirs))
    np.testing.assert_allclose(found["FID-quarters"], wanted, rtol=1e-3)
    assert found["pictures"] == found["asked"] == real["pictures"] == 12 and found["names"] == 24
    assert found["s/picture"] > 0 and real["steps"] == "" and real["guidance"] == "real halves"
    shown = read_image(tmp_path / "out" / WAY / "pictures" / "0003.png")
    assert (shown == pictures[3]).all()
    html = (tmp_path / "out" / "report.html").read_text()
    assert all(a.startswith("data:image/") for a in re.findall(r"src=\"([^\"]*)\"", html))
    assert table == (tmp_path / "out" / "metrics.md").read_text().rstrip("\n")
    assert "12 pictures are no more than the 12 features" in table and "no more than" in html
    assert prompts[0] in html and "FID-quarters" in table and (tmp_path / "out/sheet.png").is_file()


class Killed(Exception):
    pass


def test_a_run_that_was_stopped_goes_on(folder, tmp_path, monkeypatch):
    """The same numbers to the bit as without a break, and nothing drawn twice."""
    scored(folder, tmp_path / "whole")
    monkeypatch.setattr(record, "SECONDS", 0.0)  # every batch is a part
    add, batches = record.Record.add, []

    def counted(self, **arrays):
        add(self, **arrays)
        batches.append(self.folder.name)
        if len(batches) == stop:
            raise Killed

    monkeypatch.setattr(record.Record, "add", counted)
    for stop in (1, 3, None):
        if stop is None:
            scored(folder, tmp_path / "out")
        else:
            with pytest.raises(Killed):
                scored(folder, tmp_path / "out")
    assert batches.count(WAY) == 3 and batches.count("real") == 2
    whole, resumed = (metrics(tmp_path / name) for name in ("whole", "out"))
    for row in (*whole, *resumed):
        row.pop("s/picture", None)
    assert whole == resumed
    # What a kill left half-written counts for nothing, and what follows a gap is drawn again.
    parts = sorted((tmp_path / "out" / WAY).glob("*.safetensors"))
    assert [part.name for part in parts] == [f"{i:08d}.safetensors" for i in (0, 4, 8)]
    parts[1].unlink()
    (tmp_path / "out" / WAY / ".half.tmp").write_bytes(b"half")
    batches.clear()
    scored(folder, tmp_path / "out")
    assert batches == [WAY, WAY]
    assert metrics(tmp_path / "out")[0]["FID-quarters"] == whole[0]["FID-quarters"]


def test_more_pictures_and_other_ways_use_what_is_there(folder, tmp_path, monkeypatch):
    scored(folder, tmp_path)
    asked = []
    draw = Cascade.draw_batches
    monkeypatch.setattr(
        Cascade,
        "draw_batches",
        lambda self, prompts, **how: (
            asked.append((how["first_index"], len(prompts), how["steps"]))
            or draw(self, prompts, **how)
        ),
    )
    scored(folder, tmp_path, num=26)
    scored(folder, tmp_path, num=10, steps=[2, 3])
    assert asked == [(12, 14, 2), (0, 10, 3)]
    rows = metrics(tmp_path)
    assert (tmp_path / "report.html").read_text().count("<img") == 10 * 3  # and real ones
    assert [row["pictures"] for row in rows] == [10, 10, 12]
    assert [row["steps"] for row in rows] == ["2", "3", ""]


def test_a_changed_setting_is_told(folder, tmp_path):
    scored(folder, tmp_path)
    with pytest.raises(evaluate.UserError, match="seed was 0 and is 1"):
        score_bundles(against(folder, tmp_path, seed=1), [folder / "bundle"], num=12)
    with pytest.raises(evaluate.UserError, match="resolution was 8 and is 4"):
        score_bundles(against(folder, tmp_path, resolution=4), [folder / "bundle"], num=12)


def test_captions_come_again_where_there_are_fewer(folder, tmp_path):
    begun = evaluate.Job(against(folder, tmp_path), 10)
    taken = [next(told) for told in [begun.captions()] for _ in range(30)]
    assert [place for place, _ in taken] == [*range(24), *range(6)]
    assert len({caption for _, caption in taken}) == 24 and taken[0] == taken[24]


def test_sets_are_told_apart_in_few_words():
    sets = [
        {"by": by, "guidance": "2", "steps": steps, "sampler": "ddim"}
        for by, steps in (("teacher", "64/30"), ("student", "8/4"))
    ]
    assert page.told_apart(sets) == ["teacher, steps 64/30", "student, steps 8/4"]
    assert page.told_apart(sets[:1]) == ["teacher, guidance 2, steps 64/30, ddim"]


def test_larger_drawings_are_shrunk(folder, tmp_path):
    score_bundles(
        against(folder, tmp_path, resolution=4),
        [folder / "bundle"],
        num=10,
        steps=[2],
        batch_size=4,
    )
    kept = json.loads((tmp_path / "real" / "settings.json").read_text())
    assert kept["resolution"] == 4 and metrics(tmp_path)[0]["pictures"] == 10


def test_bundles_are_compared_in_one_table(folder, tmp_path, monkeypatch):
    """Each by the same captions, with the numbers that it has alone; and nothing is drawn twice."""
    bundles = [folder / "bundle", folder / "half"]
    ways = {"steps": [2], "guidance": [1.0], "batch_size": 4, "num": 12}
    score_bundles(against(folder, tmp_path / "both"), bundles, **ways)
    scored(folder, tmp_path / "one")
    one, half, real = metrics(tmp_path / "both")
    assert [row["bundle"] for row in (one, half, real)] == [*map(str, bundles), "real halves"]
    assert one["FID-quarters"] == metrics(tmp_path / "one")[0]["FID-quarters"]
    assert one["FID-quarters"] != half["FID-quarters"] and one["names"] == half["names"] == 24
    monkeypatch.setattr(Cascade, "draw_batches", None)
    score_bundles(against(folder, tmp_path / "both"), bundles[::-1], **ways)
    again = metrics(tmp_path / "both")
    assert [again[1].pop("bundle"), again[1]] == [one.pop("bundle"), one]


def test_who_draws_larger_is_shrunk_only_if_told_so(folder, tmp_path):
    bundles = [folder / "bundle", folder / "both"]
    with pytest.raises(evaluate.UserError, match="8 pixels a side and another 16; give --resol"):
        score_bundles(against(folder, tmp_path), bundles, num=10)
    assert list(tmp_path.iterdir()) == []


def test_a_stage_alone_enlarges_real_pictures(folder, tmp_path):
    """Shrunk to what it takes, by the path of `cascade upscale`; over and over where they end."""
    real = against(folder, tmp_path / "out", real=10)
    ways = {"steps": [1], "guidance": [1.0], "aug_level": [0.1], "batch_size": 4}
    score_bundles(real, [folder / "enlarger"], num=13, stage=0, **ways)
    row = metrics(tmp_path / "out")[0]
    assert row["stage"] == "0" and row["aug_level"] == "0.1" and row["pictures"] == 13
    names = [int(i) for i in np.random.default_rng(0).permutation(24)[:10]]
    pictures = np.stack([read_image(folder / "real" / f"{i:02d}.png") for i in names + names[:3]])
    pipe = loaded(folder / "enlarger", text_weights="", mesh=all_devices())
    how = {"steps": 1, "guidance": 1.0, "aug_level": 0.1, "batch_size": 4, "progress": False}
    prompts = [f"thing {chr(97 + i)}" for i in names + names[:3]]
    wanted = pipe.upscale(pictures, prompts, 0, 0, **how)
    kept = tmp_path / "out/stage-0_guidance-1_steps-1_sampler-ancestral_aug_level-0.1/pictures"
    for i in (0, 5, 12):
        np.testing.assert_array_equal(read_image(kept / f"{i:04d}.png"), wanted[i])
    assert not (wanted[0] == wanted[10]).all()  # the same picture, other noise
    assert row["top-1"] is not None and row["asked"] == 13


def test_a_stage_is_given_pictures_as_large_as_it_draws(folder, tmp_path):
    """However small they are compared."""
    shutil.copytree(folder / "real", tmp_path / "real")
    for i in range(24):
        save_png(tmp_path / "real" / f"small{i}.png", np.zeros((8, 8, 3), np.uint8))
        (tmp_path / "real" / f"small{i}.txt").write_text("a small thing\n")
    ways = {"steps": [1], "guidance": [1.0], "aug_level": [0.1], "batch_size": 4}
    real = against(tmp_path, tmp_path / "out", resolution=8)
    score_bundles(real, [folder / "enlarger"], num=10, stage=0, **ways)
    drawn, halves = metrics(tmp_path / "out")
    assert drawn["pictures"] == 10 and halves["pictures"] == 12 and drawn["names"] == 24


def test_pictures_made_elsewhere(folder, tmp_path):
    """The real pictures themselves score as well as can be; sheets among drawings are left out."""
    for i in range(24):
        picture = read_image(folder / "real" / f"{i:02d}.png")
        save_png(tmp_path / "made" / f"{i}.png", picture, {"prompt": f"thing {chr(97 + i)}"})
    save_png(tmp_path / "made" / "sheet-0.png", np.zeros((40, 60, 3), np.uint8))
    score_folders(against(folder, tmp_path / "out"), [str(tmp_path / "made")])
    same, _ = metrics(tmp_path / "out")
    assert same["FID-quarters"] < 1e-6 and same["pictures"] == 24
    assert same["precision-quarters"] == same["recall-quarters"] == same["top-1"] == 1.0
    np.testing.assert_allclose(same["alignment"], 1.0, atol=1e-6)
    for i in range(12):  # of another size, and nothing tells what they show
        save_png(tmp_path / "bare" / f"{i}.png", RNG.integers(0, 256, (20, 24, 3), np.uint8))
    with pytest.raises(evaluate.UserError, match="24×20"):
        score_folders(against(folder, tmp_path / "out2"), [str(tmp_path / "bare")])
    score_folders(against(folder, tmp_path / "out2", resolution=16), [str(tmp_path / "bare")])
    other, _ = metrics(tmp_path / "out2")
    assert "top-1" not in other and other["FID-quarters"] > 0.1


@pytest.mark.parametrize("captioned", [True, False])
def test_as_many_count_as_are_asked_for(captioned, folder, tmp_path):
    """Whatever was measured before."""
    made = tmp_path / "made"
    shutil.copytree(folder / "real", made, ignore=None if captioned else lambda *_: TEXTS)
    rows = {}
    for out, nums in (("once", [12]), ("again", [None, 12])):
        for num in nums:
            score_folders(against(folder, tmp_path / out), [str(made)], num=num)
        rows[out] = metrics(tmp_path / out)[0]
    assert rows["once"]["pictures"] == 12 and rows["once"] == rows["again"]
    assert ("top-1" in rows["once"]) == captioned


def test_nobody_elses_files_are_touched(folder, tmp_path):
    """A bundle lies where the real pictures' features would go."""
    bundle = tmp_path / "runs" / "real"
    shutil.copytree(folder / "bundle", bundle)
    held = {f: f.read_bytes() for f in bundle.rglob("*") if f.is_file()}
    assert any(f.suffix == ".safetensors" for f in held)
    with pytest.raises(evaluate.UserError, match="is no evaluation's; give another --out"):
        scored(folder, tmp_path / "runs")
    assert {f: f.read_bytes() for f in bundle.rglob("*") if f.is_file()} == held
    mine = tmp_path / "out" / "real" / "weights.safetensors"
    scored(folder, tmp_path / "out")
    mine.write_bytes(b"put here since")
    scored(folder, tmp_path / "out")
    assert mine.read_bytes() == b"put here since"


def said(*arguments):
    result = CliRunner().invoke(main, ["evaluate", *map(str, arguments)])
    assert result.exit_code == 2, (result.output, result.exception)
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in result.output
    return lines[0]


@pytest.mark.parametrize(
    "arguments, wanted",
    [
        (["--bundle", "bundle", "--pictures", "real"], "not both"),
        ([], "either --bundle, or --pictures"),
        (["--pictures", "real", "--steps", "3"], "--steps says how a --bundle draws"),
        (["--pictures", "real", "--stage", "1"], "--stage says how a --bundle draws"),
        (["--bundle", "bundle", "--stage", "1"], "Stage 1 can't enlarge"),
        (["--pictures", "none"], "There is no folder"),
        (["--bundle", "real"], "cascade.json"),
        (["--bundle", "bundle", "--num", "3"], "at least 10"),
        (["--bundle", "bundle", "--batch-size", "0"], "--batch-size is 0"),
        (["--bundle", "bundle", "--real", "99"], "fewer than 99"),
        (["--bundle", "bundle", "--steps", "2,x"], "isn't a list of ints"),
        (["--bundle", "bundle", "--steps", "2/2"], "steps has 2 values and one stage"),
        (["--bundle", "bundle", "--sampler", "none"], "sampler"),
        (["--bundle", "bundle", "--resolution", "9"], "1 to 8"),
        (["--bundle", "bundle", "--resolution", "0"], "1 to 8"),
        (["--bundle", "bundle", "--among-all"], "config's two splits"),
        (["--bundle", "bundle", "--inception", "real/00.png"], "safetensors"),
        (["--bundle", "bundle", "--config.seed=1"], "changes a config"),
        (["--bundle", "bundle", "--source", "bundle"], "holds no picture"),
        (["--bundle", "bundle", "--source", "bare"], "caption"),
        (["--bundle", "bundle", "--source", "small"], "None of 12 records is usable"),
        (["--bundle", "bundle", "--source", "mixed"], "1 of 13 pictures"),
        (["--bundle", "bundle", "--out", "bundle/cascade.json"], "Can't write"),
    ],
)
def test_what_is_wrong_is_said(arguments, wanted, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("bundle", "real"):
        (tmp_path / name).symlink_to(folder / name)
    for i in range(12):
        save_png(tmp_path / "bare" / f"{i}.png", np.zeros((8, 8, 3), np.uint8))
        save_png(tmp_path / "small" / f"{i}.png", np.zeros((4, 4, 3), np.uint8))
        (tmp_path / "small" / f"{i}.txt").write_text("a small thing\n")
    shutil.copytree(tmp_path / "small", tmp_path / "mixed")
    save_png(tmp_path / "mixed" / "large.png", np.zeros((9, 9, 3), np.uint8))
    (tmp_path / "mixed" / "large.txt").write_text("a larger thing\n")
    assert wanted in said("--source", "real", "--out", "out", *arguments)
    assert not (tmp_path / "out" / "metrics.json").exists()


def test_what_was_refused_does_not_stand_in_the_way(folder, tmp_path):
    for i in range(12):
        side = 8 if i == 0 else 4
        save_png(tmp_path / "some" / f"{i}.png", np.full((side, side, 3), 20 * i, np.uint8))
        (tmp_path / "some" / f"{i}.txt").write_text("a thing\n")
    asked = [
        "--pictures",
        folder / "real",
        "--source",
        tmp_path / "some",
        "--out",
        tmp_path / "out",
    ]
    assert "1 of 12 pictures" in said(*asked, "--resolution", 8)
    result = CliRunner().invoke(main, ["evaluate", *map(str, asked), "--resolution", "4"])
    assert result.exit_code == 0, result.output


TOGETHER = """
import sys
from cascade.data.record_files import to_example, write_file
from cascade.evaluation import job
from test_evaluate import quarters
from cascade.cli import main
job.efficientnet_lite0 = quarters
folder, out = sys.argv[1:]
main(["evaluate", "--bundle", f"{folder}/bundle", "--source", f"{folder}/real", "--out", out,
      "--num", "10", "--steps", "2", "--guidance", "1", "--batch-size", "4", "--mesh", "data=2"])
"""


@pytest.mark.slow
def test_two_processes_find_what_one_does(folder, tmp_path):
    scored(folder, tmp_path / "one", num=10)
    command = ["-c", TOGETHER, folder, tmp_path / "two"]
    path = {"PYTHONPATH": ":".join(str(p) for p in PATHS)}
    places = cluster(2)
    codes, outputs = run_processes([command] * 2, environment=lambda i: places(i) | path)
    assert codes == [0, 0], outputs
    assert "FID-quarters" in outputs[0].out and not outputs[1].out
    one, two = (metrics(tmp_path / name) for name in ("one", "two"))
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        np.testing.assert_allclose(a["FID-quarters"], b["FID-quarters"], rtol=1e-3)
        assert a["pictures"] == b["pictures"] and a.get("top-5") == b.get("top-5")
