"""Mean and covariance of features as they come, and the Fréchet distance between two sets' own."""

from collections.abc import Iterable
from functools import reduce
from typing import NamedTuple

import numpy as np

from cascade.errors import UserError


class Moments(NamedTuple):
    """Count, mean and scatter of vectors, in float64; any two sets' can be merged.

    Attributes:
      count: N.
      mean: [D].
      scatter: [D, D], Σ (x − mean)(x − mean)ᵀ.
    """

    count: int
    mean: np.ndarray
    scatter: np.ndarray

    @classmethod
    def of(cls, features: np.ndarray) -> "Moments":
        """Of [N, D], N at least 1; the mean is taken away before anything is squared."""
        x = np.asarray(features, np.float64)
        mean = x.mean(0)
        return cls(len(x), mean, (x - mean).T @ (x - mean))

    def merge(self, other: "Moments") -> "Moments":
        """Of both sets together (Chan, Golub and LeVeque 1983), in any order, to within rounding.

        With δ = m₂ − m₁: m = m₁ + δ n₂/n and S = S₁ + S₂ + δδᵀ n₁n₂/n.
        """
        count = self.count + other.count
        delta = other.mean - self.mean
        mean = self.mean + delta * (other.count / count)
        between = np.outer(delta, delta) * (self.count * other.count / count)
        return Moments(count, mean, self.scatter + other.scatter + between)

    @property
    def covariance(self) -> np.ndarray:
        """Scatter / (N − 1), [D, D].

        Raises:
          UserError: of fewer than two.
        """
        if self.count < 2:
            raise UserError("One picture has no covariance; give at least 2.")
        return self.scatter / (self.count - 1)


def moments(parts: Iterable[np.ndarray]) -> Moments:
    """Of all rows of several [N_i, D], one part after another."""
    return reduce(Moments.merge, map(Moments.of, parts))


def frechet_distance(a: Moments, b: Moments) -> float:
    """|m_a − m_b|² + tr(C_a + C_b − 2 (C_a C_b)^½), squared 2-Wasserstein between Gaussians.

    Dowson and Landau 1982; of Inception's features it is the FID (Heusel et al. 2017). The
    eigenvalues of C_a C_b are those of the symmetric C_a^½ C_b C_a^½, so that no square root of a
    matrix that isn't symmetric is taken; they are 0 where rounding puts them below. It is biased
    upwards by a finite N, the more the smaller N; where N is no more than D, the covariance is
    singular, and numbers compare only where N is the same.

    Returns:
      At least 0.
    """
    delta = a.mean - b.mean
    values, vectors = np.linalg.eigh(a.covariance)
    root = vectors * np.sqrt(np.maximum(values, 0.0))  # C_a = root rootᵀ
    product = root.T @ b.covariance @ root
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh((product + product.T) / 2), 0.0)).sum()
    distance = delta @ delta + np.trace(a.covariance) + np.trace(b.covariance) - 2 * cross
    return max(float(distance), 0.0)


def few(a: Moments, b: Moments) -> str:
    """A sentence where there are too few pictures for their Fréchet distance; else ""."""
    width, least = len(a.mean), min(a.count, b.count)
    if least > width:
        return ""
    return (
        f"{least} pictures are no more than the {width} features, so the Fréchet distance is biased"
        f" upwards by much: compare it only with others of as many pictures, or take {width + 1} or"
        " more."
    )
