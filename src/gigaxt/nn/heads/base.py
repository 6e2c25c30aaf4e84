"""What the configs and losses of all heads share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gigaxt.errors import ConfigError, DataError
from gigaxt.streaming.rows import at_least_float32


@dataclass(kw_only=True)
class BaseHeadConfig:
    """Settings of every head that answers with classes."""

    kind: str
    """which head"""
    classes: int
    """how many classes (numbers, for regression)"""
    label_smoothing: float = 0.0
    """share of the target's weight that is spread over all classes, 0 <= x < 1"""
    class_weights: list[float] | None = None
    """weight of each class in the loss; None: all 1"""
    class_names: list[str] | None = None
    """name of each class"""

    def __post_init__(self) -> None:
        if self.classes < 1:
            raise ConfigError(f"head.classes: expected at least 1, got {self.classes}")
        if not 0.0 <= self.label_smoothing < 1.0:
            raise ConfigError(f"head.label_smoothing: expected 0 <= x < 1, got {self.label_smoothing}")
        self._check_length("class_weights", self.class_weights)
        self._check_length("class_names", self.class_names)
        if self.class_weights is not None:
            if not all(math.isfinite(weight) and weight >= 0.0 for weight in self.class_weights):
                raise ConfigError(f"head.class_weights: expected finite numbers >= 0, got {self.class_weights}")
            if not any(self.class_weights):
                raise ConfigError("head.class_weights: all are 0, so nothing would be learnt; raise one")

    def _check_length(self, key: str, values: Sequence[object] | None) -> None:
        if values is not None and len(values) != self.classes:
            raise ConfigError(f"head.{key}: expected {self.classes} values, one a class, got {len(values)}")


THRESHOLD = 0.3
"""Score from which on an object counts where neither the user nor training set another."""


@dataclass(kw_only=True)
class ObjectsConfig(BaseHeadConfig):
    """Settings of every head that answers with boxes."""

    strides: list[int] | None = None
    """px per cell of the feature maps that answer, fine to coarse, such as [8, 16, 32]; None: all"""
    score: float = 0.05
    """objects that score less are left out"""
    threshold: float | None = None
    """score from which on an object counts in F1 and in pictures; None: training sets it to the best on `val`, without
    one to the best on the training images"""
    nms_iou: float = 0.6
    """of two objects that overlap more, the one that scores less is left out"""
    max_objects: int = 100_000
    """of a scene, those that score best"""
    category_ids: list[int] | None = None
    """`category_id` of each class in COCO JSON; None: 1, 2, ..."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_length("category_ids", self.category_ids)
        if self.max_objects < 1:
            raise ConfigError(f"head.max_objects: expected at least 1, got {self.max_objects}")
        for name, value in (("score", self.score), ("threshold", self.counted_from), ("nms_iou", self.nms_iou)):
            if not 0.0 <= value <= 1.0:
                raise ConfigError(f"head.{name}: expected 0 <= x <= 1, got {value}")
        if self.label_smoothing:
            raise ConfigError("head.label_smoothing: detection has none; remove it")

    @property
    def counted_from(self) -> float:
        """Score from which on an object counts."""
        return THRESHOLD if self.threshold is None else self.threshold


def weights_tensor(config: BaseHeadConfig) -> Tensor | None:
    """The class weights, (classes,) float32, to be registered as a non-persistent buffer; None for all 1."""
    return None if config.class_weights is None else torch.tensor(config.class_weights, dtype=torch.float32)


def widened(x: Tensor) -> Tensor:
    """Half precision to float32; float64 stays, which `.float()` would not do."""
    return x.to(at_least_float32(x.dtype))


def check_class_indices(targets: Tensor, classes: int) -> None:
    """Refuse class numbers that do not exist.

    Raises:
        DataError: names the first wrong value. (On a GPU the test waits for the device once.)
    """
    wrong = (targets < 0) | (targets >= classes)
    if bool(wrong.any()):
        raise DataError(
            f"target: class {int(targets[wrong][0])} is out of range 0..{classes - 1}; "
            "correct the labels, set `classes`, or mark such pixels with the `ignore` value"
        )
