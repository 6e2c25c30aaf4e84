"""An answer for every pixel: a light decoder over a region's feature maps, steered by the context."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from gigaxt.errors import ConfigError
from gigaxt.nn.heads.base import widened
from gigaxt.nn.heads.dense import Answers, DenseHead
from gigaxt.nn.heads.levels import ContextClassifier, Level, resize
from gigaxt.nn.heads.pixel_losses import pixel_loss
from gigaxt.nn.heads.segment_config import SegmentConfig
from gigaxt.targets.base import MaskTarget, as_bands, as_mask


class SegmentHead(DenseHead):
    """Feature maps and context of regions to logits of their pixels, or numbers in the targets' own units.

    Every map, after a 1 x 1 convolution to `dim` channels and a LayerNorm, is scaled and shifted by the context at its
    place (FiLM): relations to far content are learnt only through such products (concatenation stays at chance on the
    `legend` rule). Then from coarse to fine: upsample, add, 3 x 3 convolution; and logits as `ContextClassifier` gives
    them. All norms are per pixel, so nothing depends on the other regions, on padding, or on how the maps were cropped.

    Args:
        config: see `SegmentConfig`.
        dim: channels of the context.
        map_channels: channels of each feature map, fine to coarse.
        map_strides: px per cell of each, fine to coarse.

    Raises:
        ConfigError: there are no maps.
    """

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
        self.pixels = pixel_loss(config)
        self.linear = not config.overlaps

    def forward(self, maps: Sequence[Tensor], context: Tensor) -> Tensor:
        """Decode regions, each on its own.

        Args:
            maps: (n, c_i, h_i, w_i) each, fine to coarse, all of the same area.
            context: (n, rows, cols, dim), of that area too.

        Returns:
            Logits (n, classes, h_0 * stride_0, w_0 * stride_0); of a regression the numbers, in at least float32.
        """
        context = self.context_norm(context).permute(0, 3, 1, 2)  # (n, rows, cols, dim) -> (n, dim, rows, cols)
        x: Tensor | None = None
        for level, features in zip(reversed(self.levels), reversed(maps), strict=True):
            x = level(features, context, x)
        assert x is not None
        logits = self._in_units(self.classifier(x, context))
        if self.stride == 1:
            return logits
        # Class by class, not channels last: all that follows (softmax, losses, blending) is faster so on a CPU.
        return resize(logits.contiguous(), [side * self.stride for side in logits.shape[2:]])

    def _in_units(self, y: Tensor) -> Tensor:
        """Numbers, which are learnt in units of `target_std` around `target_mean`, in their own; logits as they are.

        Without it a bias would have to climb to the targets' size in steps of the learning rate.
        """
        mean, std = self.config.target_mean, self.config.target_std
        if mean is None or std is None:
            return y
        y = widened(y)  # half precision would cut large numbers off
        return y * y.new_tensor(std)[:, None, None] + y.new_tensor(mean)[:, None, None]

    def shapes(self, region_px: int) -> list[tuple[int, int, int]]:
        """One map: a logit of each class for every pixel."""
        return [(self.config.classes, region_px, region_px)]

    def as_target(self, target: Any) -> MaskTarget:
        """A raster on the grid of the image: an Image, or an array (H, W), of several bands (H, W, bands)."""
        if self.config.target == "single":
            return as_mask(target)
        return as_bands(target, self.config.classes, numbers=self.config.target == "regression")

    def check_targets(self, targets: Mapping[str, Tensor]) -> None:
        """See `DenseHead.check_targets`."""
        self.pixels.check(targets["target"], targets["valid"])

    def loss_sums(self, answers: Answers, targets: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """See `gigaxt.nn.heads.pixel_losses`.

        Args:
            answers: of `forward`.
            targets: `target` and `valid` (n, H, W) bool, as `MaskTarget` and `BandsTarget` draw them.

        Raises:
            DataError: shapes that do not fit, or values that are no targets.
        """
        assert isinstance(answers, Tensor)
        return self.pixels.sums(answers, targets["target"], targets["valid"])

    def loss(self, sums: Sequence[Tensor]) -> Tensor:
        """The mix of the config; 0 where no pixel counts."""
        return self.pixels.loss(sums)

    def scores(self, sums: Sequence[Tensor]) -> dict[str, Tensor]:
        """`loss`, `weight_sum`, and `confusion`, `counts` or `moments`."""
        return {"loss": self.loss(sums), "weight_sum": sums[1], self.pixels.score_sums: sums[2]}
