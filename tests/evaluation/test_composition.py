"""Is what a scene names where it says? Real scenes, spoiled ones, and others' captions."""

import io
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from cascade.data.emoji import drawings as emoji
from cascade.data.emoji.scenes import GROUNDS, draw_scene, scene_captions, scene_json, scene_png
from cascade.data.mixture import Mixture
from cascade.data.preprocess import resized
from cascade.errors import UserError
from cascade.evaluation import composition as c
from cascade.evaluation import evaluate, job
from cascade.evaluation.features import Extractor
from cascade.evaluation.pictures import Data
from cascade.images import save_png
from cascade.parallel.mesh import all_devices

STYLE = "twemoji"
SHOWABLE = set(c.known_ideas(STYLE))
KNOWN = [idea for idea in emoji.demo_phrases() if idea in SHOWABLE][:40]


def drawings_of(ideas):
    return c.Drawings([emoji.render(STYLE, idea, c.RENDERED) for idea in ideas], ideas)


@pytest.fixture(scope="module")
def drawings():
    return drawings_of(KNOWN)


@pytest.fixture(scope="module")
def drawn():
    """30 scenes and their pictures, 128×128."""
    rng, pairs = np.random.default_rng(0), [(idea, STYLE) for idea in KNOWN]
    scenes = [draw_scene(rng, pairs, 128) for _ in range(30)]
    images = [Image.open(io.BytesIO(scene_png(scene))).convert("RGB") for scene in scenes]
    return scenes, np.stack([np.asarray(image) for image in images])


@pytest.fixture(scope="module")
def small(drawn):
    """What is asked of them, and they as a base stage would draw them, 64×64."""
    told = [c.read_scene(json.dumps(scene_json(scene))) for scene in drawn[0]]
    return told, np.stack([resized(picture, 64, 64) for picture in drawn[1]])


def test_real_scenes_are_right(drawings, small):
    told, pictures = small
    found = c.composition(pictures, told, drawings)
    assert found["object top-1"] >= 0.98 and found["object top-5"] == found["ground"] == 1.0
    assert found["objects"] == sum(len(scene.objects) for scene in told)
    half = c.composition(pictures, [s if i % 2 else None for i, s in enumerate(told)], drawings)
    assert 0 < half["objects"] < found["objects"] and c.composition(pictures, [None] * 30, {}) == {}


def test_swapped_drawings_are_wrong(drawings, small):
    several = [i for i, scene in enumerate(small[0]) if len(scene.objects) > 1]
    turned = [small[0][i] for i in several]
    turned = [scene._replace(objects=scene.objects[1:] + scene.objects[:1]) for scene in turned]
    found = c.composition(small[1][several], turned, drawings)
    assert found["object top-1"] < 0.02 and found["all objects"] == 0 and found["ground"] == 1


def test_others_scenes_are_found_by_chance(drawings, small):
    found = c.composition(small[1], small[0][1:] + small[0][:1], drawings)
    assert found["object top-1"] < 0.12 and found["ground"] < 0.4


def test_a_blank_picture_is_chance(drawings):
    """Whatever is asked of it, one idea of all is the nearest, and five are among five."""
    blank = np.full((len(KNOWN), 64, 64, 3), GROUNDS["blue"], np.uint8)
    asked = [c.Scene("blue", ((idea, STYLE),), ((0.2, 0.2, 0.6, 0.6),)) for idea in KNOWN]
    found = c.composition(blank, asked, drawings)
    assert found["object top-1"] <= 1 / len(KNOWN) and found["object top-5"] <= 5 / len(KNOWN)
    assert found["ground"] == 1


def test_a_little_beside_its_place_is_there(drawings, small):
    told, pictures = small
    one = [i for i, scene in enumerate(told) if len(scene.objects) == 1]
    for pixels, low, high in ((2, 0.95, 1.0), (16, 0.0, 0.3)):
        moved = np.roll(pictures[one], pixels, axis=(1, 2))
        found = c.composition(moved, [told[i] for i in one], drawings)
        assert low <= found["object top-1"] <= high


def test_distances_are_those_of_drawings_laid_on_the_ground(drawings):
    rng = np.random.default_rng(1)
    ground, crops = rng.uniform(0, 255, 3), rng.uniform(0, 255, (3, 16, 16, 3))
    wanted = []
    for idea in drawings.ideas:
        rgba = emoji.render(STYLE, idea, c.RENDERED).astype(np.float64)
        laid = ground + rgba[..., 3:] / 255 * (rgba[..., :3] - ground)
        laid = laid.reshape(16, 8, 16, 8, 3).mean((1, 3))
        wanted.append(min(((crop - laid) ** 2).sum() for crop in crops))
    np.testing.assert_allclose(drawings.distances(crops, ground), wanted, rtol=1e-6)


def test_ideas_of_several_styles_are_found_by_any():
    """A caption doesn't say which."""
    shown = [("twemoji", h) for h in KNOWN[:5]] + [("openmoji", h) for h in KNOWN[4:9]]
    both = c.Drawings([emoji.render(*each, 32) for each in shown], [h for _, h in shown])
    assert len(both.ideas) == 9
    for style, idea in shown:
        rgba = emoji.render(style, idea, 32).astype(np.float64)
        laid = 200.0 + rgba[..., 3:] / 255 * (rgba[..., :3] - 200.0)
        assert both.rank(laid[None], np.full(3, 200.0), idea) == 0
    with pytest.raises(UserError, match="none of the 9 known drawings"):
        both.rank(laid[None], np.zeros(3), "FFFF")


