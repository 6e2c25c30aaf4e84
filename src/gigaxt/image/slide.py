"""Vendor slides (NDPI, MRXS, SCN, BIF, VMS, DICOM, ...) through openslide, the extra `wsi`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gigaxt.errors import ImageError
from gigaxt.image.base import Image, Level, Mask, Pixels
from gigaxt.image.files import File
from gigaxt.image.headers import HEAD, kind_of
from gigaxt.image.process import PerProcess
from gigaxt.image.tiff_walk import Walk


class SlideImage(Image):
    """A slide that openslide reads: RGB, the transparent parts white and not valid. 16-bit slides come as 8 bits.

    Windows of lower levels start at the nearest pixel of level 0, as openslide counts there.

    Args:
        path: the file, or one of the files of a slide.
        max_pixels: a larger width x height is refused.
        max_tile_bytes: a TIFF-based slide with larger tiles is refused.

    Raises:
        ImageError: openslide is not installed, or does not know the file.
    """

    def __init__(self, path: str | Path, *, max_pixels: int = 2**34, max_tile_bytes: int = 64 << 20) -> None:
        self.name = str(path)
        self._options: dict[str, Any] = {"max_pixels": max_pixels, "max_tile_bytes": max_tile_bytes}
        self._check_tiff(max_tile_bytes)
        self._slide = PerProcess(self._open)
        slide = self._slide.get()
        self.width, self.height = slide.dimensions
        if self.width * self.height > max_pixels:
            raise ImageError(self.name, f"expected at most {max_pixels} px, got {self.width} x {self.height}")
        self.channels, self.dtype, self.band_names = 3, np.dtype(np.uint8), ("1", "2", "3")
        self.levels = tuple(Level(w, h, self.width / w, self.height / h) for w, h in slide.level_dimensions)
        sizes = [float(slide.properties.get(f"openslide.mpp-{axis}", 0)) for axis in "xy"]
        self.mpp = (sizes[0], sizes[1]) if min(sizes) > 0 else None

    def __reduce__(self) -> tuple[Callable[..., SlideImage], tuple[str]]:
        return functools.partial(SlideImage, **self._options), (self.name,)

    @property
    def all_valid(self) -> bool:
        """See `Image.all_valid`: a slide may have holes between what was scanned."""
        return False

    def _check_tiff(self, max_tile_bytes: int) -> None:
        """Check the directories first: openslide ends the process on a huge tile."""
        file = File(self.name)
        if kind_of(file.read(0, min(HEAD, file.size))) != "tiff":
            return
        walk = Walk(file, max_tile_bytes)
        if not walk.is_ndpi:  # its tile sizes are in the JPEG streams, and are checked by libjpeg
            walk.chain()

    def _open(self) -> Any:
        try:
            import openslide
        except ImportError as error:
            raise ImageError(self.name, "slides of this kind need openslide: pip install 'gigaxt[wsi]'") from error
        try:
            return openslide.OpenSlide(self.name)
        except Exception as error:
            raise ImageError(self.name, f"openslide cannot open it: {type(error).__name__}: {error}") from error

    def _rgba(self, x: int, y: int, w: int, h: int, level: int) -> NDArray[np.uint8]:
        size = self.levels[level]
        corner = (round(x * size.downsample_x), round(y * size.downsample_y))
        slide = self._slide.get()
        try:
            return np.asarray(slide.read_region(corner, level, (w, h)))
        except Exception as error:
            self._slide.drop()  # after an error every read of the handle fails
            place = f"level {level}, x {x}, y {y}, {w} x {h} px"
            raise ImageError(self.name, f"openslide cannot read it: {type(error).__name__}: {error}", place) from error

    def _read_inside(self, x: int, y: int, w: int, h: int, level: int) -> Pixels:
        return _over_white(self._rgba(x, y, w, h, level))

    def _read_valid_inside(
        self, x: int, y: int, w: int, h: int, level: int, bands: tuple[int, ...] | None = None
    ) -> tuple[Pixels, Mask]:
        rgba = self._rgba(x, y, w, h, level)
        rgb = _over_white(rgba)
        return rgb if bands is None else rgb[..., list(bands)], rgba[..., 3] > 0


def _over_white(rgba: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(h, w, 4) with straight alpha -> (h, w, 3) on a white ground."""
    if (rgba[..., 3] == 255).all():
        return np.ascontiguousarray(rgba[..., :3])
    alpha = rgba[..., 3:].astype(np.uint16)
    return ((rgba[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
