"""How well pictures fit their texts, by the known picture that each is nearest to.

No network here has learned from pictures and texts together, as CLIP has. What can be said without
one: a picture is taken to show what the known picture nearest to it shows, and that one's caption
is compared with the text by the language model that comes with this package.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from cascade.evaluation.retrieval import nearest
from cascade.text.interface import TextEncoder

AT_ONCE = 256  # texts


class Alignment(NamedTuple):
    """Mean cosine of a text with the caption found for its picture, and with those of all others.

    The second is what pictures that have nothing to do with their texts get, Σ_{i≠j} a_i·g_j /
    (N (N - 1)); None of one picture.
    """

    value: float
    chance: float | None


def sentence_embeddings(texts: Sequence[str], encoder: TextEncoder) -> np.ndarray:
    """Mean token state of each text at length 1, [N, D], as all-MiniLM was trained to compare.

    Reimers and Gurevych 2019, mean pooling. A text without words is 0.
    """
    order, which = np.unique(np.asarray(texts, object), return_inverse=True)
    pooled = []
    for start in range(0, len(order), AT_ONCE):
        states, mask = encoder.encode([str(text) for text in order[start : start + AT_ONCE]])
        total = np.where(np.asarray(mask)[..., None], states, 0.0).sum(1, dtype=np.float64)
        pooled.append(total / np.maximum(np.linalg.norm(total, axis=1, keepdims=True), 1e-12))
    return np.concatenate(pooled)[which]


def alignment(
    drawn: np.ndarray,
    prompts: Sequence[str],
    known: np.ndarray,
    captions: Sequence[str],
    encoder: TextEncoder,
) -> Alignment:
    """`Alignment` of pictures with their prompts.

    Args:
      drawn: [N, D] features; prompts: the N texts they were drawn from.
      known: [M, D] features; captions: of these M.
      encoder: reads both.
    """
    found = [captions[i] for i in nearest(drawn, known)]
    embedded = sentence_embeddings([*prompts, *found], encoder)
    asked, got = embedded[: len(prompts)], embedded[len(prompts) :]
    own, n = float((asked * got).sum()), len(asked)
    others = float(asked.sum(0) @ got.sum(0)) - own
    return Alignment(own / n, others / (n * (n - 1)) if n > 1 else None)
