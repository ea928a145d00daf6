"""Is each drawing where its caption says? Scenes of known drawings, matched pixel by pixel.

A scene of the emoji data set is told by JSON: which drawing lies in which box, on which ground. A
picture of it is cut at each box, and what is there is compared with every known drawing, on the
ground that the picture has. The nearest is what it shows.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from cascade.data.emoji.drawings import ideas, render, svg_paths
from cascade.data.emoji.scenes import GROUNDS, SCENE_GROUPS
from cascade.data.mixture import Mixture
from cascade.data.preprocess import BrokenPicture, Filtered, area_resize
from cascade.data.sources import read_record
from cascade.errors import UserError
from cascade.evaluation.features import Extractor, resize
from cascade.evaluation.scores import Scored

SIDE = 64  # of pictures that are compared; larger ones are shrunk
RENDERED = 128  # side of the drawings that those of any size are shrunk from
# A scene's drawings lie up to 2 % of its side beside their places, and no caption says where to, so
# a picture may have them up to 4 % beside the boxes of a scene with its caption.
SHIFTS = np.array([-0.04, -0.02, 0.0, 0.02, 0.04])
BEST = (1, 5)


class Scene(NamedTuple):
    """What a picture is to show.

    Attributes:
      ground: a name in `GROUNDS`.
      objects: (idea, style) of each drawing.
      boxes: (left, top, right, bottom) of each, as fractions of the side.
    """

    ground: str
    objects: tuple[tuple[str, str], ...]
    boxes: tuple[tuple[float, float, float, float], ...]


def read_scene(text: str) -> Scene | None:
    """A scene from what `cascade.data.emoji.scenes.scene_json` wrote; None of anything else."""
    try:
        told = json.loads(text)
        objects = tuple((str(each["idea"]), str(each["style"])) for each in told["objects"])
        boxes = tuple(tuple(map(float, each["box"])) for each in told["objects"])
        scene = Scene(str(told["ground"]["name"]), objects, boxes)
        within = all(0 <= a < c <= 1 and 0 <= b < d <= 1 for a, b, c, d in boxes)
    except (ValueError, TypeError, KeyError):
        return None
    return scene if within and boxes and scene.ground in GROUNDS else None


def scenes_of(source: Any) -> dict[str, Scene]:
    """Plainest caption -> its scene, of a source whose records tell theirs.

    {} of one that tells none; its first record that can be read decides. Each part of a mixture
    decides for itself.
    """
    if isinstance(source, Mixture):
        return {caption: s for part in source.sources for caption, s in scenes_of(part).items()}
    found = {}
    for i in range(len(source)):
        with suppress(BrokenPicture, Filtered):
            record = read_record(source, i)
            if "scene" not in record:
                break
            scene = read_scene(record["scene"])
            if scene is not None:
                found[record["captions"][0].strip()] = scene
    return found


def thumbnails(mesh: Mesh) -> Extractor:
    """Not features but the pictures themselves, uint8 [B, S, S, 3] with S at most `SIDE`."""

    def shrink(pictures):
        if pictures.shape[1] <= SIDE:
            return pictures
        x = resize(pictures.astype(jnp.float32) / 255.0, SIDE, "antialiased")
        return jnp.rint(255.0 * x).astype(jnp.uint8)

    return Extractor("thumbnail", lambda unit, x: x, shrink, {}, f"{SIDE}", mesh)


class Drawings:
    """Known drawings, to be found in pictures.

    Attributes:
      ideas: what each shows, in order; one idea may have several drawings.
    """

    def __init__(self, pictures: Sequence[np.ndarray], shown: Sequence[str]):
        """Args: pictures, uint8 RGBA squares; shown, the idea of each."""
        order = np.argsort(np.asarray(shown), kind="stable")
        self.ideas, self._starts = np.unique(np.asarray(shown)[order], return_index=True)
        self._number = {str(idea): i for i, idea in enumerate(self.ideas)}
        self._pictures = []
        for i in order:
            rgba = np.asarray(pictures[i], np.float32)
            self._pictures.append(np.concatenate([rgba[..., :3] * rgba[..., 3:], rgba[..., 3:]], 2))
        self._shrunk = {}

    def number(self, idea: str) -> int:
        """Of an idea, among `ideas`.

        Raises:
          UserError: it isn't known.
        """
        if idea not in self._number:
            raise _strange(idea, len(self.ideas))
        return self._number[idea]

    def _at(self, side: int) -> tuple[np.ndarray, np.ndarray]:
        """a·(R, G, B) and a of all drawings, [M, side² · 4], a in [0, 1]; and q qᵀ summed, of each.

        Returns:
          These q, and [M, 4, 4].
        """
        if side not in self._shrunk:
            small = np.stack([area_resize(picture, side, side) for picture in self._pictures])
            q = (small / 255.0).astype(np.float64).reshape(len(small), side * side, 4)
            self._shrunk[side] = q.reshape(len(q), -1), q.swapaxes(1, 2) @ q
        return self._shrunk[side]

    def distances(self, crops: np.ndarray, ground: np.ndarray) -> np.ndarray:
        """Squared distance of the nearest of some crops to each idea's nearest drawing.

        On a ground g a drawing is g + a(r − g); with q = (a·r, a) that is g + Wq, W = [I, −g]. For
        a crop c then |c − g − Wq|² = |c − g|² − 2 Wᵀ(c − g)·q + qᵀWᵀWq, so nothing is laid on a
        ground.

        Args:
          crops: [K, side, side, 3] of 0 to 255.
          ground: [3].

        Returns:
          [len(ideas)] float64.
        """
        q, products = self._at(crops.shape[1])
        w = np.hstack([np.eye(3), -np.reshape(ground, (3, 1)).astype(np.float64)])
        c = crops.astype(np.float64) - ground
        squares = np.einsum("kijc,kijc->k", c, c)
        own = np.einsum("mij,ij->m", products, w.T @ w)
        found = squares[:, None] - 2.0 * (c @ w).reshape(len(c), -1) @ q.T + own
        return np.minimum.reduceat(found.min(0), self._starts)

    def rank(self, crops: np.ndarray, ground: np.ndarray, idea: str) -> int:
        """How many other ideas are as near to some crops as one; see `distances`."""
        found = self.distances(crops, ground)
        return int((found <= found[self.number(idea)]).sum()) - 1


def known_ideas(style: str) -> list[str]:
    """What scenes can show in a style.

    Raises:
      UserError: no such style.
    """
    try:
        known = svg_paths(style)
    except KeyError as error:
        raise UserError(
            f"A scene's style {style!r} isn't one of this version's; build the data set with it."
        ) from error
    return [h for h, idea in ideas().items() if idea.group in SCENE_GROUPS and h in known]


def known_drawings(styles: Sequence[str]) -> Drawings:
    """All drawings that scenes are made of, in these styles.

    Raises:
      UserError: no such style.
    """
    pictures, shown = [], []
    for style in sorted(set(styles)):
        drawn = known_ideas(style)
        shown += drawn
        pictures += [render(style, h, RENDERED) for h in tqdm(drawn, f"{style} drawings")]
    return Drawings(pictures, shown)


def check_scenes(scenes: Iterable[Scene]):
    """Checks that every scene can be compared: that `known_drawings` of all styles shows it.

    Raises:
      UserError: an idea or a style that isn't known.
    """
    objects = {shown for scene in scenes for shown in scene.objects}
    known = {
        idea for style in sorted({style for _, style in objects}) for idea in known_ideas(style)
    }
    strange = sorted({idea for idea, _ in objects} - known)
    if strange:
        raise _strange(strange[0], len(known))


def _strange(idea: str, count: int) -> UserError:
    return UserError(
        f"A scene holds {idea!r}, which is none of the {count} known drawings; build the data set "
        "with this version."
    )


def crops_at(picture: np.ndarray, box: Sequence[float]) -> np.ndarray:
    """What is in a box, and in the box shifted by each of `SHIFTS` in both directions.

    Args:
      picture: [S, S, 3].
      box: (left, top, right, bottom), fractions of the side.

    Returns:
      [25, s, s, 3], s the box's side in pixels, rounded; linear between pixel centres.
    """
    whole = len(picture)
    side = max(1, round((box[2] - box[0]) * whole))

    def places(start, end):
        inner = start + (end - start) * (np.arange(side) + 0.5) / side
        return (inner + SHIFTS[:, None]).ravel() * whole - 0.5

    rows = _between(picture, places(box[1], box[3]))
    found = _between(rows.swapaxes(0, 1), places(box[0], box[2])).swapaxes(0, 1)
    n = len(SHIFTS)
    return found.reshape(n, side, n, side, 3).swapaxes(1, 2).reshape(n * n, side, side, 3)


def _between(x: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Linear interpolation of [N, ...] at places of its first axis; its ends go on for ever."""
    at = np.clip(at, 0, len(x) - 1)
    low = np.floor(at).astype(int)
    share = (at - low)[:, None, None]
    return x[low] * (1 - share) + x[np.minimum(low + 1, len(x) - 1)] * share


