"""A class for every pixel of a scene."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gigaxt.datasets.manifest import Manifest, Row
from gigaxt.errors import DataError
from gigaxt.image.base import Image
from gigaxt.image.open import open_image
from gigaxt.scenes import check_mask
from gigaxt.tasks.base import Evaluation, Tally, Task, WorstCase, worst_first

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

    def target(self, row: Row, image: Image) -> Image:
        """The mask as an Image of one band on the grid of `image`."""
        mask = open_image(self._mask(row))
        if mask.dtype.kind not in "uib":
            raise DataError(f"{mask.name}: expected a mask of whole numbers, the classes; got {mask.dtype}")
        check_mask(image, mask)
        return mask

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


class SegmentationTally(Tally):
    """Confusion counts of a split, and each image's own mean IoU."""

    def __init__(self, task: Segmentation) -> None:
        self.task = task
        self.images = 0
        self.confusion = torch.zeros(task.classes, task.classes, dtype=torch.float64)  # rows: true class
        self.loss_sum = self.weight_sum = 0.0
        self.cases: list[WorstCase] = []

    def update(self, rows: Sequence[Row], targets: Sequence[Any], output: Mapping[str, Any]) -> None:
        """Add `{"loss_sum", "weight_sum", "confusion": (classes, classes)}` of one image."""
        (row,) = rows
        confusion = output["confusion"].detach().double().cpu()
        self.images += 1
        self.confusion += confusion
        self.loss_sum += float(output["loss_sum"])
        self.weight_sum += float(output["weight_sum"])
        if confusion.sum() > 0:
            iou = float(intersection_over_union(confusion).nanmean())
            accuracy = float(confusion.diag().sum() / confusion.sum())
            caption = f"mean IoU {iou:.3f}, pixel accuracy {accuracy:.3f}"
            mask = str(row.mask)
            self.cases.append(WorstCase(image=str(row.image), badness=1 - iou, caption=caption, mask=mask))
        self.cases = worst_first(self.cases)

    def compute(self) -> Evaluation:
        """Mean IoU over the classes that occur or were answered, pixel accuracy, macro F1; IoU and F1 per class."""
        if not self.images:
            raise DataError("there is no image to evaluate")
        right, true, answered = self.confusion.diag(), self.confusion.sum(1), self.confusion.sum(0)
        iou = intersection_over_union(self.confusion)
        f1 = 2 * right / (true + answered)
        columns = {"iou": iou, "f1": f1, "recall": right / true, "precision": right / answered, "pixels": true}
        metrics = {
            "mean_iou": float(iou.nanmean()),
            "pixel_accuracy": float(right.sum() / true.sum()),
            "f1_macro": float(f1.nanmean()),
        }
        return Evaluation(
            images=self.images,
            loss=self.loss_sum / self.weight_sum if self.weight_sum else float("nan"),
            metrics=metrics,
            per_class={
                name: {key: float(column[i]) for key, column in columns.items()}
                for i, name in enumerate(self.task.class_names)
            },
            confusion=self.confusion.tolist(),
            worst=self.cases,
        )


def intersection_over_union(confusion: Tensor) -> Tensor:
    """IoU per class, (classes,), from counts (classes, classes); NaN where a class neither occurs nor was answered."""
    right = confusion.diag()
    return right / (confusion.sum(0) + confusion.sum(1) - right)
