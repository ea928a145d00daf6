"""Searches the levels at which a sampler of few steps comes nearest to a fine solution."""

from collections.abc import Callable, Sequence

import numpy as np

FIRST_MOVE, LAST_MOVE = 0.4, 0.02  # parts of the gap between two levels


def search_levels(
    loss: Callable[[np.ndarray], float],
    starts: Sequence[np.ndarray],
    rounds: int,
    tried: Callable[[float], None] = lambda best: None,
) -> tuple[np.ndarray, float]:
    """Levels of small loss, from the best of `starts` on, by a pattern search.

    A move takes one level, or all at once, a part of the way to the neighbour above or below it, so
    that levels stay in order whatever is tried. A move that helps is kept and grows by a half,
    one that doesn't in either direction shrinks to half; the search is over after `rounds` of all
    moves, or when all have become small. The loss never rises. The first and the last level stay:
    z is noise at the one, and at the other nothing is evaluated.

    The aim is that of Align Your Steps (Sabour et al. 2024) and AutoDiffusion (Li et al. 2023), to
    fit the levels to one model and sampler; what is minimised is the caller's.

    Args:
      loss: of levels [N + 1], float64; NaN counts as infinite.
      starts: one or more, increasing [N + 1], N >= 2.
      rounds: at most 2N losses each.
      tried: is called with the least loss so far after each.

    Returns:
      The levels and their loss.
    """
    best, least = np.asarray(starts[0], np.float64), np.inf

    def better(levels) -> bool:
        nonlocal best, least
        value = float(loss(levels))
        won = value < least
        if won:
            best, least = levels, value
        tried(least)
        return won

    for start in starts:
        better(np.asarray(start, np.float64))
    inner = len(best) - 2
    directions = np.eye(inner) if inner == 1 else np.vstack([np.eye(inner), np.ones(inner)])
    moves = np.full(len(directions), FIRST_MOVE)
    for _ in range(rounds):
        if moves.max() < LAST_MOVE:
            break
        for which, direction in enumerate(directions):
            part = moves[which] * direction
            gaps = np.diff(best)
            up, down = best.copy(), best.copy()
            up[1:-1] += part * gaps[1:]
            down[1:-1] -= part * gaps[:-1]
            won = better(up) or better(down)
            moves[which] = min(1.5 * moves[which], FIRST_MOVE) if won else 0.5 * moves[which]
    return best, least


def losses_at_most(starts: int, steps: int, rounds: int) -> int:
    """How many losses `search_levels` may take, for a progress bar."""
    return starts + rounds * 2 * (1 if steps == 2 else steps)
