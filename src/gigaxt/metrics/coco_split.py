"""An image of many objects as many images of few, with the same score.

faster-coco-eval holds all overlaps of an image's predictions with its objects: 10 GB and minutes for 20,000 of each.
But a prediction is only matched with an object that it overlaps, so clusters that nowhere overlap may stand in images
of their own. What else depends on the image is seen to before: of its predictions the best are taken, and scores become
ranks, so that equal ones keep their order.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from gigaxt.shapes.coco_masks import area_and_box

Json = dict[str, Any]
Boxes = NDArray[np.float64]
"""(boxes, 4) as x, y, width, height."""

SPLIT_CELLS = 1 << 20
"""Images with more pairs of a prediction and an object are split."""
GROUP_ITEMS = 1024
"""Predictions and objects of a new image, unless one cluster has more."""


def is_large(objects: list[Json], found: list[Json]) -> bool:
    """Whether an image is worth a split."""
    counts = [Counter(item["image_id"] for item in items) for items in (objects, found)]
    return any(count * counts[1][image] > SPLIT_CELLS for image, count in counts[0].items())


def take_best(found: list[Json], limit: int, *, by_category: bool) -> list[Json]:
    """The `limit` best predictions of each image, or of each category in it, with ranks as scores."""
    taken: Counter[tuple[int, int]] = Counter()
    best: list[Json] = []
    # Equal scores go by image, then by category where there is one list for all, then as given.
    for item in sorted(found, key=lambda item: (-item["score"], item["image_id"], item["category_id"], item["id"])):
        kind = (item["image_id"], item["category_id"] if by_category else 0)
        if taken[kind] < limit:
            taken[kind] += 1
            best.append(item | {"score": float(-len(best))})
    return best


def split(objects: list[Json], found: list[Json]) -> tuple[list[Json], list[Json], dict[int, int]]:
    """Give clusters of overlapping predictions and objects images of their own.

    Returns:
        Objects and predictions with new images, in the order given; and the old image's number by the new one's.
    """
    by_image: dict[int, tuple[list[Json], list[Json]]] = defaultdict(lambda: ([], []))
    for kind, items in enumerate((objects, found)):
        for item in items:
            by_image[item["image_id"]][kind].append(item)
    parts: tuple[list[Json], list[Json]] = ([], [])
    old_image: dict[int, int] = {}
    for image, kinds in by_image.items():
        groups = _group(*map(_boxes, kinds))
        first = len(old_image) + 1
        count = 1 + max(int(group_of.max()) for group_of in groups if len(group_of))
        old_image |= dict.fromkeys(range(first, first + count), image)
        for new, items, group_of in zip(parts, kinds, groups, strict=True):
            new += [item | {"image_id": first + int(group)} for item, group in zip(items, group_of, strict=True)]
    return *parts, old_image


def _boxes(items: list[Json]) -> Boxes:
    """Around masks, where there are masks: a given box need not hold all of its mask."""
    return np.array(
        [area_and_box(item["segmentation"])[1] if "segmentation" in item else item["bbox"] for item in items]
    ).reshape(-1, 4)


def _group(objects: Boxes, found: Boxes) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """A number for each object and each prediction, the same where they overlap, directly or by way of others."""
    pairs = overlapping(objects, found)
    n, total = len(objects), len(objects) + len(found)
    edges = coo_array((np.ones(len(pairs)), (pairs[:, 0], n + pairs[:, 1])), shape=(total, total))
    _, cluster = connected_components(edges, directed=False)
    group = ((np.cumsum(np.bincount(cluster)) - 1) // GROUP_ITEMS)[cluster]
    # Numbers without a gap: a large cluster counts for several groups.
    _, group = np.unique(group, return_inverse=True)
    return group[:n], group[n:]


def overlapping(first: Boxes, second: Boxes) -> NDArray[np.intp]:
    """All pairs of a box of each that overlap or touch, (pairs, 2)."""
    order = np.argsort(second[:, 0])
    second = second[order]
    width = second[:, 2].max(initial=0)
    pairs = [np.empty((0, 2), np.intp)]
    for i, (x, y, w, h) in enumerate(first):
        start, stop = np.searchsorted(second[:, 0], (x - width, np.nextafter(x + w, np.inf)))
        near = second[start:stop]
        hit = (near[:, 0] + near[:, 2] >= x) & (near[:, 1] <= y + h) & (near[:, 1] + near[:, 3] >= y)
        j = order[start:stop][hit]
        pairs.append(np.stack([np.full(len(j), i), j], axis=1))
    return np.concatenate(pairs)
