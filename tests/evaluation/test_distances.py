"""Laws of the distances between sets of features."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cascade.errors import UserError
from cascade.evaluation import neighbours
from cascade.evaluation.alignment import alignment
from cascade.evaluation.moments import Moments, few, frechet_distance, moments
from cascade.evaluation.neighbours import kernel_distance, precision_recall, unbiased
from cascade.evaluation.retrieval import among, direction, ranks

SEEDS = st.integers(0, 2**32 - 1)


def rotation(rng, width):
    """A random orthogonal matrix."""
    return np.linalg.qr(rng.normal(size=(width, width)))[0]


def with_moments(rng, count, mean, covariance):
    """[count, D] whose sample mean and covariance are these, to within rounding."""
    x = rng.normal(size=(count, len(mean)))
    x -= x.mean(0)
    x = x @ np.linalg.inv(np.linalg.cholesky(np.atleast_2d(np.cov(x.T)))).T
    return mean + x @ np.linalg.cholesky(covariance).T


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(1, 5), SEEDS)
def test_streamed_moments_are_those_of_all_at_once(sizes, width, seed):
    rng = np.random.default_rng(seed)
    parts = [rng.normal(1e3, 1.0, (size, width)) for size in sizes]
    whole, x = moments(parts), np.concatenate(parts)
    np.testing.assert_allclose(whole.mean, x.mean(0), rtol=1e-12)
    if len(x) > 1:
        np.testing.assert_allclose(
            whole.covariance, np.cov(x.T).reshape(width, width), rtol=1e-10, atol=1e-10
        )
    # As several processes would: each its own parts, then all together, in any order.
    halves = [moments(parts[i::2]) for i in range(min(2, len(parts)))]
    merged = halves[-1]
    for half in halves[:-1]:
        merged = merged.merge(half)
    assert merged.count == whole.count
    np.testing.assert_allclose(merged.mean, whole.mean, rtol=1e-12)
    np.testing.assert_allclose(merged.scatter, whole.scatter, rtol=1e-10, atol=1e-9)


@given(st.integers(1, 6), SEEDS)
def test_frechet_distance_of_commuting_gaussians_is_closed(width, seed):
    """With C_a and C_b diagonal in one basis: |Δm|² + Σ (√a_i − √b_i)²."""
    rng = np.random.default_rng(seed)
    basis, (a, b) = rotation(rng, width), rng.uniform(0.1, 4.0, (2, width))
    means = rng.normal(size=(2, width))
    sets = [
        Moments.of(with_moments(rng, 4 * width + 2, mean, basis * values @ basis.T))
        for mean, values in zip(means, (a, b), strict=True)
    ]
    wanted = ((means[0] - means[1]) ** 2).sum() + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    np.testing.assert_allclose(frechet_distance(*sets), wanted, rtol=1e-9, atol=1e-9)


def test_frechet_distance_of_two_general_gaussians_in_the_plane():
    """Where they don't commute: tr (C_a C_b)^½ = √(tr C_a C_b + 2 √det C_a C_b) in 2 dimensions."""
    rng = np.random.default_rng(0)
    a, b = (m @ m.T for m in rng.normal(size=(2, 2, 2)))
    sets = [Moments.of(with_moments(rng, 9, np.zeros(2), c)) for c in (a, b)]
    root = np.sqrt(np.trace(a @ b) + 2 * np.sqrt(np.linalg.det(a) * np.linalg.det(b)))
    wanted = np.trace(a) + np.trace(b) - 2 * root
    np.testing.assert_allclose(frechet_distance(*sets), wanted, rtol=1e-10)


@given(st.integers(2, 30), st.integers(1, 8), SEEDS)
def test_frechet_distance_laws(count, width, seed):
    """0 of a set with itself, symmetric, and blind to what moves or turns both; N ≤ D as well."""
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(2, count, width))
    a, b = Moments.of(x), Moments.of(y)
    scale = np.trace(a.covariance) + np.trace(b.covariance)
    close = {"rtol": 1e-6, "atol": 1e-6 * scale}
    np.testing.assert_allclose(frechet_distance(a, a), 0.0, atol=1e-7 * scale)
    distance = frechet_distance(a, b)
    np.testing.assert_allclose(frechet_distance(b, a), distance, **close)
    turn = rotation(rng, width)
    moved = frechet_distance(Moments.of(x @ turn + 5.0), Moments.of(y @ turn + 5.0))
    np.testing.assert_allclose(moved, distance, **close)
    np.testing.assert_allclose(
        frechet_distance(a, Moments.of(x + 2.0)), 4.0 * width, **close
    )  # only the mean differs


def test_too_few_pictures_are_said():
    rng = np.random.default_rng(0)
    small, large = (Moments.of(rng.normal(size=(n, 4))) for n in (4, 5))
    assert "4 pictures are no more than the 4 features" in few(small, large)
    assert few(large, large) == ""
    with pytest.raises(UserError, match="at least 2"):
        frechet_distance(Moments.of(np.ones((1, 4))), large)


def test_the_kernel_distance_is_unbiased():
    """Its mean over every pair of samples is the distance between what they are drawn from.

    Samples of 2 without order from 5 points, taken apart from each other: the expectation of each
    term is the mean over all pairs of different points, which the definition on all 5 gives.
    """
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 5, 3))
    pairs = list(itertools.combinations(range(5), 2))
    mean = np.mean([unbiased(x[list(i)], y[list(j)]) for i in pairs for j in pairs])
    np.testing.assert_allclose(mean, unbiased(x, y), rtol=1e-10)


