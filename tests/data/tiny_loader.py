"""A loader of few pictures, for the tests of what it does with them."""

import io

import ml_collections
import numpy as np
from PIL import Image

from cascade.data.loader import make_loader

RECORDS = 23
ROUNDING = 1e-3  # of float32 sums over values up to 255
FLOAT32 = 1e-5


def spelling(captions):
    """A stand-in for the embedding cache: embeddings that spell their captions."""
    codes = np.zeros((len(captions), 40, 1), np.float32)
    for row, caption in zip(codes, captions, strict=True):
        row[: len(caption), 0] = [ord(c) for c in caption]
    return {"text_emb": codes, "text_mask": codes[..., 0] > 0}


def spelled(batch) -> list[str]:
    return ["".join(chr(int(c)) for c in emb[:, 0] if c) for emb in batch["text_emb"]]


def picture(i: int, size=(16, 16)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (i * 10, 0, 255 - i * 10)).save(buffer, "png")
    return buffer.getvalue()


def name(record: str) -> str:
    return record.split(" of ")[-1]


def data_section(source: dict, **changes) -> ml_collections.ConfigDict:
    """A config's `data`: all pictures of a source, on white; a tenth of them may be broken."""
    return ml_collections.ConfigDict(
        {
            "source": source,
            "eval_source": source,
            "filter": {"min_side": 0, "max_aspect": 100.0},
            "ground": "#ffffff",
            "crop": "centre",
            "buckets": (),
            "mirror": 0.0,
            "workers": 0,
            "max_broken_rate": 0.1,
            "cache_decoded": False,
            **changes,
        }
    )


def section(folder, **changes) -> ml_collections.ConfigDict:
    return data_section(**{"source": {"name": "folder", "path": str(folder)}, **changes})


def loader(data, **changes):
    settings = dict(
        resolution=8,
        lowres_resolution=0,
        crop_resolution=0,
        texts=spelling,
        seed=0,
        batch_size=4,
        train=True,
    )
    return make_loader(data, **{**settings, **changes})


def take(iterator, count: int) -> list[dict]:
    return [next(iterator) for _ in range(count)]


def assert_same(one: list[dict], two: list[dict]):
    assert len(one) == len(two)
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])


def shared(data, count: int, **changes) -> list:
    """The loaders of `count` processes that share global batches of 6."""
    part = dict(batch_size=6 // count, process_count=count, **changes)
    return [loader(data, process_index=p, **part) for p in range(count)]


def together(parts: list, batches: int) -> list[dict]:
    """Global batches, as devices in the order of their processes hold them."""
    found = []
    for _ in range(batches):
        mine = [next(part) for part in parts]
        found.append({key: np.concatenate([batch[key] for batch in mine]) for key in mine[0]})
    return found
