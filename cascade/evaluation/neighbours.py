"""What pairs of features say: kernel distance, precision and recall; [N, D] in, numbers out.

Pairs are taken a block of rows at a time, in float64: no [N, M] array is held.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from cascade.errors import UserError

BLOCK = 1024  # rows
SUBSET = 1000  # pictures, at most
SUBSETS = 10  # at least


class KernelDistance(NamedTuple):
    """Mean over subsets and its standard error, of which there is none (None) with one subset."""

    value: float
    error: float | None


def polynomial(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(x·y / D + 1)³ of every pair, [N, M]."""
    return (x @ y.T / x.shape[1] + 1.0) ** 3


def unbiased(x: np.ndarray, y: np.ndarray) -> float:
    """MMD²_u of two samples [N, D] and [M, D] (Gretton et al. 2012, equation 3).

    Σ_{i≠j} k(x_i, x_j) / N(N−1) + Σ_{i≠j} k(y_i, y_j) / M(M−1) − 2 Σ k(x_i, y_j) / NM, whose mean
    over samples is the squared distance of what they are drawn from: below 0 at times.
    """

    def within(z):
        kernel = polynomial(z, z)
        return (kernel.sum() - np.trace(kernel)) / (len(z) * (len(z) - 1))

    return float(within(x) + within(y) - 2 * polynomial(x, y).mean())


def kernel_distance(a: np.ndarray, b: np.ndarray, seed: int = 0) -> KernelDistance:
    """Kernel distance (KID, Bińkowski et al. 2018): `unbiased`, averaged over subsets.

    Both are shuffled and cut into as many disjoint subsets: 10, or more so that none has more than
    1000 pictures (of the larger set, what is left over goes unused). Being disjoint they are
    independent, and the spread of their estimates over the square root of their number is an honest
    standard error. (Others draw overlapping subsets.)

    Args:
      a, b: [N, D] and [M, D].
      seed: of the shuffling.

    Raises:
      UserError: fewer than two in either.
    """
    least = min(len(a), len(b))
    if least < 2:
        raise UserError(f"A kernel distance needs at least 2 pictures a side; there is {least}.")
    subsets = max(-(-least // SUBSET), min(SUBSETS, least // 2))
    rng = np.random.default_rng(seed)
    cuts = [np.array_split(rng.permutation(len(z))[: subsets * SUBSET], subsets) for z in (a, b)]
    estimates = [
        unbiased(np.asarray(a[i], np.float64), np.asarray(b[j], np.float64))
        for i, j in zip(*cuts, strict=True)
    ]
    if subsets == 1:
        return KernelDistance(estimates[0], None)
    error = np.std(estimates, ddof=1) / np.sqrt(subsets)
    return KernelDistance(float(np.mean(estimates)), float(error))


def distances(x: np.ndarray, y: np.ndarray, what: str = "") -> Iterator[np.ndarray]:
    """Squared distances of x [N, D] to y [M, D], blocks [n, M] of rows of x in order.

    |a − b|² = |a|² − 2 a·b + |b|². The common mean is taken away first: it cancels, and what is
    squared is as small as it can be.

    Args:
      what: names a progress bar, for what takes long; "" shows none.
    """
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    centre = y.mean(0)
    x, y = x - centre, y - centre
    squares = (y**2).sum(1)
    slow = len(x) * len(y) * x.shape[1] > 1e11
    for start in tqdm(range(0, len(x), BLOCK), what, disable=not (what and slow)):
        block = x[start : start + BLOCK]
        found = (block**2).sum(1)[:, None] - 2 * block @ y.T + squares
        yield np.maximum(found, 0.0, out=found)


def radii(x: np.ndarray, k: int) -> np.ndarray:
    """Squared distance of each of [N, D] to its k-th nearest other, [N]."""
    found = []
    for block in distances(x, x, "neighbours"):
        rows = np.arange(len(block))
        block[rows, sum(map(len, found)) + rows] = np.inf  # not itself
        found.append(np.partition(block, k - 1, axis=1)[:, k - 1])
    return np.concatenate(found)


def covered(x: np.ndarray, by: np.ndarray, radius: np.ndarray) -> float:
    """Share of x [N, D] within the ball about any of `by` [M, D] of its own squared radius [M]."""
    inside = [(block <= radius).any(1) for block in distances(x, by, "covered")]
    return float(np.concatenate(inside).mean())


def precision_recall(
    drawn: np.ndarray, real: np.ndarray, k: int = 3, real_radii: np.ndarray | None = None
) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al. 2019, equations 1 and 2).

    Each set's manifold is the union of balls about its pictures that reach to the k-th nearest
    other of the same set. Precision is the share of drawn pictures in the manifold of the real
    ones, recall that of real pictures in the manifold of the drawn ones. Both grow with k and
    depend on N: compare at the same.

    Args:
      drawn, real: [N, D] and [M, D].
      real_radii: `radii` of the real ones, where they are known already.

    Raises:
      UserError: k or fewer in either.
    """
    least = min(len(drawn), len(real))
    if least <= k:
        raise UserError(
            f"Precision and recall by the {k} nearest need at least {k + 1} pictures a side; there "
            f"are {least}."
        )
    real_radii = radii(real, k) if real_radii is None else real_radii
    return covered(drawn, real, real_radii), covered(real, drawn, radii(drawn, k))
