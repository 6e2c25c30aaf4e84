"""Objects as points: a heat map, and what is said of each object at its cell, steered by the context.

Zhou, Wang, Kraehenbuehl: Objects as points (2019). Gaussians are drawn with subpixel centres, across all borders; the
loss is a sum over the scene, divided by its number of objects.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gigaxt.errors import ConfigError, DataError
from gigaxt.nn.heads.base import BaseHeadConfig, weights_tensor, widened
from gigaxt.nn.heads.dense import Answers, DenseHead
from gigaxt.nn.heads.levels import ContextClassifier, Level, PixelNorm
from gigaxt.targets.points import IGNORED, NOTHING, UNKNOWN, PointLattice, PointTarget, as_points

PRIOR = 0.01
"""Chance of an object that a fresh head gives each cell, so that the many empty ones do not drown the loss."""
LOG_MOST = 20.0
"""Largest logarithm of a number."""


@dataclass(kw_only=True)
class PointsConfig(BaseHeadConfig):
    """Settings of the head for points."""

    kind: Literal["points"] = "points"
    classes: int = 1
    """how many classes"""
    stride: int = 2
    """px per cell of the heat map: 2 tells objects 5 px apart, 4 nearly so"""
    dim: int = 64
    """channels of the decoder"""
    sigma_px: float = 3.0
    """standard deviation of the Gaussians"""
    class_column: str = "class"
    """column with an object's class; empty cells are not known"""
    flags: list[str] = field(default_factory=list)
    """columns of True and False that are learnt; empty cells are not known"""
    numbers: list[str] = field(default_factory=list)
    """columns of numbers that are learnt; empty cells are not known"""
    logarithmic: list[str] = field(default_factory=list)
    """those of `numbers` whose logarithm is learnt, so that relative errors count: lengths, areas"""
    number_mean: list[float] | None = None
    """mean of each number (of its logarithm); None: that of the training data"""
    number_std: list[float] | None = None
    """standard deviation of each number (of its logarithm); None: that of the training data"""
    attribute_weights: list[float] | None = None
    """weight of each of `flags` and `numbers` in the loss; None: all 1"""
    offset_weight: float = 0.1
    """weight of the places within cells in the loss"""
    score: float = 0.05
    """objects that score less are never kept"""
    threshold: list[float] | None = None
    """score from which on an object of each class is one; None: training sets it to the best on `val`"""
    flag_threshold: list[float] | None = None
    """chance from which on each flag is set; None: training sets it to the best on `val`"""
    min_distance_px: float | None = None
    """of two objects that are nearer, the one that scores less is left out; None: 1.5 cells"""
    max_objects: int = 100_000
    """of a scene, those that score best"""
    tolerance_px: float = 10.0
    """distance below which an object counts as found"""
    scoring: Literal["points", "xview3"] = "points"
    """what is scored and written: precision, recall and F1, or the score and the submission of xView3-SAR"""
    low_confidence: Literal["ignore", "object", "background"] = "ignore"
    """of xView3-SAR: what objects of LOW confidence, which are not scored, are in training"""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_length("threshold", self.threshold)
        for name in ("stride", "dim", "max_objects"):
            if getattr(self, name) < 1:
                raise ConfigError(f"head.{name}: expected at least 1, got {getattr(self, name)}")
        for name in ("sigma_px", "tolerance_px", "min_distance_px"):
            value = getattr(self, name)
            if value is not None and not 0.0 < value < math.inf:
                raise ConfigError(f"head.{name}: expected a positive number, got {value}")
        if not 0.0 <= self.offset_weight < math.inf:
            raise ConfigError(f"head.offset_weight: expected zero or a positive number, got {self.offset_weight}")
        for name in ("score", "threshold", "flag_threshold"):
            value = getattr(self, name)
            if not all(0.0 <= x <= 1.0 for x in (value if isinstance(value, list) else [value or 0.0])):
                raise ConfigError(f"head.{name}: expected 0 <= x <= 1, got {value}")
        names = [*self.flags, *self.numbers]
        if len(set(names)) < len(names):
            raise ConfigError(f"head.flags and head.numbers: expected different columns, got {names}")
        for name in self.logarithmic:
            if name not in self.numbers:
                raise ConfigError(f"head.logarithmic: `{name}` is none of head.numbers {self.numbers}")
        counts = {"attribute_weights": names, "flag_threshold": self.flags}
        counts |= {"number_mean": self.numbers, "number_std": self.numbers}
        for name, columns in counts.items():
            values = getattr(self, name)
            if values is not None and len(values) != len(columns):
                raise ConfigError(f"head.{name}: expected {len(columns)} values, one for each of {columns}")
        if self.scoring == "xview3" and (self.flags != list(XVIEW3_FLAGS) or self.numbers != list(XVIEW3_NUMBERS)):
            raise ConfigError(
                f"head.scoring xview3: expected flags {list(XVIEW3_FLAGS)} and numbers {list(XVIEW3_NUMBERS)}, got "
                f"{self.flags} and {self.numbers}"
            )

    @property
    def lattice(self) -> PointLattice:
        """Where the head answers."""
        return PointLattice(self.stride, self.sigma_px)

    @property
    def attributes(self) -> list[str]:
        """Flags, then numbers."""
        return [*self.flags, *self.numbers]


