"""Which predicted boxes find an object, as COCO matches them; for scenes with any number of boxes."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gigaxt.metrics.coco_split import overlapping

Boxes = NDArray[np.float64]
"""(n, 4) as left, top, right, bottom."""

FOUND, FALSE, IGNORED = 1, 0, -1
"""A prediction finds an object, finds none, or lies in an area that does not count."""


def match(
    found_xyxy: Boxes,
    found_classes: NDArray[np.int64],
    true_xyxy: Boxes,
    true_classes: NDArray[np.int64],
    ignored: NDArray[np.bool_],
    iou: float = 0.5,
) -> NDArray[np.int64]:
    """Give each prediction the free object of its class that it overlaps most, if by `iou` or more; the best first.

    Args:
        found_xyxy: (n, 4), best first.
        found_classes: (n,)
        true_xyxy: (m, 4)
        true_classes: (m,)
        ignored: (m,) areas, such as crowds, of which any number of predictions may lie in one: then their own area is
            what counts, and not the union.
        iou: least overlap.

    Returns:
        (n,) `FOUND`, `FALSE` or `IGNORED`.
    """
    result = np.full(len(found_xyxy), FALSE, dtype=np.int64)
    true_xywh, found_xywh = (_xywh(boxes) for boxes in (true_xyxy, found_xyxy))
    true, found = overlapping(true_xywh, found_xywh).T
    same = true_classes[true] == found_classes[found]
    true, found = true[same], found[same]
    low = np.maximum(true_xyxy[true, :2], found_xyxy[found, :2])
    high = np.minimum(true_xyxy[true, 2:], found_xyxy[found, 2:])
    shared = np.clip(high - low, 0, None).prod(axis=1)
    own = found_xywh[found, 2:].prod(axis=1)
    union = np.where(ignored[true], own, own + true_xywh[true, 2:].prod(axis=1) - shared)
    overlap = np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)
    enough = overlap >= iou
    true, found, overlap = true[enough], found[enough], overlap[enough]
    free = np.ones(len(true_xyxy), dtype=np.bool_)
    # Of each prediction, in turn: real objects before areas, the largest overlap first.
    for i in np.lexsort((-overlap, ignored[true], found)).tolist():
        prediction, object_ = int(found[i]), int(true[i])
        if result[prediction] == FALSE and free[object_]:
            result[prediction] = IGNORED if ignored[object_] else FOUND
            free[object_] = ignored[object_]
    return result


def _xywh(boxes_xyxy: Boxes) -> Boxes:
    return np.concatenate([boxes_xyxy[:, :2], boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]], axis=1)
