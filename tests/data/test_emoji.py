"""The emoji builder: splits, captions, scenes, and a round trip through ArrayRecord files."""

import io
import json
import re
import subprocess
import sys
from inspect import signature
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from cascade.commands.data import build
from cascade.data import prepare
from cascade.data.emoji import builder, drawings
from cascade.data.emoji.builder import DEFAULTS, Settings, heldout_split, plan
from cascade.data.emoji.captions import single_captions, with_article
from cascade.data.emoji.scenes import (
    GROUNDS,
    draw_scene,
    scene_captions,
    scene_json,
    scene_png,
)
from cascade.data.preprocess import decode
from cascade.data.sources import captions_of, tfds
from cascade.errors import UserError

SOLID = [("1F7E5", "twemoji"), ("1F7E9", "twemoji"), ("1F7E6", "twemoji")]
SOLID_NAMES = {"1F7E5": "a red square", "1F7E9": "a green square", "1F7E6": "a blue square"}


def read(folder, variant: str, split: str):
    return tfds(
        dataset=f"emoji/{variant}",
        data_dir=str(folder),
        split=split,
        image_key="image",
        caption_key="captions",
        template="{}",
    )


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The demo with a few scenes, small."""
    folder = tmp_path_factory.mktemp("data")
    prepare.build_emoji(folder, "demo", resolution=32, scenes=40, seed=1)
    return folder


@given(st.lists(st.integers(1, 0x1FFFF).filter(lambda p: p != 0xFE0F), min_size=1, max_size=5))
def test_canonical_ignores_case_padding_and_variation_selectors(points):
    plain = "-".join(f"{p:X}" for p in points)
    dressed = "-".join(f"{p:06x}-fe0f" for p in points)
    assert drawings.canonical(dressed) == plain == drawings.canonical(plain)


def test_the_demo_is_whole():
    phrases = drawings.demo_phrases()
    assert 48 <= len(phrases) <= 64
    assert len(set(phrases.values())) == len(phrases)
    assert phrases.keys() <= drawings.ideas().keys()
    assert phrases.keys() <= drawings.svg_paths("twemoji").keys()


def test_drawings_are_square_even_where_the_file_is_not():
    assert drawings.render("twemoji", "1F349", 32).shape == (32, 32, 4)


@pytest.mark.parametrize(
    ("label", "phrase"),
    [
        ("red apple", "a red apple"),
        ("elephant", "an elephant"),
        ("glasses", "glasses"),
        ("bus", "a bus"),
        ("bread", "bread"),
        ("flag: Japan", "flag: Japan"),
        ("bowl with chopsticks", "a bowl with chopsticks"),
        ("T-Rex", "T-Rex"),
        ("up arrow", "an up arrow"),
        ("unicorn", "a unicorn"),
    ],
)
def test_article(label, phrase):
    assert with_article(label) == phrase


def test_captions_are_few_distinct_and_plainest_first():
    for idea in drawings.ideas().values():
        captions = single_captions(idea, "twemoji", with_article(idea.label))
        assert captions[0] == with_article(idea.label)
        assert len(set(captions)) == len(captions) <= 6
        assert all(c.strip() == c and c for c in captions)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("variant", ["demo", "full"])
def test_split_by_idea_and_style(variant, seed):
    settings = DEFAULTS[variant]._replace(seed=seed)
    split = heldout_split(settings)
    train, heldout = set(split["train"]), set(split["heldout"])
    assert train and heldout and not train & heldout
    assert split == heldout_split(settings)
    assert heldout != set(heldout_split(settings._replace(seed=seed + 1))["heldout"])
    # Every held-out idea is known in another style.
    assert {d.hexcode for d in heldout} <= {d.hexcode for d in train}
    if variant == "demo":
        assert {d.hexcode for d in train} == drawings.demo_phrases().keys()


def test_scenes_of_train_show_no_heldout_drawing_and_heldout_ones_do():
    items = plan(Settings("full", resolution=64, scenes=200, seed=0))
    heldout = {tuple(i.shows) for i in items["heldout"] if isinstance(i.shows, builder.Single)}
    scenes = {
        split: [i.shows for i in items[split] if not isinstance(i.shows, builder.Single)]
        for split in items
    }
    assert len(scenes["train"]) == 200 and len(scenes["heldout"]) == 10
    assert not any(heldout & set(scene.drawings) for scene in scenes["train"])
    assert all(heldout & set(scene.drawings) for scene in scenes["heldout"])
    keys = [i.key for split in items.values() for i in split]
    assert len(set(keys)) == len(keys)


def test_a_small_set_is_of_known_drawings_in_scenes_of_its_own():
    items = plan(Settings("small", resolution=64, scenes=200, seed=0))
    known = {tuple(item.shows) for item in items["singles"]}
    assert all(isinstance(item.shows, builder.Single) for item in items["singles"])
    assert {style for _, style in known} == {"twemoji"}
    scenes = {split: {item.shows for item in items[split]} for split in ("scenes", "heldout")}
    assert len(scenes["scenes"]) == 200 and len(scenes["heldout"]) == 10
    assert not scenes["scenes"] & scenes["heldout"]
    assert {d for scene in set.union(*scenes.values()) for d in scene.drawings} <= known


def test_new_words_are_in_no_caption():
    """What `bench/claims/language_model.py` asks for, of things that every variant but demo has."""
    file = Path(__file__).parents[2] / "bench" / "claims" / "new_words.tsv"
    rows = [line.split("\t") for line in file.read_text(encoding="utf-8").splitlines()[1:]]
    assert len(rows) >= 60
    phrases = builder.phrases_of("full")
    told = {
        caption
        for hexcode, idea in drawings.ideas().items()
        for style in drawings.STYLES
        for caption in single_captions(idea, style, phrases[hexcode])
    }
    words = {word for caption in told for word in re.findall("[a-z]+", caption.lower())}
    known = {phrases[item.shows.hexcode] for item in plan(DEFAULTS["small"])["singles"]}
    for prompt, caption in rows:
        asked = set(re.findall("[a-z]+", prompt.lower())) - set(re.findall("[a-z]+", caption))
        assert caption in known and asked - {"a", "an"} and not (asked - {"a", "an"}) & words


@given(seed=st.integers(0, 10_000), resolution=st.integers(16, 128))
def test_boxes_lie_within_and_apart(seed, resolution):
    scene = draw_scene(np.random.default_rng(seed), SOLID, resolution)
    for left, top, right, bottom in scene.boxes:
        assert 0 <= left < right <= resolution and 0 <= top < bottom <= resolution
    taken = np.zeros((resolution, resolution), int)
    for left, top, right, bottom in scene.boxes:
        taken[top:bottom, left:right] += 1
    assert (taken > 1).sum() <= resolution  # at most an edge, by rounding


@pytest.mark.parametrize("seed", range(30))
def test_scene_caption_and_json_agree_with_the_pixels(seed):
    scene = draw_scene(np.random.default_rng(seed), SOLID, 96)
    pixels = decode(scene_png(scene), (255, 255, 255)).astype(int)
    told = scene_json(scene)
    assert tuple(told["ground"]["rgb"]) == GROUNDS[scene.ground]
    np.testing.assert_array_equal(pixels[0, 0], GROUNDS[scene.ground])
    captions = scene_captions(scene, SOLID_NAMES)
    assert all(scene.ground in caption for caption in captions)
    centres = {}
    for thing in told["objects"]:
        name = SOLID_NAMES[thing["idea"]]
        own = drawings.render("twemoji", thing["idea"], 32)[16, 16, :3].astype(int)
        rows, columns = np.nonzero((np.abs(pixels - own) <= 2).all(-1))
        left, top, right, bottom = (edge * 96 for edge in thing["box"])
        assert left - 1 <= columns.min() and columns.max() <= right
        assert top - 1 <= rows.min() and rows.max() <= bottom
        centres[name] = (columns.mean(), rows.mean())
        assert all(name in caption for caption in captions)
        x, y = centres[name][0] / 96 - 0.5, centres[name][1] / 96 - 0.5
        fits = {
            "left": x < -0.1 and abs(y) < 0.06,
            "right": x > 0.1 and abs(y) < 0.06,
            "top": y < -0.1 and abs(x) < 0.06,
            "bottom": y > 0.1 and abs(x) < 0.06,
            "centre": max(abs(x), abs(y)) < 0.06,
        }
        assert fits[thing["place"]]
        spot = {"left": "on the left", "right": "on the right", "top": "at the top"}
        spot |= {"bottom": "at the bottom", "centre": "in the centre"}
        assert any(f"{name} {spot[thing['place']]}" in caption for caption in captions)
    if len(centres) == 2:
        (first, at_first), (second, at_second) = centres.items()
        for here, there, p, q in (
            (first, second, at_first, at_second),
            (second, first, at_second, at_first),
        ):
            assert (f"{here} to the left of {there}" in " ".join(captions)) <= (p[0] < q[0])
            assert (f"{here} to the right of {there}" in " ".join(captions)) <= (p[0] > q[0])
            assert (f"{here} above {there}" in " ".join(captions)) <= (p[1] < q[1])
            assert (f"{here} below {there}" in " ".join(captions)) <= (p[1] > q[1])


def test_round_trip(built):
    train, heldout = read(built, "demo", "train"), read(built, "demo", "heldout")
    assert len(train) == 64 + 40 and len(heldout) == 16 + 2
    records = [train[i] for i in range(len(train))]
    phrases = drawings.demo_phrases()
    singles = {r["key"]: r for r in records if r["key"].startswith("twemoji-")}
    assert len(singles) == 64
    for key, record in singles.items():
        hexcode = key.removeprefix("twemoji-")
        assert record["captions"][0] == phrases[hexcode]
        pixels = np.asarray(Image.open(io.BytesIO(record["image"])).convert("RGBA"))
        np.testing.assert_array_equal(pixels, drawings.render("twemoji", hexcode, 32))
    assert list(captions_of(train)) == [c for r in records for c in r["captions"]]
    scenes = [r for r in records if r["key"].startswith("scene-")]
    assert scenes == [r for r in records if r["scene"]]
    assert all(Image.open(io.BytesIO(r["image"])).size == (32, 32) for r in scenes)


def test_scene_json_is_in_the_record(built):
    import tensorflow_datasets as library

    folder = built / "emoji" / "demo" / "1.0.0"
    decoders = {"image": library.decode.SkipDecoding()}
    source = library.builder_from_directory(folder).as_data_source("train", decoders=decoders)
    kinds = {}
    for record in source:
        kinds.setdefault(record["kind"].decode(), []).append(record["scene"].decode())
    assert set(kinds["single"]) == {""}
    told = [json.loads(scene) for scene in kinds["scene"]]
    assert all({"place", "box", "idea"} <= thing.keys() for t in told for thing in t["objects"])


def test_second_build_reuses_and_another_seed_is_refused(built):
    folder = built / "emoji" / "demo" / "1.0.0"
    before = {f.name: f.stat().st_mtime_ns for f in folder.iterdir()}
    again = prepare.build_emoji(built, "demo", resolution=32, scenes=40, seed=1)
    assert again == folder
    assert before == {f.name: f.stat().st_mtime_ns for f in folder.iterdir()}
    with pytest.raises(UserError, match="seed 1 instead of 2"):
        prepare.build_emoji(built, "demo", resolution=32, scenes=40, seed=2)
    assert "CC BY-SA 4.0" in (folder.parent / "NOTICE").read_text()


def test_two_builds_are_equal_and_processes_change_nothing(tmp_path, built):
    prepare.build_emoji(tmp_path, "demo", resolution=32, scenes=40, seed=1, processes=2)
    one, two = read(built, "demo", "train"), read(tmp_path, "demo", "train")
    assert [one[i] for i in range(len(one))] == [two[i] for i in range(len(two))]


def test_a_failed_build_leaves_nothing_to_read(tmp_path, monkeypatch):
    def stop(style, hexcode, size):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(builder, "render_png", stop)
        prepare.build_emoji(tmp_path, "demo", resolution=16)
    (tmp_path / "emoji" / "demo" / "incomplete.OLD_1.0.0").mkdir(parents=True, exist_ok=True)
    with pytest.raises(UserError, match="no data set"):
        read(tmp_path, "demo", "train")
    prepare.build_emoji(tmp_path, "demo", resolution=16)
    assert len(read(tmp_path, "demo", "train")) == 64
    assert not list((tmp_path / "emoji" / "demo").glob("incomplete*"))


def test_nothing_needs_tensorflow_or_jax(tmp_path):
    program = f"""
import sys
from cascade.data.prepare import build_emoji
from cascade.data.sources import tfds
build_emoji({str(tmp_path)!r}, "demo", resolution=16)
source = tfds("emoji/demo", {str(tmp_path)!r}, "train", "image", "captions", "{{}}")
assert source[0]["captions"]
assert "tensorflow" not in sys.modules and "jax" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "arguments",
    [{"variant": "tiny"}, {"resolution": 4}, {"resolution": 10**8}, {"scenes": -1}, {"seed": -1}],
)
def test_bad_arguments(tmp_path, arguments):
    with pytest.raises(UserError):
        prepare.build_emoji(tmp_path, **arguments)


def test_python_and_the_command_line_build_the_same_variant():
    options = {option.name: option.default for option in build.params}
    assert signature(prepare.build_emoji).parameters["variant"].default == options["variant"]


def test_unwritable_folder(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="Cannot write"):
        prepare.build_emoji(tmp_path / "file")