def test_the_kernel_distance_of_one_distribution_is_about_its_error_from_0():
    rng = np.random.default_rng(1)
    off = []
    for seed in range(40):
        found = kernel_distance(*rng.normal(size=(2, 200, 8)), seed)
        off.append(found.value / found.error)
    # Independent, so their mean is within 4 / √40 but for once in many thousand seeds.
    assert abs(np.mean(off)) < 4 / np.sqrt(40) and min(off) < 0 < max(off)
    far = kernel_distance(rng.normal(size=(200, 8)), rng.normal(0.5, 1, (200, 8)))
    assert far.value > 4 * far.error


def test_kernel_distance_subsets(monkeypatch):
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=(50, 3)), rng.normal(size=(20, 3))
    assert kernel_distance(x, y) == kernel_distance(x, y)
    assert kernel_distance(x[:3], y).error is None
    sizes = []
    monkeypatch.setattr(neighbours, "SUBSET", 4)
    monkeypatch.setattr(neighbours, "SUBSETS", 2)
    monkeypatch.setattr(neighbours, "unbiased", lambda a, b: sizes.append((len(a), len(b))) or 0.0)
    kernel_distance(x, y)
    assert sizes == [(4, 4)] * 5
    with pytest.raises(UserError, match="at least 2"):
        kernel_distance(x[:1], y)


def grid(side, at=0.0):
    return np.stack(np.meshgrid(*[np.arange(side) + at] * 2), -1).reshape(-1, 2)


def test_precision_and_recall_of_what_is_known(monkeypatch):
    monkeypatch.setattr(neighbours, "BLOCK", 7)  # several blocks
    real = grid(6)
    assert precision_recall(real, real) == (1.0, 1.0)
    assert precision_recall(real + 100, real) == (0.0, 0.0)
    dropped = real[real[:, 0] < 3]  # half of what there is: precise, but not all of it
    precision, recall = precision_recall(dropped, real)
    assert precision == 1.0 and 0.5 <= recall < 0.8
    wider = np.concatenate([real, real + 100])
    assert precision_recall(wider, real) == (0.5, 1.0)
    with pytest.raises(UserError, match="at least 4"):
        precision_recall(real[:3], real)


def test_radii_reach_the_kth_other():
    x = np.array([[0.0], [1.0], [3.0], [7.0]])
    np.testing.assert_allclose(neighbours.radii(x, 1), [1, 1, 4, 16])
    np.testing.assert_allclose(neighbours.radii(x, 2), [9, 4, 9, 36])


@given(SEEDS)
def test_precision_and_recall_are_blind_to_scale_and_turns(seed):
    rng = np.random.default_rng(seed)
    drawn, real = rng.normal(size=(2, 20, 3))
    turn = 3.0 * rotation(rng, 3)
    assert precision_recall(drawn, real) == precision_recall(drawn @ turn, real @ turn)
    assert precision_recall(drawn, real) == precision_recall(real, drawn)[::-1]


@given(st.integers(1, 6), st.integers(1, 12), st.integers(1, 4), SEEDS)
def test_ranks_are_the_definitions(drawn, known, names, seed):
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(drawn, 3)), rng.normal(size=(known, 3))
    called = [str(n) for n in rng.integers(0, names, known)]
    asked = [called[i] for i in rng.integers(0, known, drawn)]
    plain = []
    for picture, name in zip(x, asked, strict=True):
        least = {
            other: min(((picture - y[i]) ** 2).sum() for i in range(known) if called[i] == other)
            for other in called
        }
        plain.append(sum(d <= least[name] for d in least.values()) - 1)
    found = ranks(x, asked, y, called)
    assert found.tolist() == plain
    assert among(found, 1) <= among(found, 5)


def test_pictures_that_are_all_alike_find_nothing():
    names, alike, own = list("abcd"), np.ones((4, 3)), np.eye(4)
    assert ranks(alike, names, alike, names).tolist() == [3, 3, 3, 3]
    assert ranks(direction(own * 7), names, direction(own), names).tolist() == [0, 0, 0, 0]
    with pytest.raises(UserError, match="called 'x'"):
        ranks(own, list("abcx"), own, names)


class Letters:
    """A text encoder whose states are one-hot letters."""

    def encode(self, texts):
        states = np.zeros((len(texts), 3, 26))
        mask = np.zeros((len(texts), 3), bool)
        for i, text in enumerate(texts):
            for j, letter in enumerate(text):
                states[i, j, ord(letter) - ord("a")] = mask[i, j] = True
        return states, mask


def test_alignment_is_1_for_the_right_pictures_and_chance_for_shuffled_ones():
    known, captions = np.eye(4), ["a", "b", "cd", ""]
    right = alignment(known[:3], captions[:3], known, captions, Letters())
    np.testing.assert_allclose(right, (1.0, 0.0), atol=1e-12)  # no text is like another's
    shuffled = alignment(known[[1, 2, 0]], captions[:3], known, captions, Letters())
    np.testing.assert_allclose(shuffled, (0.0, 1 / 2), atol=1e-12)
    half = alignment(known[:1], ["ab"], known, captions, Letters())
    np.testing.assert_allclose(half.value, np.sqrt(0.5))
    assert half.chance is None
