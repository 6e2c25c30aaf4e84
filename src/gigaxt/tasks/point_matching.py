"""Which detection is which object, and how good all detections of a class are at any threshold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import KDTree

WRONG, LEFT_OUT = -1, -2
"""What a detection of nothing is matched with, and one of an object that does not count."""


def match_points(
    found: NDArray[np.float64], truth: NDArray[np.float64], ignored: NDArray[np.bool_], tolerance_px: float
) -> NDArray[np.int64]:
    """Give each detection, best first, the nearest object that is still free.

    So the matches of the best k detections do not depend on the others, and hold at every threshold.

    Args:
        found: (n, 2) places of the detections, best first.
        truth: (m, 2) places of the objects.
        ignored: (m,) objects that do not count. They take what no other object is there for, any number of detections.
        tolerance_px: a match is nearer than this.

    Returns:
        (n,) the number of the object, `WRONG` or `LEFT_OUT`.
    """
    result = np.full(len(found), WRONG, np.int64)
    if not len(found) or not len(truth):
        return result
    tree, free = KDTree(truth), ~ignored
    for i, near in enumerate(tree.query_ball_point(found, tolerance_px)):
        distances = np.linalg.norm(truth[near] - found[i], axis=1)
        order = [near[k] for k in np.argsort(distances, kind="stable") if distances[k] < tolerance_px]
        own = next((j for j in order if free[j]), None)
        if own is not None:
            result[i], free[own] = own, False
        elif any(ignored[j] for j in order):
            result[i] = LEFT_OUT
    return result


class Curve(NamedTuple):
    """Detections of a class, best first, and how many objects there are."""

    scores: NDArray[np.float64]
    right: NDArray[np.bool_]
    objects: int

    @classmethod
    def of(cls, scores: Sequence[float] | NDArray[np.float64], right: NDArray[np.bool_], objects: int) -> Curve:
        """Those given, in any order."""
        values = np.asarray(scores, dtype=np.float64)
        order = np.argsort(-values, kind="stable")
        return cls(values[order], np.asarray(right, dtype=np.bool_)[order], objects)

    def best_threshold(self, default: float) -> float:
        """Half way between the detections that the best F1 parts; `default` where nothing is right."""
        if not self.right.any():
            return default
        count = np.arange(1, len(self.scores) + 1)
        f1 = 2 * np.cumsum(self.right) / (count + self.objects)
        last = np.append(self.scores[1:] < self.scores[:-1], True)  # equal scores go together
        k = int(np.where(last, f1, -1.0).argmax())
        below = self.scores[k + 1] if k + 1 < len(self.scores) else 0.0
        return float((self.scores[k] + below) / 2)

    def average_precision(self) -> float:
        """Area under precision over recall, where precision is the best at that recall or more; NaN of no objects."""
        if not self.objects:
            return float("nan")
        right = np.cumsum(self.right)
        precision = right / np.arange(1, len(self.scores) + 1)
        best = np.maximum.accumulate(precision[::-1])[::-1]
        return float(best[self.right].sum() / self.objects)


def flag_threshold(chances: NDArray[np.float64], truth: NDArray[np.float64], default: float) -> float:
    """The chance from which on a flag is best set, by F1, from known cases (n,) of chances and of 0 or 1."""
    return Curve.of(chances, truth > 0.5, int((truth > 0.5).sum())).best_threshold(default)
