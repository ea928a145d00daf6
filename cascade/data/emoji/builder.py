"""The TFDS builder: which drawings and scenes are in which split, and how a record is made."""

import hashlib
import io
import json
import multiprocessing
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from tqdm import tqdm

from cascade.data.emoji.captions import single_captions, with_article
from cascade.data.emoji.drawings import STYLES, demo_phrases, ideas, render_png, svg_paths
from cascade.data.emoji.scenes import (
    SCENE_GROUPS,
    Scene,
    draw_scene,
    scene_captions,
    scene_json,
    scene_png,
)
from cascade.data.preprocess import Preprocess, colour


class Single(NamedTuple):
    """One drawing alone on a transparent ground."""

    hexcode: str
    style: str


class Settings(NamedTuple):
    """What a built data set depends on; two builds of equal settings are equal."""

    variant: str
    resolution: int
    scenes: int
    seed: int


class Item(NamedTuple):
    """A record yet to be drawn."""

    key: str
    shows: Single | Scene
    settings: Settings


DEFAULTS = {
    "demo": Settings("demo", resolution=128, scenes=0, seed=0),
    "small": Settings("small", resolution=256, scenes=2_000, seed=0),
    "full": Settings("full", resolution=256, scenes=10_000, seed=0),
}

# Shares of the full variant's ideas that lose one style, and of scenes made beside the train ones.
HELDOUT_SHARE = 0.1
HELDOUT_SCENES = 0.05
SMALL_GROUPS = ("animals-nature", "food-drink")
# The demo trains on every idea in one style; a quarter of them is held out in the other.
DEMO_HELDOUT = 16


class Emoji(tfds.core.GeneratorBasedBuilder):
    """Emoji drawings with captions, in variants `demo`, `small` and `full`.

    demo: 64 easily recognised ideas drawn by twemoji, all in train; 16 openmoji drawings held out.
    small: animals, plants, food and the demo's ideas drawn by twemoji, in `singles`; scenes of
      them, in `scenes`. Other scenes of the same drawings are held out.
    full: every captioned idea drawn by twemoji and by openmoji, and composed scenes. A tenth of the
      ideas is held out in one style; no held-out drawing occurs in a train picture, and every
      held-out scene has at least one.

    A record is {"image": RGBA PNG, "captions": texts (plainest first), "key", "kind": "single" or
    "scene", "scene": JSON of what is where ("" for singles)}.
    """

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [  # noqa: RUF012 - the attribute that TFDS reads
        tfds.core.BuilderConfig(name="demo", description="64 ideas, one style, for a quick start"),
        tfds.core.BuilderConfig(name="small", description="318 ideas, one style, and scenes"),
        tfds.core.BuilderConfig(name="full", description="All ideas, two styles, and scenes"),
    ]

    def __init__(self, *, settings: Settings | None = None, processes: int = 1, **kwargs):
        """`settings` None takes the variant's defaults; `processes` draw side by side."""
        self._settings = settings
        self._processes = processes
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        settings = self._settings or DEFAULTS[self.builder_config.name]
        return tfds.core.DatasetInfo(
            builder=self,
            description="Emoji drawings and composed scenes with captions.",
            license="Drawings: twemoji CC BY 4.0, openmoji CC BY-SA 4.0. Captions: Unicode-3.0.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(None, None, 4), encoding_format="png"),
                    "captions": tfds.features.Sequence(tfds.features.Text()),
                    "key": tfds.features.Text(),
                    "kind": tfds.features.Text(),
                    "scene": tfds.features.Text(),
                }
            ),
            metadata=tfds.core.MetadataDict(settings._asdict()),
        )

    def _split_generators(self, dl_manager):
        splits = plan(self._settings or DEFAULTS[self.builder_config.name])
        return {split: self._generate_examples(split, items) for split, items in splits.items()}

    def _generate_examples(self, split: str, items: list):
        with _mapper(self._processes) as run:
            records = run(make_record, items)
            for record in tqdm(records, f"emoji {split}", len(items), unit="picture"):
                yield record["key"], {**record, "image": io.BytesIO(record["image"])}


