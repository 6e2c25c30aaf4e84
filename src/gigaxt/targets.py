"""What a dense head learns of one scene: a target that moves with its image and is drawn region by region."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from gigaxt.augment import dihedral, resample_below, resize_below
from gigaxt.errors import DataError
from gigaxt.image.base import Image
from gigaxt.image.open import open_image
from gigaxt.image.views import Cropped


class Grid(Protocol):
    """What a target must know of its image."""

    name: str
    height: int
    width: int


class SceneTarget(ABC):
    """A target of one scene, in px of its image. Regions are drawn from it, in threads, any number of times.

    Attributes:
        name: of the file that it comes from, for messages.
    """

    name: str

    @abstractmethod
    def check(self, image: Grid) -> None:
        """Refuse an image that this is no target of.

        Raises:
            DataError: it does not fit `image`.
        """

    @abstractmethod
    def draw(self, x: int, y: int, w: int, h: int) -> dict[str, NDArray[Any]]:
        """What the head's loss takes of one region's core, by name; of the same shapes for every region.

        A boolean array (h, w) under `valid` is False where nothing is known; without it everything is.

        Args:
            x: left edge, px.
            y: top edge, px.
            w: px; the core may reach beyond the image.
            h: px.
        """

    @abstractmethod
    def turned(self, k: int) -> Self:
        """The target of `gigaxt.augment.dihedral(image, k)`."""

    @abstractmethod
    def cropped(self, x: int, y: int, width: int, height: int) -> Self:
        """The target of a window of the image."""

    @abstractmethod
    def resampled(self, scale_x: float, scale_y: float) -> Self:
        """The target of the image at pixels that are `scale_x` times as wide and `scale_y` times as high."""

    @abstractmethod
    def resized(self, width: int, height: int) -> Self:
        """The target of the image at another size."""


class MaskTarget(SceneTarget):
    """A raster of one band on the grid of its image: the class of every pixel.

    Args:
        mask: class numbers, of an integer type. What is not valid in it is not known.
    """

    def __init__(self, mask: Image) -> None:
        self.mask, self.name = mask, mask.name

    def check(self, image: Grid) -> None:
        """A mask has the size of its image and one band."""
        check_mask(image, self.mask)

    def draw(self, x: int, y: int, w: int, h: int) -> dict[str, NDArray[Any]]:
        """`target` (h, w) int64 and `valid` (h, w)."""
        pixels, valid = self.mask.read_valid(x, y, w, h)
        return {"target": pixels[..., 0].astype(np.int64), "valid": valid}

    def turned(self, k: int) -> MaskTarget:
        """See `SceneTarget.turned`."""
        return MaskTarget(dihedral(self.mask, k))

    def cropped(self, x: int, y: int, width: int, height: int) -> MaskTarget:
        """See `SceneTarget.cropped`."""
        return MaskTarget(Cropped(self.mask, x, y, width, height))

    def resampled(self, scale_x: float, scale_y: float) -> MaskTarget:
        """See `SceneTarget.resampled`; the nearest pixel's class."""
        return MaskTarget(resample_below(self.mask, scale_x, scale_y, nearest=True))

    def resized(self, width: int, height: int) -> MaskTarget:
        """See `SceneTarget.resized`; the nearest pixel's class."""
        return MaskTarget(resize_below(self.mask, width, height, nearest=True))


def as_mask(target: Any) -> MaskTarget:
    """A mask from an Image, or from an array or tensor (H, W) of whole numbers.

    Raises:
        DataError: something else.
    """
    if isinstance(target, MaskTarget):
        return target
    if isinstance(target, Image):
        return MaskTarget(target)
    array = np.asarray(target.detach().cpu() if hasattr(target, "detach") else target)
    if array.ndim != 2 or not np.issubdtype(array.dtype, np.integer):
        raise DataError(f"expected a mask (H, W) of integer classes, got {array.dtype} {array.shape}")
    return MaskTarget(open_image(array))


def check_mask(image: Grid, mask: Image) -> None:
    """A mask must lie on the image's grid.

    Raises:
        DataError: it has another size, or several bands.
    """
    if (mask.height, mask.width) != (image.height, image.width):
        raise DataError(
            f"{mask.name}: the mask has {mask.width} x {mask.height} px, "
            f"its image {image.name} has {image.width} x {image.height}"
        )
    if mask.channels != 1:
        raise DataError(f"{mask.name}: expected a mask of one band with class numbers, got {mask.channels} bands")
