"""Settings of the segmentation head: what a pixel's answer is, and what its loss is made of."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from gigaxt.config import nearest
from gigaxt.errors import ConfigError
from gigaxt.nn.heads.base import BaseHeadConfig

OVERLAP_LOSSES = ("dice", "jaccard")
"""Losses of the overlap of answer and truth over whole scenes."""
LOSSES = {
    "single": ("cross_entropy", "focal", *OVERLAP_LOSSES),
    "multi": ("cross_entropy", "focal", *OVERLAP_LOSSES),
    "regression": ("l2", "l1", "huber"),
}
"""Target -> its losses; the first is the default."""


@dataclass(kw_only=True)
class SegmentConfig(BaseHeadConfig):
    """Settings of the segmentation head."""

    kind: Literal["segment"] = "segment"
    target: Literal["single", "multi", "regression"] = "single"
    """single: one class a pixel; multi: a mask of `classes` bands, each a label of its own, 0 or 1; regression: a
    raster of `classes` bands of numbers, such as heights"""
    loss: dict[str, float] | None = None
    """which losses, and the weight of each, such as {cross_entropy: 1, dice: 1}: of cross_entropy, focal, dice and
    jaccard, or, for regression, of l2, l1 and huber; None: cross_entropy or l2"""
    focal_gamma: float = 2.0
    """of focal: the power by which pixels that are already right count less, >= 0"""
    huber_delta: float = 1.0
    """of huber: the error, in units of `target_std`, from which on it grows straight"""
    absent_classes: Literal["leave_out", "count"] = "leave_out"
    """of dice and jaccard: classes that no pixel of the step's scenes has are left out of the mean, or count, with one
    pixel added to each area, so that they are 1 only where nothing of them is answered"""
    dim: int = 64
    """channels of the decoder"""
    ignore: int = 255
    """mask value of pixels that count neither in the loss nor in the scores"""
    class_field: str | None = None
    """of masks that are vector files: the property with each polygon's class, a name of `class_names` or a number; dots
    lead into nested ones (QuPath: classification.name). None: polygons are class 1, or the only label"""
    unlabelled: Literal["background", "ignore"] = "background"
    """of masks that are vector files: where no polygon is, pixels are class 0 (no label), or do not count"""
    class_colors: list[tuple[int, int, int]] | None = None
    """red, green, blue of each class, 0..255"""
    target_mean: list[float] | None = None
    """regression: of each number in the training data; None: filled in when training begins"""
    target_std: list[float] | None = None
    """regression: likewise; the loss is in units of it"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target == "single" and self.classes < 2:
            raise ConfigError("head.classes: a mask needs at least 2 classes, background included (or target: multi)")
        if self.target == "single" and self.ignore == 255 < self.classes:
            raise ConfigError("head.ignore: 255 is a class of this mask; set another value, such as 65535")
        if self.target == "multi" and self.ignore in (0, 1):
            raise ConfigError(f"head.ignore: of labels, 0 and 1 have a meaning, got {self.ignore}; try 255")
        if self.dim < 1:
            raise ConfigError(f"head.dim: expected at least 1, got {self.dim}")
        self._check_length("class_colors", self.class_colors)
        for color in self.class_colors or []:
            if len(color) != 3 or not all(0 <= value <= 255 for value in color):
                raise ConfigError(f"head.class_colors: expected three numbers in 0..255 each, got {color}")
        self._check_loss()
        self._check_standardisation()

    @property
    def mix(self) -> dict[str, float]:
        """Loss -> weight, without those of weight 0."""
        mix = {LOSSES[self.target][0]: 1.0} if self.loss is None else self.loss
        return {name: weight for name, weight in mix.items() if weight}

    @property
    def overlaps(self) -> bool:
        """Whether the loss is more than a mean over pixels."""
        return any(name in OVERLAP_LOSSES for name in self.mix)

    def _check_loss(self) -> None:
        known = LOSSES[self.target]
        for name, weight in (self.loss or {}).items():
            if name not in known:
                raise ConfigError(f"head.loss: unknown loss `{name}` of target {self.target}{nearest(name, known)}")
            if not 0.0 <= weight < math.inf:
                raise ConfigError(f"head.loss.{name}: expected a weight of at least 0, got {weight}")
        if not self.mix:
            raise ConfigError(f"head.loss: expected a weight above 0 for one of {', '.join(known)}, got {self.loss}")
        if not 0.0 <= self.focal_gamma < math.inf:
            raise ConfigError(f"head.focal_gamma: expected at least 0, got {self.focal_gamma}")
        if not 0.0 < self.huber_delta < math.inf:
            raise ConfigError(f"head.huber_delta: expected a number above 0, got {self.huber_delta}")
        self._needs("label_smoothing", self.label_smoothing != 0.0, ("cross_entropy",))
        self._needs("focal_gamma", self.focal_gamma != 2.0, ("focal",))
        self._needs("huber_delta", self.huber_delta != 1.0, ("huber",))
        self._needs("absent_classes", self.absent_classes != "leave_out", OVERLAP_LOSSES)

    def _needs(self, key: str, given: bool, losses: Sequence[str]) -> None:
        if given and not any(name in self.mix for name in losses):
            raise ConfigError(
                f"head.{key}: has a meaning for {' and '.join(losses)}, the loss is {', '.join(self.mix)}; leave it out"
            )

    def _check_standardisation(self) -> None:
        mean, std = self.target_mean, self.target_std
        if self.target != "regression" and (mean is not None or std is not None):
            raise ConfigError(f"head.target_mean: has no meaning for target: {self.target} (but for regression)")
        if (mean is None) != (std is None):
            raise ConfigError("head: expected `target_mean` and `target_std` together, got one of them")
        self._check_length("target_mean", mean)
        self._check_length("target_std", std)
        if not all(math.isfinite(value) for value in mean or ()):
            raise ConfigError(f"head.target_mean: expected finite numbers, got {mean}")
        if not all(0.0 < value < math.inf for value in std or ()):
            raise ConfigError(f"head.target_std: expected numbers above 0, got {std}")