XVIEW3_FLAGS, XVIEW3_NUMBERS = ("is_vessel", "is_fishing"), ("vessel_length_m",)
"""Columns of xView3-SAR that its score asks for."""


class PointsHead(DenseHead):
    """Feature maps and context of regions to objects at their cells.

    Every map joins from coarse to fine as in `SegmentHead`, scaled and shifted by the context at its place; what is
    finer than the finest map is made of its features by sub-pixel convolution. Heat, classes and flags come from a
    `ContextClassifier`, so that what an object is may depend on what is far away.

    Args:
        config: see `PointsConfig`.
        dim: channels of the context.
        map_channels: channels of each feature map, fine to coarse.
        map_strides: px per cell of each, fine to coarse.

    Raises:
        ConfigError: there are no maps, or `stride` divides none of their strides.
    """

    linear = True
    class_weights: Tensor | None
    attribute_weights: Tensor
    number_mean: Tensor
    number_std: Tensor
    logarithmic: Tensor

    def __init__(self, config: PointsConfig, dim: int, map_channels: Sequence[int], map_strides: Sequence[int]) -> None:
        super().__init__()
        if not map_channels or len(map_channels) != len(map_strides):
            raise ConfigError("head: points needs the feature maps of the region encoder; build it with `maps=True`")
        self.first = next((i for i, stride in enumerate(map_strides) if stride >= config.stride), len(map_strides))
        if self.first == len(map_strides) or map_strides[self.first] % config.stride:
            raise ConfigError(
                f"head.stride: expected a divisor of one of the feature maps' strides {list(map_strides)}, got "
                f"{config.stride}"
            )
        self.config = config
        self.context_norm = nn.LayerNorm(dim)
        self.levels = nn.ModuleList(Level(channels, dim, config.dim) for channels in map_channels[self.first :])
        factor = map_strides[self.first] // config.stride
        self.finer = nn.Identity() if factor == 1 else _finer(config.dim, factor)
        self.widths = [1, config.classes if config.classes > 1 else 0, len(config.flags), len(config.numbers), 2]
        """Channels of the answer: heat, classes, flags, numbers, offsets."""
        self.classifier = ContextClassifier(config.dim, dim, sum(self.widths[:3]))
        with torch.no_grad():
            assert self.classifier.shared.bias is not None
            self.classifier.shared.bias.zero_()[0] = -math.log(1 / PRIOR - 1)
        self.measure = nn.Conv2d(config.dim, sum(self.widths[3:]), 1)
        numbers = len(config.numbers)
        constants = {
            "class_weights": weights_tensor(config),
            "attribute_weights": torch.tensor(config.attribute_weights or [1.0] * len(config.attributes)),
            "number_mean": torch.tensor(config.number_mean or [0.0] * numbers),
            "number_std": torch.tensor(config.number_std or [1.0] * numbers),
            "logarithmic": torch.tensor([name in config.logarithmic for name in config.numbers], dtype=torch.bool),
        }
        for name, value in constants.items():
            self.register_buffer(name, value, persistent=False)

    def forward(self, maps: Sequence[Tensor], context: Tensor) -> Tensor:
        """Answer for regions, each on its own.

        Args:
            maps: (n, c_i, h_i, w_i) each, fine to coarse, all of the same area.
            context: (n, rows, cols, dim), of that area too.

        Returns:
            (n, channels, h, w) at the head's stride: the logit of an object's centre lying in the cell; logits of its
            class, if there are several; logits of the flags; numbers in the training data's standard deviations; and
            the object's place from the cell's centre as (row, col), in cells.
        """
        context = self.context_norm(context).permute(0, 3, 1, 2)  # (n, rows, cols, dim) -> (n, dim, rows, cols)
        x: Tensor | None = None
        for level, features in zip(reversed(self.levels), reversed(maps[self.first :]), strict=True):
            x = level(features, context, x)
        x = self.finer(x)
        return torch.cat([self.classifier(x, context), self.measure(x)], dim=1)

    def shapes(self, region_px: int) -> list[tuple[int, int, int]]:
        """One map at the head's stride."""
        side = region_px // self.config.stride
        return [(sum(self.widths), side, side)]

    def as_target(self, target: Any) -> PointTarget:
        """See `gigaxt.targets.points.as_points`."""
        return as_points(target, self.config.classes, self.config.attributes).on(self.config.lattice)

    def loss_sums(self, answers: Answers, targets: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """Sums over cells and objects.

        Args:
            answers: of `forward`.
            targets: what `PointTarget.draw` gives, and `valid` (n, H, W) bool: a cell counts where a pixel of it does.

        Returns:
            The weighted sum of all parts and the number of objects, scalars; and the parts (5,): penalty-reduced focal
            loss of the heat, cross entropy of classes and of flags, L1 losses of numbers and of offsets. All float64.
            Only the first has a gradient. What is not known of an object adds nothing.

        Raises:
            DataError: shapes that do not fit.
        """
        assert isinstance(answers, Tensor)
        heat, classes, valid = targets["heat"], targets["classes"], targets["valid"]
        stride = self.config.stride
        here = valid.unflatten(2, (-1, stride)).unflatten(1, (-1, stride)).any(4).any(2)  # (n, h, s, w, s) -> (n, h, w)
        if heat.shape != answers.shape[:1] + answers.shape[2:] or here.shape != heat.shape:
            raise DataError(
                f"target: expected points drawn on {tuple(answers.shape[2:])} cells, got {tuple(heat.shape)} and a "
                f"validity of {tuple(valid.shape)}"
            )
        logits = widened(answers)
        found = here & (classes != NOTHING) & (classes != IGNORED)
        empty = here & (classes == NOTHING)
        z = logits[:, 0]
        focal = -(found * torch.sigmoid(-z).square() * F.logsigmoid(z))
        focal = focal - empty * (1 - heat.to(z.dtype)) ** 4 * torch.sigmoid(z).square() * F.logsigmoid(-z)
        of_objects = logits.permute(0, 2, 3, 1)[found].split(self.widths, dim=1)  # (m, channels)
        attributes = targets["attributes"].permute(0, 2, 3, 1)[found].to(logits.dtype)  # (m, k)
        offsets = targets["offsets"].permute(0, 2, 3, 1)[found].to(logits.dtype)
        flags, numbers = self._attribute_losses(of_objects[2], of_objects[3], attributes)
        parts = (
            focal.sum(dtype=torch.float64),
            self._class_loss(of_objects[1], classes[found]),
            flags,
            numbers,
            self.config.offset_weight * (of_objects[4] - offsets).abs().sum(dtype=torch.float64),
        )
        total = sum(parts, parts[0].new_zeros(()))
        return total, found.sum(dtype=torch.float64), torch.stack(parts).detach()

    def loss(self, sums: Sequence[Tensor]) -> Tensor:
        """The sum of all losses for each object; of scenes without one, the sum."""
        total, objects = sums[:2]
        return total / objects.clamp(min=1)

    def scores(self, sums: Sequence[Tensor]) -> dict[str, Tensor]:
        """`loss_sum`, `objects`, and `focal`, `class`, `flags`, `numbers`, `offsets`, which `loss_sum` is made of."""
        total, objects, parts = sums
        names = ("focal", "class", "flags", "numbers", "offsets")
        return {"loss_sum": total, "objects": objects, **dict(zip(names, parts, strict=True))}

    def _class_loss(self, logits: Tensor, classes: Tensor) -> Tensor:
        known = classes != UNKNOWN
        if not logits.shape[1]:
            return logits.sum(dtype=torch.float64)
        weight = None if self.class_weights is None else self.class_weights.to(logits.dtype)
        losses = F.cross_entropy(
            logits[known],
            classes[known],
            weight=weight,
            label_smoothing=self.config.label_smoothing,
            reduction="none",
        )
        return losses.sum(dtype=torch.float64)

    def _attribute_losses(self, flags: Tensor, numbers: Tensor, attributes: Tensor) -> tuple[Tensor, Tensor]:
        count = flags.shape[1]
        weights = self.attribute_weights.to(flags.dtype) * ~torch.isnan(attributes)  # (m, k)
        attributes = attributes.nan_to_num(1.0)  # not counted, and its logarithm is finite
        crossed = F.binary_cross_entropy_with_logits(flags, attributes[:, :count], reduction="none")
        wanted = attributes[:, count:]
        wanted = torch.where(self.logarithmic, wanted.clamp(min=1e-6).log(), wanted)
        wanted = (wanted - self.number_mean.to(wanted.dtype)) / self.number_std.to(wanted.dtype)
        errors = F.smooth_l1_loss(numbers, wanted, beta=0.1, reduction="none")
        of_flags, of_numbers = (
            (losses * part).sum(dtype=torch.float64)
            for losses, part in ((crossed, weights[:, :count]), (errors, weights[:, count:]))
        )
        return of_flags, of_numbers

    def read(self, values: Tensor) -> dict[str, Tensor]:
        """What the answers at some cells say.

        Args:
            values: (m, channels) of `forward`.

        Returns:
            score (m,), class (m,), flags (m, .) as chances, numbers (m, .) in their units, offsets (m, 2) in cells; all
            float64 but class, int64.
        """
        heat, classes, flags, numbers, offsets = values.double().split(self.widths, dim=1)
        numbers = numbers * self.number_std.double() + self.number_mean.double()
        return {
            "score": heat[:, 0].sigmoid(),
            "class": classes.argmax(1) if classes.shape[1] else torch.zeros(len(values), dtype=torch.int64),
            "flags": flags.sigmoid(),
            "numbers": torch.where(self.logarithmic, numbers.clamp(max=LOG_MOST).exp(), numbers),
            "offsets": offsets.clamp(-0.5, 0.5),
        }


def _finer(dim: int, factor: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(dim, dim * factor**2, 3, padding=1),
        nn.PixelShuffle(factor),
        PixelNorm(dim),
        nn.GELU(),
        nn.Conv2d(dim, dim, 3, padding=1),
        PixelNorm(dim),
        nn.GELU(),
    )
