"""Composed scenes: one to three drawings on a coloured ground, and words for what is where.

Pairs of this kind have no end, and a program can check what they show: every scene is also
written down as JSON, with the box of each drawing.
"""

import io
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from cascade.data.emoji.drawings import ideas, render

GROUNDS = {
    "white": (255, 255, 255),
    "grey": (160, 160, 165),
    "black": (20, 20, 24),
    "red": (214, 52, 56),
    "orange": (245, 150, 50),
    "yellow": (250, 221, 90),
    "green": (70, 160, 80),
    "blue": (62, 110, 210),
    "purple": (130, 82, 180),
    "pink": (246, 160, 190),
    "brown": (125, 84, 58),
}

# A layout is the side of each drawing, as a fraction of the scene's, and each one's place.
LAYOUTS = {
    1: [(0.62, ("centre",)), (0.46, ("left",)), (0.46, ("right",)), (0.46, ("top",)),
        (0.46, ("bottom",))],
    2: [(0.44, ("left", "right")), (0.44, ("top", "bottom"))],
    3: [(0.28, ("left", "centre", "right")), (0.28, ("top", "centre", "bottom"))],
}  # fmt: skip
_ALONG = {"left": (-1, 0), "right": (1, 0), "top": (0, -1), "bottom": (0, 1), "centre": (0, 0)}
_AT = {"left": "on the left", "right": "on the right", "top": "at the top", "bottom":
       "at the bottom", "centre": "in the centre"}  # fmt: skip

SCENE_GROUPS = ("animals-nature", "food-drink", "travel-places", "activities", "objects")


class Scene(NamedTuple):
    """What a composed picture shows; boxes are (left, top, right, bottom) in pixels."""

    ground: str
    drawings: tuple[tuple[str, str], ...]  # (hexcode, style)
    places: tuple[str, ...]
    boxes: tuple[tuple[int, int, int, int], ...]
    resolution: int


def draw_scene(
    rng: np.random.Generator,
    drawings: Sequence[tuple[str, str]],
    resolution: int,
    required: Sequence[tuple[str, str]] = (),
) -> Scene:
    """Draws a random scene.

    Args:
      rng: decides everything.
      drawings: (hexcode, style) pairs to choose from.
      resolution: side of the scene in pixels.
      required: if given, one drawing at least comes from here.
    """
    count = int(rng.integers(1, 4))
    chosen = [drawings[i] for i in rng.choice(len(drawings), count, replace=False)]
    if required:
        chosen[int(rng.integers(count))] = required[int(rng.integers(len(required)))]
    side_fraction, places = LAYOUTS[count][int(rng.integers(len(LAYOUTS[count])))]
    side = round(side_fraction * resolution)
    boxes = []
    for place in places:
        # A little jitter keeps a model from learning fixed spots; neighbours never overlap.
        reach = (resolution - side) / 2 * 0.95
        jitter = rng.uniform(-0.02, 0.02, size=2) * resolution
        centre = resolution / 2 + np.multiply(_ALONG[place], reach) + jitter
        left, top = np.clip(np.round(centre - side / 2), 0, resolution - side).astype(int)
        boxes.append((int(left), int(top), int(left) + side, int(top) + side))
    ground = list(GROUNDS)[int(rng.integers(len(GROUNDS)))]
    return Scene(ground, tuple(chosen), tuple(places), tuple(boxes), resolution)


def scene_png(scene: Scene) -> bytes:
    """Renders a scene as an opaque RGBA PNG."""
    canvas = np.empty((scene.resolution, scene.resolution, 3), np.float32)
    canvas[:] = GROUNDS[scene.ground]
    for (hexcode, style), (left, top, right, bottom) in zip(
        scene.drawings, scene.boxes, strict=True
    ):
        drawing = render(style, hexcode, right - left).astype(np.float32)
        alpha = drawing[..., 3:] / 255
        spot = canvas[top:bottom, left:right]
        spot += alpha * (drawing[..., :3] - spot)
    buffer = io.BytesIO()
    picture = Image.fromarray(np.round(canvas).astype(np.uint8)).convert("RGBA")
    picture.save(buffer, "png", compress_level=3)  # twice as fast as the default, 5 % larger
    return buffer.getvalue()


def scene_captions(scene: Scene, phrases: Mapping[str, str]) -> list[str]:
    """Two or three captions that say what is where; `phrases` names each hexcode's idea."""
    names = [phrases[hexcode] for hexcode, _ in scene.drawings]
    ground = f"a {scene.ground} ground" if scene.ground != "orange" else "an orange ground"
    spots = [f"{name} {_AT[place]}" for name, place in zip(names, scene.places, strict=True)]
    if len(names) == 1:
        return [f"{spots[0]} on {ground}", f"{ground} with {spots[0]}"]
    listing = f"{', '.join(spots[:-1])} and {spots[-1]}"
    if len(names) == 2:
        beside = scene.places == ("left", "right")
        first, second = ("to the left of", "to the right of") if beside else ("above", "below")
        return [
            f"{names[0]} {first} {names[1]} on {ground}",
            f"{names[1]} {second} {names[0]} on {ground}",
            f"{listing}, on {ground}",
        ]
    return [f"{listing}, on {ground}", f"{ground} with {listing}"]


def scene_json(scene: Scene) -> dict:
    """The scene in plain types; boxes as fractions of the side, so that they survive resizing."""
    return {
        "ground": {"name": scene.ground, "rgb": list(GROUNDS[scene.ground])},
        "objects": [
            {
                "idea": hexcode,
                "label": ideas()[hexcode].label,
                "style": style,
                "place": place,
                "box": [edge / scene.resolution for edge in box],
            }
            for (hexcode, style), place, box in zip(
                scene.drawings, scene.places, scene.boxes, strict=True
            )
        ],
    }
