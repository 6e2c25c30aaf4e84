"""Intervals of scores: the same score of many samples of the groups, drawn with repetition.

Efron and Tibshirani: An Introduction to the Bootstrap (1993), percentile intervals. Whole groups are drawn (the images
of a patient, the scenes of a site), since what belongs together errs together: drawing images would make intervals too
narrow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

DRAWS = 1000
LEVEL = 0.95
SEED = 0
"""Of the draws: the same answers have the same intervals."""
FEW_GROUPS = 10
"""Of fewer groups intervals are said to be too narrow."""
NUMBERS_AT_ONCE = 1 << 17
"""Weights that are held at once: as many as a processor keeps at hand."""

Scores = Callable[[Tensor], Mapping[str, Tensor]]
"""Weights (n, draws) of n cases -> each score of each draw, (draws,), NaN where it is not defined."""


def estimate(scores: Scores, groups: Sequence[str]) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    """Scores of all cases, and the intervals in which the middle 95% of 1,000 draws lie.

    Args:
        scores: of weighted cases; a case that was drawn twice has weight 2.
        groups: of each case.

    Returns:
        Score -> value, NaN where it is not defined; score -> (low, high), without those that are not defined, and empty
        where there is one group only.
    """
    parts = [scores(weights) for weights in weightings(groups)]
    drawn = {name: torch.cat([part[name] for part in parts]).numpy() for name in parts[0]}
    values = {name: float(found[0]) for name, found in drawn.items()}
    intervals = {}
    for name, found in drawn.items():
        # A draw may lack a class, and so a score.
        defined = found[1:][np.isfinite(found[1:])]
        if len(defined) and np.isfinite(values[name]):
            low, high = np.quantile(defined, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
            intervals[name] = (float(low), float(high))
    return values, intervals


def weightings(groups: Sequence[str]) -> Iterator[Tensor]:
    """Blocks (n, b) float64 of weightings: all cases once, then how often each was drawn in each draw.

    No draws where there is one group only: it would be drawn each time.
    """
    names, members = np.unique(np.asarray(groups, dtype=str), return_inverse=True)
    yield torch.ones(len(members), 1, dtype=torch.float64)
    random = np.random.default_rng(SEED)
    left = DRAWS if len(names) > 1 else 0
    while left:
        block = min(left, max(1, NUMBERS_AT_ONCE // len(members)))
        counts = random.multinomial(len(names), np.full(len(names), 1 / len(names)), size=block)
        yield torch.from_numpy(counts.T[members].astype(np.float64))
        left -= block


def about_groups(count: int) -> list[str]:
    """What is to be said of intervals of so many groups."""
    if count == 1:
        return ["no intervals: all is of one group"]
    return [f"intervals are of {count} groups only, and so too narrow"] if count < FEW_GROUPS else []
