"""Does a drawing show what its prompt names? Nearest neighbours among known drawings."""

import numpy as np


def nearest(drawn: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Index of the known picture at the smallest mean squared pixel distance, for each drawn one.

    |a − b|² = |a|² − 2 a·b + |b|², so that no [N, M, H, W, C] array is made.

    Args:
      drawn: [N, H, W, C], any range.
      known: [M, H, W, C], the same range.

    Returns:
      [N] indices into `known`.
    """
    a = np.asarray(drawn, np.float64).reshape(len(drawn), -1)
    b = np.asarray(known, np.float64).reshape(len(known), -1)
    distance = (a**2).sum(1)[:, None] - 2 * a @ b.T + (b**2).sum(1)
    return distance.argmin(1)
