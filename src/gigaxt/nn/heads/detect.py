"""Objects and their boxes: one stage, an answer for every cell of several feature maps, steered by the context.

Tian, Shen, Chen, He: FCOS, fully convolutional one-stage object detection (2019), with three changes. Boxes are learnt
as centre and size, so that a cell can answer for a small object beside its location; centreness has half a cell of
slack; and all loss is a sum over the scene, divided by the number of its answering cells.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import generalized_box_iou_loss, sigmoid_focal_loss

from gigaxt.errors import ConfigError, DataError
from gigaxt.nn.heads.base import ObjectsConfig, weights_tensor, widened
from gigaxt.nn.heads.dense import Answers, DenseHead
from gigaxt.nn.heads.levels import ContextClassifier, Level, PixelNorm, chosen_strides, joined_levels
from gigaxt.targets.boxes import IGNORED, BoxTarget, Lattice, as_boxes

PRIOR = 0.01
"""Chance of an object that a fresh head gives each cell, so that the many empty ones do not drown the loss."""
GROWTH = 8.0
"""Largest logarithm of a box's side, in units of half of `max_cells`."""


@dataclass(kw_only=True)
class DetectConfig(ObjectsConfig):
    """Settings of the detection head."""

    kind: Literal["detect"] = "detect"
    dim: int = 64
    """channels of the decoder"""
    depth: int = 2
    """3 x 3 convolutions before the classes, and as many before the boxes"""
    max_cells: float = 8.0
    """longer side of an object, in cells, from which on the next coarser map answers for it"""
    radius: float = 1.5
    """cells around an object's centre that answer for it"""
    class_aware: bool = True
    """whether only objects of one class leave each other out"""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("dim", "depth"):
            if getattr(self, name) < 1:
                raise ConfigError(f"head.{name}: expected at least 1, got {getattr(self, name)}")
        for name in ("max_cells", "radius"):
            if not 0.0 < getattr(self, name) < math.inf:
                raise ConfigError(f"head.{name}: expected a positive number, got {getattr(self, name)}")


