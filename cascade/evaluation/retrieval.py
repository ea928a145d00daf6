"""Does a drawing show what its prompt names? Nearest neighbours among known drawings."""

from collections.abc import Sequence

import numpy as np

from cascade.data.preprocess import all_resized
from cascade.errors import UserError
from cascade.evaluation.neighbours import distances


def nearest(drawn: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Index of the known picture at the smallest mean squared distance, for each drawn one.

    Args:
      drawn: [N, ...] pixels or features, of any range.
      known: [M, ...], the same.

    Returns:
      [N] indices into `known`.
    """
    a, b = np.reshape(drawn, (len(drawn), -1)), np.reshape(known, (len(known), -1))
    return np.concatenate([block.argmin(1) for block in distances(a, b)])


def direction(features: np.ndarray) -> np.ndarray:
    """Features [N, D] at length 1: distances between them order as their cosines do."""
    x = np.asarray(features, np.float64)
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), np.finfo(np.float64).tiny)


def pixels(images: np.ndarray) -> np.ndarray:
    """uint8 [N, S, S, 3] as [N, D] in [0, 1]: of no more than 64×64 pixels each, shrunk by area."""
    small = all_resized(images, min(64, images.shape[1]))
    return small.reshape(len(images), -1) / 255


def ranks(
    drawn: np.ndarray, names: Sequence[str], known: np.ndarray, known_names: Sequence[str]
) -> np.ndarray:
    """How many other names have a known drawing as near as the nearest of the right name.

    0 is found at once; below 5 it is among the best five. A name may have several known drawings,
    of which the nearest counts. A tie counts as lost, so pictures that are all alike find nothing.

    Args:
      drawn: [N, D] features.
      names: what each was to show.
      known: [M, D] features of known drawings.
      known_names: what each of these shows; every one of `names` is among them.

    Returns:
      [N] from 0 to the number of names - 1.

    Raises:
      UserError: nothing known bears one of the names.
    """
    order, which = np.unique(np.asarray(known_names, object), return_inverse=True)
    number = {name: index for index, name in enumerate(order)}
    missing = [name for name in names if name not in number]
    if missing:
        raise UserError(
            f"No known drawing is called {missing[0]!r} ({len(missing)} of {len(names)} names have "
            "none); take prompts from the captions of the known drawings."
        )
    # Drawings of one name side by side, so that each name's nearest is a minimum over a stretch.
    by_name = np.argsort(which, kind="stable")
    starts = np.searchsorted(which[by_name], np.arange(len(order)))
    right = np.array([number[name] for name in names])
    found, done = [], 0
    for block in distances(drawn, np.asarray(known)[by_name], "retrieval"):
        nearest_of = np.minimum.reduceat(block, starts, axis=1)
        own = nearest_of[np.arange(len(block)), right[done : done + len(block)]]
        found.append((nearest_of <= own[:, None]).sum(1) - 1)
        done += len(block)
    return np.concatenate(found)


def among(found: np.ndarray, k: int) -> float:
    """Share of `ranks` [N] that are among the best k."""
    return float((np.asarray(found) < k).mean())
