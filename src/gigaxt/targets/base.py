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

    def objects_at(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Places that windows may be drawn around, (n, 2) as (row, col) in px, and weights (n,); none of masks."""
        return np.zeros((0, 2)), np.zeros(0)

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

    def turned(self, k: int) -> Self:
        """See `SceneTarget.turned`."""
        return self._of(dihedral(self.mask, k))

    def cropped(self, x: int, y: int, width: int, height: int) -> Self:
        """See `SceneTarget.cropped`."""
        return self._of(Cropped(self.mask, x, y, width, height))

    def resampled(self, scale_x: float, scale_y: float) -> Self:
        """See `SceneTarget.resampled`; the nearest pixel's class."""
        return self._of(resample_below(self.mask, scale_x, scale_y, nearest=True))

    def resized(self, width: int, height: int) -> Self:
        """See `SceneTarget.resized`; the nearest pixel's class."""
        return self._of(resize_below(self.mask, width, height, nearest=True))

    def _of(self, mask: Image) -> Self:
        return type(self)(mask)


class BandsTarget(MaskTarget):
    """A raster of several bands on the grid of its image: labels, or numbers, of every pixel.

    Args:
        mask: a band for each of them. What is not valid in it is not known.
        bands: how many there must be.
        numbers: numbers rather than labels; those that are nodata or NaN in one band are not known in that one.
    """

    def __init__(self, mask: Image, bands: int, *, numbers: bool) -> None:
        super().__init__(mask)
        self.bands, self.numbers = bands, numbers

    def check(self, image: Grid) -> None:
        """It has the size of its image, and the bands."""
        check_mask(image, self.mask, self.bands)
        if not self.numbers and self.mask.dtype.kind not in "iub":
            raise DataError(f"{self.name}: expected labels 0 and 1 of an integer type, got {self.mask.dtype}")

    def draw(self, x: int, y: int, w: int, h: int) -> dict[str, NDArray[Any]]:
        """`target` (bands, h, w), int64 or floating with NaN where not known, and `valid` (h, w)."""
        pixels, valid = self.mask.read_valid(x, y, w, h)
        values = pixels.transpose(2, 0, 1)  # (h, w, bands) -> (bands, h, w)
        if not self.numbers:
            return {"target": values.astype(np.int64), "valid": valid}
        target = values.astype(np.result_type(values.dtype, np.float32))
        if self.mask.nodata is not None:
            target[values == np.asarray(self.mask.nodata).astype(values.dtype)] = np.nan
        return {"target": target, "valid": valid}

    def resampled(self, scale_x: float, scale_y: float) -> Self:
        """See `SceneTarget.resampled`; the mean of one band of numbers, else the nearest pixel."""
        return self._of(resample_below(self.mask, scale_x, scale_y, nearest=self._nearest))

    def resized(self, width: int, height: int) -> Self:
        """See `SceneTarget.resized`; the mean of one band of numbers, else the nearest pixel."""
        return self._of(resize_below(self.mask, width, height, nearest=self._nearest))

    @property
    def _nearest(self) -> bool:
        # A mean leaves out what is nodata in all bands; what is nodata in one of several would enter it.
        return not self.numbers or self.bands > 1

    def _of(self, mask: Image) -> Self:
        return type(self)(mask, self.bands, numbers=self.numbers)


class WindowTarget(SceneTarget):
    """A target of which only a window counts: of the rest of the image a model sees the tokens alone.

    Args:
        target: of the whole image.
        window: (x, y, w, h) in px of the image.
        size: (width, height) of the image, px.
    """

    def __init__(self, target: SceneTarget, window: tuple[int, int, int, int], size: tuple[int, int]) -> None:
        self.target, self.window, self.size, self.name = target, window, size, target.name

    def check(self, image: Grid) -> None:
        """As the whole target."""
        self.target.check(image)

    def reaches(self, x: int, y: int, w: int, h: int) -> bool:
        """Whether anything there counts."""
        left, top, width, height = self.window
        return x < left + width and left < x + w and y < top + height and top < y + h

    def draw(self, x: int, y: int, w: int, h: int) -> dict[str, NDArray[Any]]:
        """As the whole target, with nothing known outside of the window."""
        left, top, width, height = self.window
        found = self.target.draw(x, y, w, h)
        inside = np.zeros((h, w), dtype=np.bool_)
        inside[max(top - y, 0) : max(top + height - y, 0), max(left - x, 0) : max(left + width - x, 0)] = True
        return {**found, "valid": inside & found.get("valid", True)}

    def turned(self, k: int) -> WindowTarget:
        """See `SceneTarget.turned`."""
        (x, y, w, h), (width, height) = self.window, self.size
        if k & 4:
            x, y, w, h, width, height = y, x, h, w, height, width
        x, y = width - x - w if k & 1 else x, height - y - h if k & 2 else y
        return WindowTarget(self.target.turned(k), (x, y, w, h), (width, height))

    def cropped(self, x: int, y: int, width: int, height: int) -> WindowTarget:
        """See `SceneTarget.cropped`."""
        left, top, w, h = self.window
        return WindowTarget(self.target.cropped(x, y, width, height), (left - x, top - y, w, h), (width, height))

    def resampled(self, scale_x: float, scale_y: float) -> WindowTarget:
        """See `SceneTarget.resampled`."""
        size = max(1, round(self.size[0] / scale_x)), max(1, round(self.size[1] / scale_y))
        return self._scaled(self.target.resampled(scale_x, scale_y), 1 / scale_x, 1 / scale_y, size)

    def resized(self, width: int, height: int) -> WindowTarget:
        """See `SceneTarget.resized`."""
        changed = self.target.resized(width, height)
        return self._scaled(changed, width / self.size[0], height / self.size[1], (width, height))

    def _scaled(self, target: SceneTarget, by_x: float, by_y: float, size: tuple[int, int]) -> WindowTarget:
        x, y, w, h = self.window
        left, top, right, bottom = round(x * by_x), round(y * by_y), round((x + w) * by_x), round((y + h) * by_y)
        return WindowTarget(target, (left, top, max(1, right - left), max(1, bottom - top)), size)


class TakesTargets(Protocol):
    """A dense head, as far as targets go."""

    def as_target(self, target: Any) -> SceneTarget:
        """See `gigaxt.nn.heads.dense.DenseHead`."""


def target_for(head: TakesTargets, target: Any) -> SceneTarget:
    """What `head` learns of a scene, or of a window of it."""
    if isinstance(target, WindowTarget):
        return WindowTarget(head.as_target(target.target), target.window, target.size)
    return head.as_target(target)


def as_bands(target: Any, bands: int, *, numbers: bool) -> BandsTarget:
    """Labels or numbers from an Image, or from an array or tensor (H, W), of several bands (H, W, bands).

    Raises:
        DataError: something else.
    """
    if isinstance(target, BandsTarget):
        return target
    if isinstance(target, Image):
        return BandsTarget(target, bands, numbers=numbers)
    array = np.asarray(target.detach().cpu() if hasattr(target, "detach") else target)
    kinds = "iuf" if numbers else "iub"
    if array.ndim not in (2, 3) or array.dtype.kind not in kinds:
        what = "numbers" if numbers else "labels 0 and 1 of an integer type"
        raise DataError(f"expected {what} (H, W) or (H, W, bands), got {array.dtype} {array.shape}")
    return BandsTarget(open_image(array), bands, numbers=numbers)


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


def check_mask(image: Grid, mask: Image, bands: int = 1) -> None:
    """A mask must lie on the image's grid.

    Raises:
        DataError: it has another size, or other bands.
    """
    if (mask.height, mask.width) != (image.height, image.width):
        raise DataError(
            f"{mask.name}: the mask has {mask.width} x {mask.height} px, "
            f"its image {image.name} has {image.width} x {image.height}"
        )
    if mask.channels != bands:
        what = "a mask of one band with class numbers" if bands == 1 else f"{bands} bands, one for each of `classes`"
        raise DataError(f"{mask.name}: expected {what}, got {mask.channels} bands")