def ground_of(picture: np.ndarray) -> np.ndarray:
    """The median colour [3] of the outermost pixels of [S, S, 3]."""
    sides = (picture[0], picture[-1], picture[1:-1, 0], picture[1:-1, -1])
    return np.median(np.concatenate(sides), axis=0)


def ground_name(colour: np.ndarray) -> str:
    """The nearest of `GROUNDS`."""
    return min(GROUNDS, key=lambda name: float(((colour - np.array(GROUNDS[name])) ** 2).sum()))


def composition(
    pictures: np.ndarray, scenes: Sequence[Scene | None], drawings: Drawings, what: str = ""
) -> dict[str, Any]:
    """Whether pictures show their scenes.

    Args:
      pictures: uint8 [N, S, S, 3].
      scenes: of each; those of None don't count.
      what: names a progress bar; "" shows none.

    Returns:
      {"object top-1", "object top-5": share of drawings that are, at their place, nearest to the
      right idea or have it among the five nearest, ties lost; "all objects": share of pictures all
      of whose drawings are nearest to the right ones; "ground": share whose border's median is
      nearest to the right colour; "objects": how many drawings that is said of}; {} without one.
    """
    pairs = [(p, scene) for p, scene in zip(pictures, scenes, strict=True) if scene is not None]
    if not pairs:
        return {}
    ranks, grounds = [], []
    for picture, scene in tqdm(pairs, what, disable=not what, unit="picture"):
        colour = ground_of(picture)
        grounds.append(ground_name(colour) == scene.ground)
        objects = zip(scene.objects, scene.boxes, strict=True)
        found = [drawings.rank(crops_at(picture, box), colour, idea) for (idea, _), box in objects]
        ranks.append(np.array(found))
    each = np.concatenate(ranks)
    shares = {f"object top-{k}": float((each < k).mean()) for k in BEST}
    whole = float(np.mean([(found == 0).all() for found in ranks]))
    return {**shares, "all objects": whole, "ground": float(np.mean(grounds)), "objects": len(each)}


