"""What to draw: arguments that drawing and enlarging have in common, checked, and texts encoded."""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from cascade.arguments import MAX_BATCH, whole
from cascade.parallel.mesh import batch_shares
from cascade.text.between import Between
from cascade.text.interface import TextEncoder, checked_text


class Request(NamedTuple):
    """Which pictures to draw, checked.

    Attributes:
      text: text_emb [P, L, D] and text_mask [P, L], of each prompt once.
      null: likewise, a batch of one: what guidance leads away from.
      images: pictures a prompt.
      count: pictures in all.
      rows: pictures that go through a network at once, on all devices together.
      seed, first_index: picture i's randomness follows from (seed, first_index + i).
    """

    text: dict[str, np.ndarray]
    null: dict[str, np.ndarray]
    images: int
    count: int
    rows: int
    seed: int
    first_index: int


def request(
    encoder: TextEncoder,
    mesh: Mesh,
    prompts: Sequence[str | Between],
    count: int,
    seed: int,
    negative_prompt: str,
    first_index: int,
    batch_size: int,
) -> Request:
    """Checks the rest of what callers say, and encodes `prompts`, checked already.

    Args:
      encoder: the text encoder.
      mesh: the devices that draw, over which a batch must divide.
      count: pictures in all, a multiple of the prompts.
      Others: as in `Cascade.__call__`.

    Raises:
      UserError: a value out of range, or a negative prompt that isn't text.
    """
    whole("seed", seed, 0, 2**32 - 1)
    whole("first_index", first_index, 0, 2**32 - count)
    batch_size = whole("batch_size", batch_size, 1, MAX_BATCH)
    shares = batch_shares(mesh)
    rows = math.ceil((batch_size if count > 1 else 1) / shares) * shares
    null = _led_away_from(encoder, negative_prompt)
    text = _conditions(encoder, prompts, "prompt")
    return Request(text, null, count // len(prompts), count, rows, seed, first_index)


def default_batch_size(mesh: Mesh, side: int, count: int) -> int:
    """How many of `count` pictures, `side` pixels wide or high, to draw at once if nobody says.

    On a CPU one small picture's products are too little work to share among cores; several large
    ones take memory and gain nothing. Batches are as even as can be: 5 pictures are 3 and 2.
    """
    most = 8 if mesh.devices.flat[0].platform != "cpu" else 4 if side <= 256 else 1
    return math.ceil(count / math.ceil(count / most))


def _conditions(
    encoder: TextEncoder, prompts: Sequence[str | Between], what: str
) -> dict[str, np.ndarray]:
    """text_emb [P, L, D] and text_mask [P, L]; a text without words has the null condition."""
    ends = ([p.first, p.second] if isinstance(p, Between) else [p] for p in prompts)
    texts = list(itertools.chain.from_iterable(ends))
    emb, mask = encoder.encode(texts, what)
    null_emb, null_mask = encoder.null()
    blank = np.array([not text.strip() for text in texts]) | ~np.asarray(mask).any(axis=1)
    emb = np.where(blank[:, None, None], null_emb, emb)
    mask = np.where(blank[:, None], null_mask, mask)
    rows = zip(emb, mask, strict=True)
    conditions = [
        prompt.blend(next(rows), next(rows)) if isinstance(prompt, Between) else next(rows)
        for prompt in prompts
    ]
    text_emb, text_mask = map(np.stack, zip(*conditions, strict=True))
    return {"text_emb": text_emb, "text_mask": text_mask}


def _led_away_from(encoder: TextEncoder, negative_prompt: str) -> dict[str, np.ndarray]:
    """The condition that guidance leads away from, a batch of one."""
    if checked_text(negative_prompt, "negative prompt").strip():
        return _conditions(encoder, [negative_prompt], "negative prompt")
    null_emb, null_mask = encoder.null()
    return {"text_emb": null_emb[None], "text_mask": null_mask[None]}
