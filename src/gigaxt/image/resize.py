"""A whole image at another size, as Pillow, torchvision and timm make pictures ready for a network."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image as Pillow

from gigaxt.errors import ImageError
from gigaxt.image.base import Image, Mask, Pixels
from gigaxt.image.views import Resampled

BILINEAR = Pillow.Resampling.BILINEAR
AT_ONCE = 1 << 24
"""Images of at most so many px are resized at once, if they are of 8 bits without nodata, and kept."""


def resize(image: Image, width: int, height: int, *, nearest: bool = False) -> Image:
    """A view of all of `image` at another size: bilinear, with antialiasing where it shrinks.

    Where it shrinks a pixel is a mean weighed by a triangle twice as wide as the pixel (of the coarsest level that is
    fine enough). That is `PIL.Image.resize` with BILINEAR, and `torchvision.transforms.Resize`: to the last bit for 8
    bit images of at most `AT_ONCE` px, which Pillow resizes. Others are resized window by window and rounded once, not
    once a direction, which may differ by one grey level. Validity as of `Resampled`.

    Args:
        image: what to resize.
        width: of the result, px.
        height: of the result, px.
        nearest: take single pixels of level 0, for class indices.

    Raises:
        ImageError: a side below 1 px.
    """
    if min(width, height) < 1:
        raise ImageError(image.name, f"expected at least 1 x 1 px to resize to, got {width} x {height}")
    if (width, height) == (image.width, image.height):
        return image
    if nearest:
        return Resampled(image, width, height, (image.width / width, image.height / height), nearest=True)
    return Resized(image, width, height)


class Resized(Resampled):
    """See `resize`, which makes these.

    Args:
        image: what to resize.
        width: of the result, px.
        height: of the result, px.
    """

    def __init__(self, image: Image, width: int, height: int) -> None:
        super().__init__(image, width, height, (image.width / width, image.height / height), smooth=True)
        small = max(image.width * image.height, width * height) <= AT_ONCE
        self._by_pillow = small and self._level == 0 and image.dtype == np.uint8 and image.all_valid
        self._pixels: NDArray[np.uint8] | None = None

    def __reduce__(self) -> tuple[Callable[..., Resized], tuple[Image, int, int]]:
        return Resized, (self.base, self.width, self.height)

    def _resample(self, bands: tuple[int, ...] | None, x: int, y: int, w: int, h: int) -> tuple[Pixels, Mask | None]:
        if not self._by_pillow:
            return super()._resample(bands, x, y, w, h)
        if self._pixels is None:  # two threads that come here at once make the same
            self._pixels = self._resized(self.base.read(0, 0, self.base.width, self.base.height))
        part = self._pixels[y : y + h, x : x + w]
        return part.copy() if bands is None else part[..., list(bands)], None

    def _resized(self, pixels: Pixels) -> NDArray[np.uint8]:
        """(h, w, channels) -> (height, width, channels); each band is resized on its own in Pillow, too."""
        size = (self.width, self.height)
        if pixels.shape[2] == 3:
            return np.asarray(Pillow.fromarray(pixels).resize(size, BILINEAR))
        bands = [Pillow.fromarray(pixels[..., band]).resize(size, BILINEAR) for band in range(pixels.shape[2])]
        return np.stack([np.asarray(band) for band in bands], axis=2)