def plan(settings: Settings) -> dict[str, list[Item]]:
    """Decides every record of every split, before anything is drawn."""
    singles = heldout_split(settings)
    items = {
        split: [Item(f"{d.style}-{d.hexcode}", d, settings) for d in drawings]
        for split, drawings in singles.items()
    }
    pools = {
        split: [d for d in drawings if ideas()[d.hexcode].group in SCENE_GROUPS]
        for split, drawings in singles.items()
    }
    counts = {"train": settings.scenes, "heldout": round(settings.scenes * HELDOUT_SCENES)}
    for number, (split, count) in enumerate(counts.items()):
        required = pools["heldout"] if split == "heldout" else ()
        for i in range(count):
            rng = np.random.default_rng([settings.seed, number, i])
            scene = draw_scene(rng, pools["train"], settings.resolution, required)
            items[split].append(Item(f"scene-{split}-{i:06d}", scene, settings))
    if settings.variant == "small":  # apart, so that training can weigh the few singles more
        drawn = len(singles["train"])
        return {
            "singles": items["train"][:drawn],
            "scenes": items["train"][drawn:],
            "heldout": items["heldout"],
        }
    return items


def heldout_split(settings: Settings) -> dict[str, list[Single]]:
    """Splits the drawings by (idea, style), decided by a hash of seed and idea alone."""

    def draw(hexcode: str) -> int:
        digest = hashlib.sha256(f"{settings.seed}:{hexcode}".encode()).digest()
        return int.from_bytes(digest[:8], "big")

    if settings.variant == "demo":
        hexcodes = list(demo_phrases())
        both = [h for h in hexcodes if h in svg_paths("openmoji")]
        chosen = set(sorted(both, key=draw)[:DEMO_HELDOUT])
        return {
            "train": [Single(h, "twemoji") for h in hexcodes],
            "heldout": [Single(h, "openmoji") for h in hexcodes if h in chosen],
        }
    if settings.variant == "small":
        known, chosen = svg_paths("twemoji"), demo_phrases()
        hexcodes = [h for h, i in ideas().items() if h in chosen or i.group in SMALL_GROUPS]
        return {"train": [Single(h, "twemoji") for h in hexcodes if h in known], "heldout": []}
    train, heldout = [], []
    for hexcode in ideas():
        styles = [style for style in STYLES if hexcode in svg_paths(style)]
        number = draw(hexcode)
        lost = styles[number % 2] if len(styles) == 2 and number / 2**64 < HELDOUT_SHARE else None
        for style in styles:
            (heldout if style == lost else train).append(Single(hexcode, style))
    return {"train": train, "heldout": heldout}


@lru_cache
def phrases_of(variant: str) -> dict[str, str]:
    """What each idea is called in captions: the demo's are chosen by hand."""
    return (
        demo_phrases()
        if variant == "demo"
        else {hexcode: with_article(idea.label) for hexcode, idea in ideas().items()}
    )


def make_record(item: Item) -> dict:
    """Draws an item and writes its captions; runs in worker processes."""
    shows, phrases = item.shows, phrases_of(item.settings.variant)
    if isinstance(shows, Scene):
        return {
            "key": item.key,
            "kind": "scene",
            "image": scene_png(shows),
            "captions": scene_captions(shows, phrases),
            "scene": json.dumps(scene_json(shows)),
        }
    idea = ideas()[shows.hexcode]
    return {
        "key": item.key,
        "kind": "single",
        "image": render_png(shows.style, shows.hexcode, item.settings.resolution),
        "captions": single_captions(idea, shows.style, phrases[shows.hexcode]),
        "scene": "",
    }


def single_drawings(
    variant: str, side: int, style: str | None = None
) -> tuple[np.ndarray, list[str]]:
    """What a variant trains on, but for scenes, on white, and each one's plainest caption.

    Args:
      style: instead, the same ideas in this style, as far as it has them.

    Returns:
      uint8 [N, side, side, 3], and N captions.
    """
    singles = heldout_split(DEFAULTS[variant])["train"]
    if style is not None:
        hexcodes = dict.fromkeys(single.hexcode for single in singles)
        singles = [Single(each, style) for each in hexcodes if each in svg_paths(style)]
    settings = DEFAULTS[variant]._replace(resolution=side)
    records = [make_record(Item(single.hexcode, single, settings)) for single in singles]
    on_white = Preprocess(side, colour("#ffffff"), min_side=1, max_aspect=4.0)
    images = np.stack([on_white(record["image"]) for record in records])
    return images, [record["captions"][0] for record in records]


@contextmanager
def _mapper(processes: int) -> Iterator:
    """Yields an ordered lazy `map`, spread over processes if there are several."""
    if processes <= 1:
        yield map
        return
    # Spawned, not forked: a program that already runs JAX has threads, which fork would break.
    pool = ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn"))

    def spread(function, items: Iterable):
        return pool.map(function, items, chunksize=16)

    try:
        yield spread
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
