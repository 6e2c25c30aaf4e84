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
from gigaxt.targets import MaskTarget, as_mask

FILM_GAIN = 0.3
"""Standard deviation of scale and shift at the start: enough to pass gradients, too little to drown the features."""
RANK = 16
"""Features of a pixel that its context makes a classifier for."""


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
    `legend` rule). Then from coarse to fine: upsample, add, 3 x 3 convolution. A pixel's logits are the sum of three:
    a classifier of its features, the same everywhere; a vote of the context through one linear layer, for what does not
    depend on the pixel (with it `beacon` is learnt in a fraction of the steps); and a classifier whose weights the
    context makes for its place (dynamic filters, De Brabandere et al. 2016), applied to `RANK` features of the pixel,
    for what lies in the relation of the two. Neither factor of that product starts at zero, so the relation has a
    gradient from the first step on; through FiLM alone `legend` stays on its plateau for some seeds. All norms are per
    pixel, so nothing depends on the other regions, on padding, or on how the maps were cropped.

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
        self.levels = nn.ModuleList(_Level(channels, dim, config.dim) for channels in map_channels)
        self.classifier = nn.Conv2d(config.dim, config.classes, 1)
        self.vote = nn.Conv2d(dim, config.classes, 1, bias=False)
        nn.init.normal_(self.vote.weight, std=FILM_GAIN * dim**-0.5)
        self.features = nn.Conv2d(config.dim, RANK, 1)
        nn.init.normal_(self.features.weight, std=config.dim**-0.5)
        self.make_classifier = nn.Conv2d(dim, config.classes * RANK, 1, bias=False)
        nn.init.normal_(self.make_classifier.weight, std=dim**-0.5)
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
        logits: Tensor = self.classifier(x) + self._relate(x, context)
        logits = logits + _resize(self.vote(context), logits.shape[2:])
        return logits if self.stride == 1 else _resize(logits, [side * self.stride for side in logits.shape[2:]])

    def _relate(self, x: Tensor, context: Tensor) -> Tensor:
        """Features (n, config.dim, h, w) under the classifiers that their context (n, dim, rows, cols) makes."""
        # (n, classes * RANK, rows, cols) -> (n, classes, RANK, h, w)
        weights = _resize(self.make_classifier(context), x.shape[2:]).unflatten(1, (-1, RANK))
        logits: Tensor = (weights * self.features(x).unsqueeze(1)).sum(2) * RANK**-0.5
        return logits

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


class _Level(nn.Module):
    """One feature map joins the decoder."""

    def __init__(self, channels: int, context_dim: int, dim: int) -> None:
        super().__init__()
        self.lateral = nn.Conv2d(channels, dim, 1)
        self.norm = _PixelNorm(dim)
        self.film = nn.Conv2d(context_dim, 2 * dim, 1)
        nn.init.normal_(self.film.weight, std=FILM_GAIN * context_dim**-0.5)  # its input has a variance of one
        nn.init.zeros_(self.film.bias)  # type: ignore[arg-type]  # a Conv2d built with bias has one
        self.fuse = nn.Sequential(nn.Conv2d(dim, dim, 3, padding=1), _PixelNorm(dim), nn.GELU())

    def forward(self, features: Tensor, context: Tensor, coarser: Tensor | None) -> Tensor:
        size = features.shape[2:]
        # The 1 x 1 convolution first: it commutes with the interpolation and is far cheaper on the token lattice.
        scale, shift = _resize(self.film(context), size).chunk(2, dim=1)  # (n, dim, h, w) each
        x = F.gelu(self.norm(self.lateral(features)) * (1.0 + scale) + shift)
        if coarser is not None:
            x = x + _resize(coarser, size)
        y: Tensor = self.fuse(x)
        return y


class _PixelNorm(nn.LayerNorm):
    """LayerNorm over the channels of (n, c, h, w), at each place alone."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _resize(x: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear, cell centres kept in place."""
    return x if tuple(x.shape[2:]) == tuple(size) else F.interpolate(x, size=list(size), mode="bilinear")


def _confusion(logits: Tensor, target: Tensor, counted: Tensor) -> Tensor:
    """Counts (classes, classes), row true, column predicted; scatter, for `bincount` waits for the GPU."""
    classes = logits.shape[1]
    cells = (target * classes + logits.detach().argmax(dim=1)).flatten()
    counts = torch.zeros(classes * classes, dtype=torch.float64, device=logits.device)
    return counts.scatter_add_(0, cells, counted.flatten().double()).view(classes, classes)
