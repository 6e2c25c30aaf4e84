"""Non-maximum suppression for scenes with any number of candidates, in memory that grows with their number alone."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torchvision.ops import nms

Boxes = NDArray[np.float64]
"""(n, 4) as left, top, right, bottom."""

CELLS_A_BOX = 8
"""Cells of the grid that a box touches, on average, at most."""
GROUP = 1024
"""Candidates that are compared with each other at once, unless one cluster has more."""


def suppress(
    boxes_xyxy: Boxes, scores: NDArray[np.floating], iou: float, classes: NDArray[np.int64] | None = None
) -> NDArray[np.int64]:
    """The candidates that no better one overlaps by more than `iou`, best first.

    Greedy, as torchvision's `nms` (equal scores in the order given), whose result it equals: candidates are cut into
    clusters that cannot suppress each other, and each is handed to it alone. Many candidates on top of each other are
    one cluster, which takes time with the square of its size, but no memory.

    Args:
        boxes_xyxy: (n, 4) float64.
        scores: (n,).
        iou: threshold, 0 to 1.
        classes: (n,), only candidates of one class suppress each other; None: all do.

    Returns:
        Indices of the kept, int64.
    """
    if not len(boxes_xyxy):
        return np.zeros(0, dtype=np.int64)
    cluster = _clusters(boxes_xyxy, iou, np.zeros(len(boxes_xyxy), np.int64) if classes is None else classes)
    # Clusters in turn, several to a group: those of one group cannot suppress each other either.
    order = np.argsort(cluster, kind="stable")
    sizes = np.bincount(cluster)
    group = (np.cumsum(sizes) - 1) // GROUP
    edges = np.flatnonzero(np.diff(np.repeat(group, sizes), prepend=-1, append=-1))
    boxes, score = torch.from_numpy(boxes_xyxy), torch.from_numpy(np.ascontiguousarray(scores))
    kept = []
    for start, stop in pairwise(edges.tolist()):
        part = torch.from_numpy(order[start:stop])
        if classes is None:
            kept.append(part[nms(boxes[part], score[part], iou)].numpy())
            continue
        own = classes[part.numpy()]
        for class_ in np.unique(own):
            same = part[torch.from_numpy(own == class_)]
            kept.append(same[nms(boxes[same], score[same], iou)].numpy())
    indices = np.sort(np.concatenate(kept))
    return np.asarray(indices[np.argsort(-scores[indices], kind="stable")], dtype=np.int64)


def _clusters(boxes_xyxy: Boxes, iou: float, classes: NDArray[np.int64]) -> NDArray[np.int64]:
    """A number for each candidate, the same for any two of one class that overlap by more than `iou`.

    Boxes are first shrunk around their centres. Two that overlap by more than t share more than t of the wider one's
    width w1, so their centres are less than (w1 + w2) / 2 - t w1 <= (1 - t)(w1 + w2) / 2 apart, and so in y: shrunk by
    1 - t they overlap still. What then touches one cell of a grid is taken for one cluster.
    """
    centre, size = (boxes_xyxy[:, :2] + boxes_xyxy[:, 2:]) / 2, boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]
    half = size / 2 * (1 - iou) * (1 + 1e-9)
    origin = (centre - half).min(axis=0)
    low, high = centre - half - origin, centre + half - origin
    cell = max(float(np.median(size)) / 8, float(high.max()) / 2**20, 1e-9)
    while True:
        first, last = (low // cell).astype(np.int64), (high // cell).astype(np.int64)
        counts = last - first + 1  # (n, 2) as (cols, rows)
        touched = counts.prod(axis=1)
        if touched.sum() <= CELLS_A_BOX * len(boxes_xyxy):
            break
        cell *= 1.5
    box = np.repeat(np.arange(len(touched)), touched)
    place = np.arange(len(box)) - np.repeat(np.cumsum(touched) - touched, touched)
    col, row = first[box, 0] + place % counts[box, 0], first[box, 1] + place // counts[box, 0]
    _, own = np.unique(classes, return_inverse=True)
    keys = (own[box] * (int(last[:, 1].max()) + 1) + row) * (int(last[:, 0].max()) + 1) + col
    _, number = np.unique(keys, return_inverse=True)
    n, total = len(touched), len(touched) + int(number.max()) + 1
    links = coo_array((np.ones(len(box), np.int8), (box, n + number)), shape=(total, total))
    _, cluster = connected_components(links, directed=False)
    _, cluster = np.unique(cluster[:n], return_inverse=True)
    return np.asarray(cluster, dtype=np.int64)
