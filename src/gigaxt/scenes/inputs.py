"""What a model expects of its images, and how an image is made so."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from gigaxt.augment import resample_below, resize_below
from gigaxt.errors import ConfigError, DataError
from gigaxt.image.base import Image
from gigaxt.targets.base import SceneTarget

SAME_SIZE = 0.01
"""Pixel sizes that differ by less than this share are the same."""
MOST_ENLARGED = 2.0
"""An image whose pixels are coarser than the model's by more than this factor is refused."""


@dataclass(kw_only=True)
class InputConfig:
    """What the model expects of its images, and how they are cut; part of the saved model."""

    mean: list[float] | None = None
    """Of each band, in the files' units. None: 0."""
    std: list[float] | None = None
    """Of each band, in the files' units. None: 1, but integers are divided by the largest value of their type."""
    band_names: list[str] | None = None
    """Which bands, in this order; None takes all, whatever they are called."""
    mpp: float | None = None
    """Micrometres a pixel; images that say otherwise are resampled. None takes them as they are."""
    gsd_m: float | None = None
    """The same in metres, for georeferenced images."""
    resize_px: int | None = None
    """Resize every image to this length of `resize_side` before it is cut; None takes images as large as they are.
    Masks that are predicted have the resized image's size. Tensors are taken as they are."""
    resize_side: Literal["longest", "shortest", "both"] = "longest"
    """Which side becomes `resize_px`; the other one follows. both: a square, which squashes what is none."""
    rgb: bool = False
    """Read PNG, JPEG, BMP and WebP pictures as RGB, whether they are grey, CMYK, or have alpha or a palette."""
    halo: int = 0
    """Pixels read around each region's core and cut off after decoding; a multiple of 32."""
    overview: list[int] = field(default_factory=list)
    """Downsample factors of coarser levels whose regions join the context, such as [8] or [8, 64]."""
    foreground: str | None = None
    """Which regions are worth encoding: "tissue", or a raster or GeoJSON file for all images (longitude and latitude,
    or the CRS that its `crs` member names; px of an image without a CRS); None: all with data."""

    def __post_init__(self) -> None:
        if (self.mean is None) != (self.std is None):
            raise ConfigError("input: expected `mean` and `std` together, got one of them")
        if self.mean is not None and self.std is not None:
            if len(self.mean) != len(self.std):
                raise ConfigError(f"input: {len(self.mean)} values of `mean`, {len(self.std)} of `std`")
            if not all(math.isfinite(m) for m in self.mean):
                raise ConfigError(f"input.mean: expected finite numbers, got {self.mean}")
            if not all(0 < s < math.inf for s in self.std):
                raise ConfigError(f"input.std: expected numbers above 0, got {self.std}")
        for name in ("mpp", "gsd_m"):
            size = getattr(self, name)
            if size is not None and not 0 < size < math.inf:
                raise ConfigError(f"input.{name}: expected a positive number, got {size}")
        if self.halo < 0:
            raise ConfigError(f"input.halo: expected a multiple of 32 px from 0, got {self.halo}")
        if self.mpp is not None and self.gsd_m is not None:
            raise ConfigError("input: `mpp` and `gsd_m` exclude each other; give one")
        if self.resize_px is not None and self.resize_px < 1:
            raise ConfigError(f"input.resize_px: expected at least 1, got {self.resize_px}")
        if self.resize_px is not None and (self.mpp is not None or self.gsd_m is not None):
            raise ConfigError("input: `resize_px` and a pixel size (`mpp`, `gsd_m`) exclude each other; give one")


def to_pixel_size(
    image: Image, config: InputConfig, target: SceneTarget | None = None
) -> tuple[Image, SceneTarget | None]:
    """An image, and its target with it, on the model's pixel size.

    Raises:
        DataError: the image has no pixel size though the model has one, or its pixels are far too coarse.
    """
    wanted, own, unit = (config.mpp, image.mpp, "µm") if config.gsd_m is None else (config.gsd_m, image.gsd_m, "m")
    if wanted is None:
        return image, target
    if own is None:
        raise DataError(
            f"{image.name}: the model works at {wanted} {unit} a pixel, the image does not say its pixel size"
        )
    scale_x, scale_y = wanted / own[0], wanted / own[1]
    if max(abs(scale_x - 1), abs(scale_y - 1)) < SAME_SIZE:
        return image, target
    if min(scale_x, scale_y) < 1 / MOST_ENLARGED:
        raise DataError(
            f"{image.name}: the model works at {wanted} {unit} a pixel, "
            f"the image has only {own[0]:.4g} x {own[1]:.4g} {unit}"
        )
    moved = None if target is None else target.resampled(scale_x, scale_y)
    return resample_below(image, scale_x, scale_y), moved


def to_size(image: Image, target: SceneTarget | None, config: InputConfig) -> tuple[Image, SceneTarget | None]:
    """An image, and its target with it, at the size that the model wants, if it wants one."""
    if config.resize_px is None:
        return image, target
    width, height = resized(image.width, image.height, config.resize_px, config.resize_side)
    moved = None if target is None else target.resized(width, height)
    return resize_below(image, width, height), moved


def resized(width: int, height: int, px: int, side: Literal["longest", "shortest", "both"]) -> tuple[int, int]:
    """(width, height) where that side is `px` long; rounded, and at least 1."""
    if side == "both":
        return px, px
    scale = px / (max if side == "longest" else min)(width, height)
    return max(1, round(width * scale)), max(1, round(height * scale))