def test_thumbnails_are_pictures():
    pictures = np.random.default_rng(2).integers(0, 256, (8, 96, 96, 3)).astype(np.uint8)
    shrink = c.thumbnails(all_devices())
    assert (np.asarray(shrink(pictures[:, :64, :64])) == pictures[:, :64, :64]).all()
    smaller = np.asarray(shrink(pictures))
    assert smaller.shape == (8, 64, 64, 3) and smaller.dtype == np.uint8
    np.testing.assert_allclose(smaller.mean(), pictures.mean(), atol=1)


ODD = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["ground", "objects", "name", "box", "idea"]), inner)
    ),
    max_leaves=8,
)


@given(ODD)
def test_other_texts_tell_no_scene(value):
    assert c.read_scene(json.dumps(value)) is None


def test_a_scene_is_read_as_it_was_written(drawn):
    for scene in drawn[0]:
        told = c.read_scene(json.dumps(scene_json(scene)))
        assert told.ground == scene.ground and told.objects == scene.drawings
        np.testing.assert_allclose(np.array(told.boxes) * 128, scene.boxes)
    spoiled = scene_json(drawn[0][0])
    spoiled["objects"][0]["box"] = [0.5, 0.5, 0.5, 1.5]
    assert c.read_scene(json.dumps(spoiled)) is None and c.read_scene("") is None


class Records:
    """A source of scenes, and of one picture that tells none."""

    def __init__(self, scenes):
        phrases = emoji.demo_phrases()
        self.told = [(scene_captions(s, phrases), json.dumps(scene_json(s))) for s in scenes]
        self.told.append((["a thing"], ""))
        other = scenes[0]._replace(ground="brown")
        self.images = [scene_png(scene) for scene in [*scenes, other]]

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        captions, scene = self.told[i]
        return {"image": self.images[i], "captions": captions, "key": str(i), "scene": scene}

    def key(self, i):
        return str(i)

    def captions(self, i):
        return self.told[i][0]


class Plain(Records):
    """The same pictures, whose records have no scenes."""

    def __getitem__(self, i):
        return {"image": self.images[i], "captions": ["a thing"], "key": str(i)}


class Mixed(Mixture):
    """A mixture of sources that aren't on disk."""

    def __init__(self, *sources):
        self._sources = dict(zip("abc", sources, strict=False))
        self._ends = np.cumsum([len(source) for source in sources])


def test_a_mixtures_scenes_are_those_of_its_parts(drawn):
    """Whichever comes first; of what tells none, one record alone is read."""
    scenes, plain = Records(drawn[0]), Plain(drawn[0])
    wanted = c.scenes_of(scenes)
    assert len(wanted) == len({told[0][0] for told in scenes.told if told[1]}) > 20
    assert c.scenes_of(plain) == {}
    for mixed in (Mixed(plain, scenes), Mixed(scenes, plain), Mixed(plain, Mixed(plain, scenes))):
        assert c.scenes_of(mixed) == wanted


def corners(mesh):
    """In the place of EfficientNet: sixteen places' colours."""
    network = lambda unit, x: x[:, ::32, ::32].reshape(len(x), -1) / 255.0  # noqa: E731
    return Extractor("corners", network, lambda pictures: pictures * 1.0, {}, "1", mesh)


@pytest.mark.parametrize(
    "change, said", [({"idea": "FFFF"}, "'FFFF', which is none of"), ({"style": "x"}, "style 'x'")]
)
def test_unknown_drawings_are_told_before_anything_is_drawn(
    change, said, drawn, tmp_path, monkeypatch
):
    source = Records(drawn[0])
    captions, spoiled = source.told[7][0], json.loads(source.told[7][1])
    spoiled["objects"][0] |= change
    source.told[7] = (captions, json.dumps(spoiled))
    monkeypatch.setattr(job, "open_data", lambda *_: Data(source, {}))
    with pytest.raises(UserError, match=said):
        evaluate.Job(evaluate.Against("s", tmp_path / "out"), None).begin(64)
    assert not (tmp_path / "out").exists()


def test_an_evaluation_tells_it(drawn, drawings, tmp_path, monkeypatch):
    """Of pictures whose prompts are captions of scenes; real ones beside them, and chance."""
    source = Records(drawn[0])
    monkeypatch.setattr(job, "open_data", lambda *_: Data(source, {"records": 31}))
    monkeypatch.setattr(job, "efficientnet_lite0", corners)
    monkeypatch.setattr(c, "known_drawings", lambda styles: drawings)
    for i, picture in enumerate(drawn[1][:20]):
        prompt = source.captions(i)[0]
        save_png(tmp_path / "right" / f"{i:02d}.png", picture, {"prompt": prompt})
        save_png(tmp_path / "wrong" / f"{i:02d}.png", drawn[1][i + 1], {"prompt": prompt})
    folders = [str(tmp_path / name) for name in ("right", "wrong")]
    table = evaluate.score_folders(evaluate.Against("s", tmp_path / "out"), folders)
    rows = json.loads((tmp_path / "out" / "metrics.json").read_text())["rows"]
    right, wrong, halves, real, others = rows
    assert real["folder"] == "real scenes" and others["folder"] == "real scenes, others' captions"
    assert right["object top-1"] >= 0.98 and real["object top-1"] >= 0.98
    assert wrong["object top-1"] < 0.12 and others["object top-1"] < 0.12
    assert right["top-1"] == 1.0 and right["names"] == 31 and wrong["top-1"] == 0.0
    assert right["ground"] == 1 and real["pictures"] == 20 and "ground" not in halves
    assert (
        "| all objects |" in table and "object top-5" in (tmp_path / "out/report.html").read_text()
    )
