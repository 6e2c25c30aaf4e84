"""Which detection is which object: the assignment of least total distance, as xView3's official program makes it.

That program fills the matrix of all distances, replaces those beyond the tolerance by `FAR_M` (`costly`) and gives it
to the Hungarian algorithm. Up to `DENSE_CELLS` the same is done here, so that of several assignments of equal cost, as
points on a line always have them, the official one is found.

For more points only pairs within the tolerance are looked at. They are enough: an assignment fills the smaller side, so
with k near pairs it costs their distances, and FAR_M for each of the others; and any k near pairs can be filled up to
such an assignment. The cheapest is thus the set of near pairs with the least sum of distance - FAR_M, in which a point
may stay alone. It falls apart into clusters that are out of each other's reach.

Without `costly` far pairs compete with near ones, and nothing can be left out.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components, min_weight_full_bipartite_matching
from scipy.spatial import KDTree, distance_matrix, minkowski_distance

from gigaxt.amounts import GIB
from gigaxt.errors import DataError

PIXEL_M = 10
"""Of xView3's scenes."""
FAR_M = 9999999 * PIXEL_M
"""What a pair beyond the tolerance costs in place of its distance."""
DENSE_CELLS = 1 << 22
"""Up to this many pairs all distances are held, 32 MiB. A real scene has a tenth of them."""
MAX_CELLS = 1 << 28
"""2 GiB of distances, twice that while they are solved, and a minute."""
BATCH_POINTS = 1024
"""Of clusters that are solved together. The solver's time for each point grows with it."""

Places = NDArray[np.float64]
"""(points, 2) as (row, col), pixels."""
Indices = NDArray[np.intp]


class Pairs(NamedTuple):
    """Detection `found[i]` and object `truth[i]`, `distance_m[i]` apart."""

    found: Indices
    truth: Indices
    distance_m: NDArray[np.float64]

    def take(self, which: NDArray[np.intp] | NDArray[np.bool_]) -> Pairs:
        """Some of them, by a mask or by indices."""
        return Pairs(self.found[which], self.truth[which], self.distance_m[which])


NO_PAIRS = Pairs(np.empty(0, np.intp), np.empty(0, np.intp), np.empty(0))


def join(parts: list[Pairs]) -> Pairs:
    """All pairs of all parts."""
    return Pairs(*(np.concatenate(columns) for columns in zip(NO_PAIRS, *parts, strict=True)))


def match(found: Places, truth: Places, tolerance_m: float, *, costly: bool) -> Pairs:
    """The pairs of the best assignment that are nearer than `tolerance_m`.

    Args:
        found: places of the detections.
        truth: places of the objects.
        tolerance_m: a pair just as far apart takes part in the assignment, but is no match.
        costly: pairs beyond the tolerance cost `FAR_M`, whatever their distance.

    Raises:
        DataError: without `costly`, there are more pairs than fit into memory.
    """
    cells = len(found) * len(truth)
    if not cells:
        return NO_PAIRS
    if cells > MAX_CELLS and not costly:
        raise DataError(
            f"expected at most {MAX_CELLS} pairs in a scene with `costly_dist=False`, got {len(found)} predictions x"
            f" {len(truth)} objects, {cells * 8 / GIB:.0f} GiB of distances; leave `costly_dist` True"
        )
    if cells <= DENSE_CELLS or not costly:
        pairs = _match_all(found, truth, tolerance_m, costly)
    else:
        pairs = _match_near(found, truth, tolerance_m)
    return pairs.take(pairs.distance_m < tolerance_m)


def _match_all(found: Places, truth: Places, tolerance_m: float, costly: bool) -> Pairs:
    distance_m = distance_matrix(found, truth) * PIXEL_M
    if costly:
        distance_m[distance_m > tolerance_m] = FAR_M
    i, j = linear_sum_assignment(distance_m)
    return Pairs(i, j, distance_m[i, j])


def _match_near(found: Places, truth: Places, tolerance_m: float) -> Pairs:
    """The same, without the pairs beyond the tolerance; memory and time grow with the pairs within."""
    pairs = _near_pairs(found, truth, tolerance_m)
    n = len(found)
    edges = coo_array((np.ones(len(pairs.found)), (pairs.found, n + pairs.truth)), shape=[n + len(truth)] * 2)
    count, cluster = connected_components(edges, directed=False)
    # Clusters are small and many, and a call of the solver is slow to start: some are solved together.
    batch = (np.cumsum(np.bincount(cluster[:n], minlength=count)) // BATCH_POINTS)[cluster[pairs.found]]
    order = np.argsort(batch, kind="stable")
    cuts = np.flatnonzero(np.diff(batch[order])) + 1
    return join([_cheapest(pairs.take(part)) for part in np.split(order, cuts) if len(part)])


def _near_pairs(found: Places, truth: Places, tolerance_m: float) -> Pairs:
    """All pairs within the tolerance."""
    radius = tolerance_m / PIXEL_M * (1 + 1e-9)  # the tree rounds otherwise than the official program
    near = KDTree(found).sparse_distance_matrix(KDTree(truth), radius, output_type="ndarray")
    i, j = near["i"].astype(np.intp), near["j"].astype(np.intp)
    pairs = Pairs(i, j, minkowski_distance(found[i], truth[j]) * PIXEL_M)
    return pairs.take(pairs.distance_m <= tolerance_m)


def _cheapest(pairs: Pairs) -> Pairs:
    """Of the given pairs those with the least sum of distance - `FAR_M`, every point in one of them at most."""
    rows, i = np.unique(pairs.found, return_inverse=True)
    columns, j = np.unique(pairs.truth, return_inverse=True)
    # A detection has a column of its own for staying alone. All cost one more: the solver takes a zero for no pair.
    alone = np.arange(len(rows))
    cost = np.concatenate([pairs.distance_m + 1, np.full(len(rows), FAR_M + 1.0)])
    row = np.concatenate([i, alone], dtype=np.int32)  # the solver knows no other integers
    column = np.concatenate([j, len(columns) + alone], dtype=np.int32)
    weights = coo_array((cost, (row, column)), shape=(len(rows), len(columns) + len(rows)))
    solved_rows, solved_columns = min_weight_full_bipartite_matching(weights.tocsr())
    partner = np.empty(len(rows), np.intp)
    partner[solved_rows] = solved_columns
    return pairs.take(partner[i] == j)