def add_composition(
    rows: list[dict[str, Any]],
    sets: Sequence[Scored],
    told: Mapping[str, Scene],
    real: np.ndarray,
    captions: Sequence[str],
):
    """Adds each set's `composition` to its row, and rows of what to hold it against.

    These are of no more real pictures than a set has: with their own scenes, the most that can be
    reached, and with one another's, what pictures get that have nothing to do with their captions.

    Args:
      rows: what `scores.score` gave, a row a set first.
      told: what `scenes_of` gave.
      real: thumbnails of real pictures; captions: theirs.

    Raises:
      UserError: a scene holds what no known drawing shows.
    """
    drawings = known_drawings([style for scene in told.values() for _, style in scene.objects])
    for row, scored in zip(rows, sets, strict=False):
        if scored.prompts:
            pictures = scored.record.read(scored.count)["thumbnail"]
            wanted = [told.get(prompt) for prompt in scored.prompts]
            row |= composition(pictures, wanted, drawings, "composition")
    label, *others = sets[0].about
    scenes = [told.get(caption) for caption in captions]
    kept = [i for i, scene in enumerate(scenes) if scene is not None]
    kept = kept[: max(scored.count for scored in sets)]
    own = [scenes[i] for i in kept]
    for name, wanted in (
        ("real scenes", own),
        ("real scenes, others' captions", own[1:] + own[:1]),
    ):
        blank = {label: name} | {other: "" for other in others}
        rows.append(blank | {"pictures": len(kept)} | composition(real[kept], wanted, drawings))
