"""COCO's average precision of weighted images, for its intervals: images are matched once, and counts are drawn.

Equal to COCO's of a data set that has each image so often, but for the order of equal scores within one image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gigaxt.datasets.boxes import RowBoxes
from gigaxt.found.objects import Objects
from gigaxt.tasks.box_matching import FALSE, FOUND, match

IOUS = np.linspace(0.5, 0.95, 10)
RECALLS = torch.from_numpy(np.linspace(0, 1, 101))  # to the last bit those of COCO
NUMBERS_AT_ONCE = 1 << 20
"""Of predictions times draws."""


class Ranked(NamedTuple):
    """The n predictions of a class in all images, best first."""

    image: Tensor
    """(n,) int64."""
    found: Tensor
    """(overlaps, n) float64: 1 where an object is found."""
    wrong: Tensor
    """(overlaps, n) float64: 1 where none is."""
    true: Tensor
    """(images,) float64: objects to find."""


def rank(images: Sequence[tuple[RowBoxes, Objects]], classes: int, most: int) -> list[Ranked]:
    """Match the predictions of each image at each of `IOUS`.

    Args:
        images: truth and predictions, these best first.
        classes: how many there are.
        most: predictions of an image and class that count.
    """
    matched, kept = [], []
    for truth, objects in images:
        place = np.zeros(len(objects), np.int64)
        for k in range(classes):
            own = objects.classes == k
            place[own] = np.arange(own.sum())
        part = objects.take(place < most)
        assert part.boxes_xyxy is not None
        boxes = part.boxes_xyxy, part.classes, truth.boxes_xyxy, truth.classes, truth.crowd
        matched.append(np.stack([match(*boxes, iou) for iou in IOUS.tolist()]))
        kept.append(part)
    image = np.repeat(np.arange(len(images)), [len(part) for part in kept])
    scores = np.concatenate([part.scores for part in kept])
    class_of, state = np.concatenate([part.classes for part in kept]), np.concatenate(matched, axis=1)
    order = np.argsort(-scores, kind="stable")
    return [_of_class(k, images, image, class_of, state, order) for k in range(classes)]


def _of_class(
    k: int,
    images: Sequence[tuple[RowBoxes, Objects]],
    image: NDArray[np.int64],
    class_of: NDArray[np.int64],
    state: NDArray[np.int64],
    order: NDArray[np.int64],
) -> Ranked:
    rows = order[class_of[order] == k]
    true = [int(((truth.classes == k) & ~truth.crowd).sum()) for truth, _ in images]
    found, wrong = (torch.from_numpy((state[:, rows] == kind).astype(np.float64)) for kind in (FOUND, FALSE))
    return Ranked(torch.from_numpy(image[rows]), found, wrong, torch.tensor(true, dtype=torch.float64))


def average_precision(ranked: Sequence[Ranked], weights: Tensor) -> dict[str, Tensor]:
    """`AP` and `AP50` (draws,) of images weighted by (images, draws); NaN where there is no object."""
    largest = max((len(part.image) for part in ranked), default=0)
    blocks = weights.split(max(1, NUMBERS_AT_ONCE // max(largest, 1)), dim=1)
    # (classes, overlaps, draws)
    each = torch.cat([torch.stack([_of_draws(part, block) for part in ranked]) for block in blocks], dim=2)
    return {"AP": each.nanmean(dim=(0, 1)), "AP50": each[:, 0].nanmean(dim=0)}


def _of_draws(ranked: Ranked, weights: Tensor) -> Tensor:
    """(overlaps, draws) of one class."""
    true = ranked.true @ weights  # (draws,)
    often = weights.T[:, ranked.image]  # (draws, n)
    result = []
    for found, wrong in zip(ranked.found, ranked.wrong, strict=True):
        right, false = (often * found).cumsum(1), (often * wrong).cumsum(1)
        precision = right / (right + false).clamp(min=1)
        best = torch.cat([precision.flip(1).cummax(1).values.flip(1), precision.new_zeros(len(precision), 1)], dim=1)
        recalls = RECALLS.expand(len(right), -1).contiguous()
        at = torch.searchsorted(right / true[:, None].clamp(min=1), recalls)  # n, where that recall is not reached
        result.append(best.gather(1, at).mean(dim=1).where(true > 0, torch.nan))
    return torch.stack(result)
