"""The region encoder: any timm backbone, from regions of pixels to tokens and feature maps."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gigaxt.errors import ConfigError, DataError
from gigaxt.nn.backbone import REGION_STEP, BackboneSpec, Layout, build_backbone
from gigaxt.nn.batchnorm import freeze_batchnorm
from gigaxt.nn.pretrained_weights import load_local_weights
from gigaxt.nn.swin_attention import fuse_window_attention

logger = logging.getLogger("gigaxt")

PYRAMID_STRIDES = (4, 8, 16, 32)
"""Strides of the feature maps that a plain ViT is given, px."""


@dataclass(kw_only=True)
class RegionEncoderConfig:
    """Which backbone sees the regions, and how."""

    name: str
    """a timm model: swinv2_tiny_window16_256, hiera_tiny_224, convnext_tiny, vit_small_patch16_224, ..."""
    region: int = 256
    """px on a side of a region; a multiple of 32 that the backbone covers exactly"""
    in_channels: int = 3
    """bands of the image"""
    pretrained: bool | str = False
    """true: timm's weights (cache or network); a path: a local .safetensors or .pth file; false: random"""
    options: dict[str, Any] = field(default_factory=dict)
    """keyword arguments of the timm model, such as drop_path_rate or window_size"""
    tokens: int | None = None
    """average the last feature map down to tokens x tokens per region; None: as it is (plain ViTs: one per 32 px)"""
    freeze_batchnorm: bool = False
    """fix the statistics of BatchNorm layers; backbones with BatchNorm cannot be streamed in training without"""

    def __post_init__(self) -> None:
        if self.region < REGION_STEP or self.region % REGION_STEP:
            below = max(REGION_STEP, self.region // REGION_STEP * REGION_STEP)
            raise ConfigError(
                f"region_encoder.region: expected a multiple of {REGION_STEP} px, got {self.region}; "
                f"nearest: {below} or {below + REGION_STEP}"
            )
        if self.in_channels < 1:
            raise ConfigError(f"region_encoder.in_channels: expected at least 1, got {self.in_channels}")
        if self.tokens is not None and self.tokens < 1:
            raise ConfigError(f"region_encoder.tokens: expected at least 1, got {self.tokens}")


class RegionEncoder(nn.Module):
    """Regions to tokens (from the last feature map) and feature maps.

    Nothing is normalised at the end: tokens and maps are the backbone's raw stream, as timm's `features_only` gives it.

    A plain ViT has one stride. Its feature maps come from four blocks at even depths, the first quarter giving the
    finest: strides finer than its patches by one learned transposed convolution each (kernel = stride, after a
    LayerNorm), lighter than ViTDet's but like them able to place detail inside a patch; coarser ones by averaging.

    Args:
        config: see `RegionEncoderConfig`.
        maps: give feature maps (dense heads). Without, `forward` returns an empty list, and a plain ViT has no
            parameters that would get no gradient.

    Attributes:
        dim: channels of a token.
        tokens_per_side: tokens along a side of a region.
        map_channels, map_strides: of each feature map, fine to coarse; strides in px.
        unused_weights: names in the `pretrained` file that nothing took.

    Raises:
        ConfigError: unknown names or options, a region size that the backbone does not cover, weights that cannot be
            had.
        CheckpointError: a local file that does not fit.
    """

    def __init__(self, config: RegionEncoderConfig, *, maps: bool = True) -> None:
        super().__init__()
        self.config = config
        spec = BackboneSpec(name=config.name, in_channels=config.in_channels, options=config.options)
        self.trunk, self.layout = build_backbone(spec, config.region, pretrained=config.pretrained is True)
        fuse_window_attention(self.trunk)
        self.unused_weights: list[str] = []
        if not config.pretrained:
            _unlike_zero(self.trunk)
        if isinstance(config.pretrained, str):
            self.unused_weights = load_local_weights(self.trunk, spec, config.region, config.pretrained)
            logger.info(
                "%s: weights from %s; not used: %s",
                config.name, config.pretrained, ", ".join(self.unused_weights) or "none",
            )  # fmt: skip
        if config.freeze_batchnorm:
            freeze_batchnorm(self.trunk)
        self.dim = self.layout.channels[-1]
        last_side = config.region // self.layout.strides[-1]
        token_stride = PYRAMID_STRIDES[-1] if self.layout.plain else self.layout.strides[-1]
        self.tokens_per_side = config.tokens or config.region // token_stride
        if self.tokens_per_side > last_side:
            raise ConfigError(
                f"region_encoder.tokens: at most {last_side} ({config.name} has {last_side} x {last_side} cells in a "
                f"region of {config.region} px), got {config.tokens}"
            )
        self.pyramid = _Pyramid(self.layout, config.region) if maps and self.layout.plain else None
        self.map_channels: list[int] = []
        self.map_strides: list[int] = []
        if maps:
            self.map_channels = self.pyramid.channels if self.pyramid else list(self.layout.channels)
            self.map_strides = list(PYRAMID_STRIDES) if self.pyramid else list(self.layout.strides)

    def forward(self, pixels: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Encode regions, each on its own.

        Args:
            pixels: (n, in_channels, region, region), normalised.

        Returns:
            Tokens (n, t, t, dim), row by row, t = `tokens_per_side`; feature maps (n, c_i, h_i, w_i), fine to coarse.

        Raises:
            DataError: pixels of another shape.
        """
        channels, region = self.config.in_channels, self.config.region
        if tuple(pixels.shape[1:]) != (channels, region, region):
            raise DataError(
                f"region encoder: expected pixels (n, {channels}, {region}, {region}), got {tuple(pixels.shape)}"
            )
        features: list[Tensor] = list(self.trunk(pixels))
        if self.layout.channels_last:
            features = [x.permute(0, 3, 1, 2) for x in features]  # (n, h, w, c) -> (n, c, h, w), a view
        tokens = resample_mean(features[-1], self.tokens_per_side).permute(0, 2, 3, 1)  # -> (n, t, t, dim)
        if not self.map_channels:
            return tokens, []
        return tokens, self.pyramid(features) if self.pyramid else features


class _Pyramid(nn.Module):
    """Maps of one stride -> maps of strides 4, 8, 16 and 32."""

    def __init__(self, layout: Layout, region: int) -> None:
        super().__init__()
        self.sides = [region // stride for stride in PYRAMID_STRIDES]
        self.channels: list[int] = []
        self.levels = nn.ModuleList()
        last = len(layout.channels) - 1
        self.sources = [round(k * last / 3) for k in range(4)]
        for stride, source in zip(PYRAMID_STRIDES, self.sources, strict=True):
            dim, native = layout.channels[source], layout.strides[source]
            factor = 1
            while native > factor * stride:
                factor *= 2
            width = dim if factor == 1 else max(16, dim // (2 * factor))
            self.channels.append(width)
            self.levels.append(
                nn.Identity()
                if factor == 1
                else nn.Sequential(_ChannelNorm(dim), nn.ConvTranspose2d(dim, width, factor, stride=factor))
            )

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        return [
            resample_mean(level(features[source]), side)
            for level, source, side in zip(self.levels, self.sources, self.sides, strict=True)
        ]


class _ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of (n, c, h, w)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _unlike_zero(trunk: nn.Module) -> None:
    """Give the first convolution the bias of PyTorch's own initialisation where timm has set it to zero.

    ConvNeXt starts without biases. Where the image is black, padded or nodata every LayerNorm then divides zeros by the
    root of its epsilon, and each multiplies the gradient by 1,000: a fresh segmentation model with convnextv2_atto had
    a gradient norm of 7e8 on a GeoTIFF with nodata, and has 3 with this bias.
    """
    first = next((m for m in trunk.modules() if isinstance(m, nn.Conv2d)), None)
    if first is None or first.bias is None or first.bias.is_meta:  # nothing to set
        return
    if not first.bias.any():
        bound = first.weight[0].numel() ** -0.5
        nn.init.uniform_(first.bias, -bound, bound)


def resample_mean(x: Tensor, side: int) -> Tensor:
    """Average a square map (n, c, s, s) down to (n, c, side, side), side <= s.

    Each output cell is the mean over the area that it covers, cut cells counted by their share; so cells stay centred
    where `adaptive_avg_pool2d` would shift them, and the backward pass on a GPU is deterministic.
    """
    size = x.shape[-1]
    if size == side:
        return x
    if size % side == 0:
        return F.avg_pool2d(x, size // side)
    edges = torch.arange(side + 1, dtype=torch.float64, device=x.device) * size / side
    cells = torch.arange(size, dtype=torch.float64, device=x.device)
    overlap = torch.minimum(edges[1:, None], cells + 1) - torch.maximum(edges[:-1, None], cells)  # (side, size)
    weights = (overlap.clamp(min=0.0) * (side / size)).to(x.dtype)
    return weights @ x @ weights.T
