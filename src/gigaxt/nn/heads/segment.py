"""One class per pixel: a light decoder over a region's feature maps, steered by the context."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gigaxt.errors import ConfigError, DataError
from gigaxt.nn.heads.base import BaseHeadConfig, at_least_float32, check_class_indices, weights_tensor
from gigaxt.nn.heads.dense import Answers, DenseHead
from gigaxt.nn.heads.levels import ContextClassifier, Level, resize
from gigaxt.targets import MaskTarget, as_mask


@dataclass(kw_only=True)
class SegmentConfig(BaseHeadConfig):
    """Settings of the segmentation head."""

    kind: Literal["segment"] = "segment"
    dim: int = 64
    """channels of the decoder"""
    ignore: int = 255
    """mask value of pixels that count neither in the loss nor in the scores"""
    class_colors: list[tuple[int, int, int]] | None = None
    """red, green, blue of each class, 0..255"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.classes < 2:
            raise ConfigError("head.classes: a mask needs at least 2 classes, background included")
        if self.dim < 1:
            raise ConfigError(f"head.dim: expected at least 1, got {self.dim}")
        self._check_length("class_colors", self.class_colors)
        for color in self.class_colors or []:
            if len(color) != 3 or not all(0 <= value <= 255 for value in color):
                raise ConfigError(f"head.class_colors: expected three numbers in 0..255 each, got {color}")


class SegmentHead(DenseHead):
    """Feature maps and context of regions to class logits of their pixels.

    Every map, after a 1 x 1 convolution to `dim` channels and a LayerNorm, is scaled and shifted by the context at its
    place (FiLM): relations to far content are learnt only through such products (concatenation stays at chance on the
    `legend` rule). Then from coarse to fine: upsample, add, 3 x 3 convolution; and logits as `ContextClassifier` gives
    them. All norms are per pixel, so nothing depends on the other regions, on padding, or on how the maps were cropped.

    Args:
        config: see `SegmentConfig`.
        dim: channels of the context.
        map_channels: channels of each feature map, fine to coarse.
        map_strides: px per cell of each, fine to coarse.
    """

    linear = True
    class_weights: Tensor | None

    def __init__(
        self, config: SegmentConfig, dim: int, map_channels: Sequence[int], map_strides: Sequence[int]
    ) -> None:
        super().__init__()
        if not map_channels or len(map_channels) != len(map_strides):
            raise ConfigError("head: segment needs the feature maps of the region encoder; build it with `maps=True`")
        self.config = config
        self.stride = map_strides[0]
        self.context_norm = nn.LayerNorm(dim)
        self.levels = nn.ModuleList(Level(channels, dim, config.dim) for channels in map_channels)
        self.classifier = ContextClassifier(config.dim, dim, config.classes)
        self.register_buffer("class_weights", weights_tensor(config), persistent=False)

    def forward(self, maps: Sequence[Tensor], context: Tensor) -> Tensor:
        """Decode regions, each on its own.

        Args:
            maps: (n, c_i, h_i, w_i) each, fine to coarse, all of the same area.
            context: (n, rows, cols, dim), of that area too.

        Returns:
            Logits (n, classes, h_0 * stride_0, w_0 * stride_0).
        """
        context = self.context_norm(context).permute(0, 3, 1, 2)  # (n, rows, cols, dim) -> (n, dim, rows, cols)
        x: Tensor | None = None
        for level, features in zip(reversed(self.levels), reversed(maps), strict=True):
            x = level(features, context, x)
        assert x is not None
        logits: Tensor = self.classifier(x, context)
        return logits if self.stride == 1 else resize(logits, [side * self.stride for side in logits.shape[2:]])

    def shapes(self, core_px: int) -> list[tuple[int, int, int]]:
        """One map: a logit of each class for every pixel."""
        return [(self.config.classes, core_px, core_px)]

    def as_target(self, target: Any) -> MaskTarget:
        """A mask on the grid of the image: an Image, or integers (H, W)."""
        return as_mask(target)

    def loss_sums(self, answers: Answers, targets: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """Sums whose ratio, over all regions of a scene, is its mean cross entropy.

        Args:
            answers: logits (n, classes, H, W).
            targets: `target` (n, H, W) integer classes, or the `ignore` value; `valid` (n, H, W) bool, False for
                padding and nodata, whatever the target says there.

        Returns:
            The sum of the weighted losses and the sum of the weights, scalars, and the confusion matrix (classes,
            classes) of pixel counts with the true class as row; all float64. Only the first has a gradient.

        Raises:
            DataError: shapes that do not fit, or a class out of range.
        """
        assert isinstance(answers, Tensor)
        logits, target, valid = answers, targets["target"], targets["valid"]
        classes = self.config.classes
        if target.shape != valid.shape or target.shape != logits.shape[:1] + logits.shape[2:]:
            raise DataError(
                f"target: expected a mask of the logits' size {tuple(logits.shape[2:])} with a validity of the same "
                f"shape, got {tuple(target.shape)} and {tuple(valid.shape)}"
            )
        counted = valid & (target != self.config.ignore)
        target = target.long().masked_fill(~counted, 0)
        check_class_indices(target, classes)
        logits = at_least_float32(logits)
        class_weights = None if self.class_weights is None else self.class_weights.to(logits.dtype)
        losses = F.cross_entropy(
            logits,
            target.masked_fill(~counted, -100),
            weight=class_weights,
            ignore_index=-100,
            label_smoothing=self.config.label_smoothing,
            reduction="none",
        )
        weights = counted.double() if class_weights is None else class_weights.double()[target] * counted
        return losses.sum(dtype=torch.float64), weights.sum(), _confusion(logits, target, counted)

    def loss(self, sums: Sequence[Tensor]) -> Tensor:
        """The mean cross entropy; 0 where no pixel counts."""
        loss, weight = sums[:2]
        return loss / weight.clamp(min=torch.finfo(weight.dtype).tiny)

    def scores(self, sums: Sequence[Tensor]) -> dict[str, Tensor]:
        """`loss_sum`, `weight_sum`, `confusion`."""
        return dict(zip(("loss_sum", "weight_sum", "confusion"), sums, strict=True))


def _confusion(logits: Tensor, target: Tensor, counted: Tensor) -> Tensor:
    """Counts (classes, classes), row true, column predicted; scatter, for `bincount` waits for the GPU."""
    classes = logits.shape[1]
    cells = (target * classes + logits.detach().argmax(dim=1)).flatten()
    counts = torch.zeros(classes * classes, dtype=torch.float64, device=logits.device)
    return counts.scatter_add_(0, cells, counted.flatten().double()).view(classes, classes)
