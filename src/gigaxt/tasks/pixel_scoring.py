"""Scores of pixels from what each image adds up: confusions, counts a label, or moments a number."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from gigaxt.tasks.metrics import moments_scores


class PixelScoring(ABC):
    """How the sums of images become scores.

    Attributes:
        key: what `DenseHead.scores` calls the sums.
        best: the metric by which the best model is kept.
        higher_is_better: of `best`.
        metric_names: in the order of tables.
    """

    key: str
    best: str
    higher_is_better = True
    metric_names: tuple[str, ...]

    @abstractmethod
    def scores(self, each: Tensor, weights: Tensor) -> dict[str, Tensor]:
        """Scores (draws,) of images (images, ...) that are weighted by (images, draws); NaN where not defined."""

    @abstractmethod
    def per_class(self, total: Tensor) -> dict[str, Tensor]:
        """Columns (classes,) of the table of classes."""

    @abstractmethod
    def worst(self, one: Tensor) -> tuple[float, str] | None:
        """How bad one image is, higher is worse, and a caption; None where nothing of it counts."""

    def confusion(self, total: Tensor) -> list[list[float]] | None:
        """Pixels of each true (row) and answered class."""
        return None

    def notes(self, total: Tensor, class_names: Sequence[str]) -> list[str]:
        """What one should know of the scores."""
        return []


class Areas(PixelScoring):
    """Classes or labels, by the pixels that are right, true, and answered."""

    best = "mean_iou"
    metric_names = ("mean_iou", "pixel_accuracy", "f1_macro")

    @abstractmethod
    def areas(self, sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pixels right, true and answered (..., classes), from sums (..., *shape)."""

    @abstractmethod
    def accuracy(self, sums: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels right, whatever class they have, and all: (...), from sums (..., *shape)."""

    def scores(self, each: Tensor, weights: Tensor) -> dict[str, Tensor]:
        """Means over the classes that occur or were answered, and the share of pixels that are right."""
        right, true, answered = (part.T @ weights for part in self.areas(each))  # (classes, draws)
        hits, pixels = self.accuracy(each)
        return {
            "mean_iou": (right / (true + answered - right)).nanmean(dim=0),
            "pixel_accuracy": (hits @ weights) / (pixels @ weights),
            "f1_macro": (2 * right / (true + answered)).nanmean(dim=0),
        }

    def per_class(self, total: Tensor) -> dict[str, Tensor]:
        """IoU, F1, recall, precision, and how many pixels."""
        right, true, answered = self.areas(total)
        return {
            "iou": right / (true + answered - right),
            "f1": 2 * right / (true + answered),
            "recall": right / true,
            "precision": right / answered,
            "pixels": true,
        }

    def worst(self, one: Tensor) -> tuple[float, str] | None:
        """By mean IoU; where no class occurs or was answered, by accuracy."""
        found = {name: float(value) for name, value in self.scores(one[None], one.new_ones(1, 1)).items()}
        if found["pixel_accuracy"] != found["pixel_accuracy"]:
            return None
        iou, accuracy = found["mean_iou"], found["pixel_accuracy"]
        badness = 1 - (accuracy if iou != iou else iou)
        return badness, f"mean IoU {iou:.3f}, pixel accuracy {accuracy:.3f}"


class OneClassPixels(Areas):
    """One class a pixel: sums (classes, classes), true class as row."""

    key = "confusion"

    def areas(self, sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Diagonal, and sums of rows and columns."""
        return sums.diagonal(dim1=-2, dim2=-1), sums.sum(-1), sums.sum(-2)

    def accuracy(self, sums: Tensor) -> tuple[Tensor, Tensor]:
        """The diagonal and all."""
        return sums.diagonal(dim1=-2, dim2=-1).sum(-1), sums.sum((-2, -1))

    def confusion(self, total: Tensor) -> list[list[float]]:
        """As it is."""
        matrix: list[list[float]] = total.tolist()
        return matrix

    def notes(self, total: Tensor, class_names: Sequence[str]) -> list[str]:
        """Masks with one class, such as those that are drawn with 0 and 255, make any model look perfect."""
        occur = [name for name, pixels in zip(class_names, total.sum(-1).tolist(), strict=True) if pixels]
        return [f"all pixels that count are of class {occur[0]}: the scores say little"] if len(occur) == 1 else []


class LabelPixels(Areas):
    """Independent labels: sums (4, labels) of pixels: yes and right, yes and wrong, missed, left."""

    key = "counts"

    def areas(self, sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of each label."""
        right, wrong, missed, _ = sums.unbind(-2)
        return right, right + missed, right + wrong

    def accuracy(self, sums: Tensor) -> tuple[Tensor, Tensor]:
        """Over the labels of all pixels."""
        right, _, _, left = sums.unbind(-2)
        return (right + left).sum(-1), sums.sum((-2, -1))


class NumberPixels(PixelScoring):
    """Numbers: sums (5, numbers) of pixels, squared and absolute errors, targets and their squares."""

    key = "moments"
    best = "rmse"
    higher_is_better = False
    metric_names = ("rmse", "mae", "r2")

    def scores(self, each: Tensor, weights: Tensor) -> dict[str, Tensor]:
        """Means over the numbers."""
        total = torch.einsum("imk,id->mkd", each, weights)  # (5, numbers, draws)
        return {name: column.nanmean(dim=0) for name, column in moments_scores(total).items()}

    def per_class(self, total: Tensor) -> dict[str, Tensor]:
        """The same of each number, and how many pixels."""
        return {**moments_scores(total), "pixels": total[0]}

    def worst(self, one: Tensor) -> tuple[float, str] | None:
        """By the root of the mean square error."""
        if not bool(one[0].any()):
            return None
        found = {name: float(value.nanmean()) for name, value in moments_scores(one).items()}
        return found["rmse"], f"RMSE {found['rmse']:.4g}, MAE {found['mae']:.4g}"


SCORINGS: dict[str, PixelScoring] = {
    "single": OneClassPixels(),
    "multi": LabelPixels(),
    "regression": NumberPixels(),
}
