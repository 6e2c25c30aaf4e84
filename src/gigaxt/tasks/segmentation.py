"""A class for every pixel of a scene."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from gigaxt.datasets.manifest import Manifest, Row
from gigaxt.errors import DataError
from gigaxt.image.base import Image
from gigaxt.image.open import open_image
from gigaxt.targets import MaskTarget
from gigaxt.tasks.base import Evaluation, Tally, Task, WorstCase, as_table, worst_first
from gigaxt.tasks.bootstrap import about_groups, estimate

STRIP_ROWS = 512
"""Rows of a mask that are counted at once."""


class Segmentation(Task):
    """A class for every pixel, from scene-level confusion counts.

    Args:
        manifest: where the masks are.
        classes: classes of the model.
        ignore: the mask's value that is not scored.
        class_names: one name a class; None: numbers.
    """

    best = "mean_iou"
    metric_names = ("mean_iou", "pixel_accuracy", "f1_macro")
    images_per_call = 1  # the confusion of each image is wanted, for the worst cases

    def __init__(self, manifest: Manifest, classes: int, ignore: int, class_names: Sequence[str] | None = None) -> None:
        self.manifest, self.classes, self.ignore = manifest, classes, ignore
        self.class_names = tuple(class_names or map(str, range(classes)))

    def target(self, row: Row, image: Image) -> MaskTarget:
        """The mask, of one band on the grid of `image`."""
        mask = open_image(self._mask(row))
        if mask.dtype.kind not in "uib":
            raise DataError(f"{mask.name}: expected a mask of whole numbers, the classes; got {mask.dtype}")
        target = MaskTarget(mask)
        target.check(image)
        return target

    def tally(self) -> SegmentationTally:
        """A fresh, empty tally."""
        return SegmentationTally(self)

    def class_counts(self, split: str) -> list[float]:
        """Pixels of each class in the masks, read strip by strip."""
        counts = np.zeros(self.classes, dtype=np.float64)
        for row in self.manifest.split(split):
            mask = open_image(self._mask(row))
            for y in range(0, mask.height, STRIP_ROWS):
                values = mask.read(0, y, mask.width, min(STRIP_ROWS, mask.height - y))
                classes = values.astype(np.int64)
                scored = (classes != self.ignore) & (classes >= 0) & (classes < self.classes)
                counts += np.bincount(classes[scored], minlength=self.classes)
        return [float(count) for count in counts]

    def _mask(self, row: Row) -> Path:
        path = self.manifest.target_of(row)
        assert isinstance(path, Path), "a manifest of masks has no labels"
        return path


class _Counted(NamedTuple):
    """What came of one image."""

    row: Row
    confusion: Tensor
    """(classes, classes) float64; rows: true class."""
    loss_sum: float
    weight_sum: float


class SegmentationTally(Tally):
    """Confusion counts of each image of a split."""

    def __init__(self, task: Segmentation) -> None:
        self.task: Segmentation = task
        self.counted: list[_Counted] = []

    @property
    def rows(self) -> list[Row]:
        """The row of each image."""
        return [counted.row for counted in self.counted]

    def update(self, rows: Sequence[Row], targets: Sequence[Any], output: Mapping[str, Any]) -> None:
        """Add `{"loss_sum", "weight_sum", "confusion": (classes, classes)}` of one image."""
        (row,) = rows
        confusion = output["confusion"].detach().double().cpu()
        self.counted.append(_Counted(row, confusion, float(output["loss_sum"]), float(output["weight_sum"])))

    def select(self, keep: Callable[[Row], bool]) -> Self:
        """The tally of some images."""
        part = type(self)(self.task)
        part.counted = [counted for counted in self.counted if keep(counted.row)]
        return part

    def merged(self, other: Self) -> Self:
        """The tally of the images of both."""
        both = type(self)(self.task)
        both.counted = self.counted + other.counted
        return both

    def compute(self) -> Evaluation:
        """Mean IoU over the classes that occur or were answered, pixel accuracy, macro F1; IoU and F1 per class."""
        if not self.counted:
            raise DataError("there is no image to evaluate")
        each = torch.stack([counted.confusion for counted in self.counted])  # (images, classes, classes)
        groups = [counted.row.group or counted.row.case or str(counted.row.image) for counted in self.counted]
        metrics, intervals = estimate(partial(_scores, each), groups)
        confusion = each.sum(dim=0)
        right, true, answered = confusion.diag(), confusion.sum(1), confusion.sum(0)
        columns = {
            "iou": intersection_over_union(confusion),
            "f1": 2 * right / (true + answered),
            "recall": right / true,
            "precision": right / answered,
            "pixels": true,
        }
        weight = sum(counted.weight_sum for counted in self.counted)
        return Evaluation(
            images=len(self.counted),
            loss=sum(counted.loss_sum for counted in self.counted) / weight if weight else float("nan"),
            metrics=metrics,
            intervals=intervals,
            notes=about_groups(len(set(groups))),
            per_class=as_table(columns, self.task.class_names),
            confusion=confusion.tolist(),
            worst=worst_first([_worst_case(counted) for counted in self.counted if counted.confusion.sum() > 0]),
        )


def _scores(each: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """Scores (draws,) of images weighted by (images, draws), from their confusions (images, classes, classes)."""
    parts = each.diagonal(dim1=1, dim2=2), each.sum(2), each.sum(1)
    right, true, answered = (part.T @ weights for part in parts)  # (classes, draws)
    return {
        "mean_iou": (right / (true + answered - right)).nanmean(dim=0),
        "pixel_accuracy": right.sum(dim=0) / true.sum(dim=0),
        "f1_macro": (2 * right / (true + answered)).nanmean(dim=0),
    }


def _worst_case(counted: _Counted) -> WorstCase:
    confusion, row = counted.confusion, counted.row
    iou = float(intersection_over_union(confusion).nanmean())
    caption = f"mean IoU {iou:.3f}, pixel accuracy {float(confusion.diag().sum() / confusion.sum()):.3f}"
    return WorstCase(image=str(row.image), badness=1 - iou, caption=caption, mask=str(row.target_path))


def intersection_over_union(confusion: Tensor) -> Tensor:
    """IoU per class, (classes,), from counts (classes, classes); NaN where a class neither occurs nor was answered."""
    right = confusion.diag()
    return right / (confusion.sum(0) + confusion.sum(1) - right)