class DetectHead(DenseHead):
    """Feature maps and context of regions to objects at their cells.

    Every map joins from coarse to fine as in `SegmentHead`, scaled and shifted by the context at its place. At each
    that answers: class logits of a `ContextClassifier`, so that an object's class may depend on what is far away; the
    box; and centreness. Convolutions are shared by all maps, norms are per cell.

    Args:
        config: see `DetectConfig`.
        dim: channels of the context.
        map_channels: channels of each feature map, fine to coarse.
        map_strides: px per cell of each, fine to coarse.
    """

    linear = True
    class_weights: Tensor | None

    def __init__(self, config: DetectConfig, dim: int, map_channels: Sequence[int], map_strides: Sequence[int]) -> None:
        super().__init__()
        strides = chosen_strides(config.strides, map_strides, "detect")
        self.config = config
        self.lattice = Lattice(tuple(strides), config.max_cells, config.radius)
        self.answering = [stride in strides for stride in map_strides]
        self.context_norm = nn.LayerNorm(dim)
        self.levels = nn.ModuleList(Level(channels, dim, config.dim) for channels in map_channels)
        self.class_tower, self.box_tower = _tower(config), _tower(config)
        self.classifier = ContextClassifier(config.dim, dim, config.classes)
        nn.init.constant_(self.classifier.shared.get_parameter("bias"), -math.log(1 / PRIOR - 1))
        self.box = nn.Conv2d(config.dim, 4, 1)
        nn.init.normal_(self.box.weight, std=0.1 * config.dim**-0.5)
        nn.init.zeros_(self.box.get_parameter("bias"))
        self.centreness = nn.Conv2d(config.dim, 1, 1)
        self.register_buffer("class_weights", weights_tensor(config), persistent=False)

    def forward(self, maps: Sequence[Tensor], context: Tensor) -> tuple[Tensor, ...]:
        """Answer for regions, each on its own.

        Args:
            maps: (n, c_i, h_i, w_i) each, fine to coarse, all of the same area.
            context: (n, rows, cols, dim), of that area too.

        Returns:
            A map for each stride that answers, fine to coarse: (n, classes + 5, h_i, w_i). Class logits, then distances
            from the location to the box's left, top, right, bottom in px, then the logit of centreness.
        """
        context = self.context_norm(context).permute(0, 3, 1, 2)  # (n, rows, cols, dim) -> (n, dim, rows, cols)
        joined = joined_levels(self.levels, maps, context, self.answering)
        return tuple(self._answer(x, context, stride) for x, stride in zip(joined, self.lattice.strides, strict=True))

    def _answer(self, x: Tensor, context: Tensor, stride: int) -> Tensor:
        logits = self.classifier(self.class_tower(x), context)
        x = self.box_tower(x)
        shift, growth = widened(self.box(x)).chunk(2, dim=1)  # (n, 2, h, w) each, as (x, y)
        half = growth.clamp(max=GROWTH).exp() * (stride * self.config.max_cells / 4)  # at first half of the largest
        shift = shift * stride
        return torch.cat([logits, half - shift, half + shift, self.centreness(x)], dim=1)

    def shapes(self, region_px: int) -> list[tuple[int, int, int]]:
        """A map for each stride that answers."""
        return [(self.config.classes + 5, region_px // s, region_px // s) for s in self.lattice.strides]

    def as_target(self, target: Any) -> BoxTarget:
        """A BoxTarget, or a mapping with `boxes` (n, 4) as left, top, right, bottom in px and `labels` (n,) from 0."""
        return as_boxes(target, self.config.classes).on(self.lattice)

    def loss_sums(self, answers: Answers, targets: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """Sums over locations: focal loss of the classes, GIoU loss of the boxes, cross entropy of centreness.

        Args:
            answers: of `forward`.
            targets: what `BoxTarget.draw` gives, and `valid` (n, H, W) bool: locations on other pixels do not count.

        Returns:
            The sum of the three, the number of locations that answer for an object, scalars; and the three (3,). All
            float64. Only the first has a gradient.

        Raises:
            DataError: shapes that do not fit.
        """
        classes, distances, valid = targets["classes"], targets["distances_ltrb"], targets["valid"]
        answers = (answers,) if isinstance(answers, Tensor) else answers
        # (n, classes + 5, h, w) each -> (n, cells, classes + 5)
        flat = torch.cat([answer.flatten(2) for answer in answers], dim=2).transpose(1, 2)
        here = torch.cat([at_locations(valid, s).flatten(1) for s in self.lattice.strides], dim=1)
        if classes.shape != flat.shape[:2] or here.shape != classes.shape:
            raise DataError(
                f"target: expected a class for each of {tuple(flat.shape[:2])} locations, got {tuple(classes.shape)}"
            )
        logits, boxes, centreness = widened(flat).split([self.config.classes, 4, 1], dim=2)
        counted = here & (classes != IGNORED)
        found = counted & (classes >= 0)
        focal = self._focal(logits, classes, counted, found)
        distances = distances.to(boxes.dtype)[found]  # (m, 4)
        sign = boxes.new_tensor([-1, -1, 1, 1])  # distances from the location -> corners around it
        giou = generalized_box_iou_loss(boxes[found] * sign, distances * sign).sum(dtype=torch.float64)
        strides = torch.cat([classes.new_full((a.shape[2] * a.shape[3],), s) for a, s in self._with_strides(answers)])
        centred = centreness_of(distances, strides.expand_as(classes)[found])
        crossed = F.binary_cross_entropy_with_logits(centreness[found].squeeze(1), centred, reduction="none")
        parts = focal, giou, crossed.sum(dtype=torch.float64)
        return sum(parts, focal.new_zeros(())), found.sum(dtype=torch.float64), torch.stack(parts).detach()

    def loss(self, sums: Sequence[Tensor]) -> Tensor:
        """The sum of the losses for each location that answers for an object."""
        total, found = sums[:2]
        return total / found.clamp(min=1)

    def scores(self, sums: Sequence[Tensor]) -> dict[str, Tensor]:
        """`loss_sum`, `answering`, and `focal`, `giou`, `centreness`, which `loss_sum` is made of."""
        total, found, parts = sums
        return {
            "loss_sum": total,
            "answering": found,
            **dict(zip(("focal", "giou", "centreness"), parts, strict=True)),
        }

    def _focal(self, logits: Tensor, classes: Tensor, counted: Tensor, found: Tensor) -> Tensor:
        wanted = F.one_hot(classes.clamp(min=0), self.config.classes) * found[..., None]
        losses: Tensor = sigmoid_focal_loss(logits, wanted.to(logits.dtype))  # (n, cells, classes)
        if self.class_weights is not None:
            losses = losses * self.class_weights.to(losses.dtype)
        return (losses * counted[..., None]).sum(dtype=torch.float64)

    def _with_strides(self, answers: Sequence[Tensor]) -> list[tuple[Tensor, int]]:
        return list(zip(answers, self.lattice.strides, strict=True))


def at_locations(values: Tensor, stride: int) -> Tensor:
    """Values (n, h, w) of pixels at the locations of a map: (n, h / stride, w / stride)."""
    return values[:, stride // 2 :: stride, stride // 2 :: stride]


def centreness_of(distances_ltrb: Tensor, stride: Tensor) -> Tensor:
    """How central locations are in their boxes, 0 to 1.

    FCOS's square root of (least / most) along x times that along y, with half a cell added to each distance: a location
    stands for its cell, and of a small box none may lie at the centre.

    Args:
        distances_ltrb: (m, 4) in px.
        stride: (m,) px.
    """
    ltrb = distances_ltrb + stride[:, None] / 2
    left_top, right_bottom = ltrb.chunk(2, dim=1)
    ratio = torch.minimum(left_top, right_bottom) / torch.maximum(left_top, right_bottom)
    centred: Tensor = ratio.clamp(min=0).prod(dim=1).sqrt()
    return centred


def _tower(config: DetectConfig) -> nn.Sequential:
    layers = [
        (nn.Conv2d(config.dim, config.dim, 3, padding=1), PixelNorm(config.dim), nn.GELU()) for _ in range(config.depth)
    ]
    return nn.Sequential(*(module for layer in layers for module in layer))
