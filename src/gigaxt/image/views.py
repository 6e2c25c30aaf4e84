"""Images made of another image: some of its bands, or another pixel size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gigaxt.config import nearest as nearest_name
from gigaxt.errors import ImageError
from gigaxt.image.base import Image, Level, Mask, Pixels, Window
from gigaxt.image.taps import Axis, Taps, apply_taps, valid_taps

_BLOCK = 1 << 22  # input px that a resampled window holds at once


class Select(Image):
    """Some bands of an image. A pixel is nodata where each of these bands is.

    Attributes:
        base: the image below.

    Args:
        image: where the bands are.
        bands: their names or indexes from 0, in the order wanted.

    Raises:
        ImageError: a band that the image does not have.
    """

    def __init__(self, image: Image, bands: Sequence[int | str]) -> None:
        copy_description(self, image)
        self.base = image
        self._bands = tuple(band_index(image, band) for band in bands)
        if not self._bands:
            raise ImageError(image.name, "expected at least one band to select")
        self.height, self.width, self.levels = image.height, image.width, image.levels
        self.channels = len(self._bands)
        self.band_names = tuple(image.band_names[band] for band in self._bands)

    @property
    def all_valid(self) -> bool:
        """See `Image.all_valid`."""
        return self.base.all_valid

    def _read_inside(self, x: int, y: int, w: int, h: int, level: int) -> Pixels:
        return self.base._read_bands(self._bands, x, y, w, h, level)

    def _read_bands(self, bands: tuple[int, ...], x: int, y: int, w: int, h: int, level: int) -> Pixels:
        return self.base._read_bands(tuple(self._bands[band] for band in bands), x, y, w, h, level)

    def _read_valid_inside(
        self, x: int, y: int, w: int, h: int, level: int, bands: tuple[int, ...] | None = None
    ) -> tuple[Pixels, Mask]:
        wanted = self._bands if bands is None else tuple(self._bands[band] for band in bands)
        return self.base._read_valid_inside(x, y, w, h, level, wanted)

    def _read_each(
        self, out: Sequence[Pixels], windows: Sequence[Window], level: int, bands: tuple[int, ...] | None = None
    ) -> None:
        wanted = self._bands if bands is None else tuple(self._bands[band] for band in bands)
        self.base._read_each(out, windows, level, wanted)

    def _expect(self, windows: Sequence[Window], level: int, bands: tuple[int, ...]) -> None:
        self.base._expect(windows, level, tuple(self._bands[band] for band in bands))


def band_index(image: Image, band: int | str) -> int:
    """The index of a band given by name or index.

    Raises:
        ImageError: there is no such band.
    """
    if isinstance(band, str):
        if band in image.band_names:
            return image.band_names.index(band)
        raise ImageError(image.name, f"no band {band!r}{nearest_name(band, image.band_names)}")
    if not 0 <= band < image.channels:
        raise ImageError(image.name, f"expected a band from 0 to {image.channels - 1}, got {band}")
    return int(band)


def copy_description(view: Image, image: Image) -> None:
    """Give a view the name, dtype, nodata, place and pixel size of the image that it shows."""
    view.name, view.dtype, view.nodata, view.orientation = image.name, image.dtype, image.nodata, image.orientation
    view.mpp, view.crs, view.crs_unit_m, view.transform = image.mpp, image.crs, image.crs_unit_m, image.transform
    view.channels, view.band_names = image.channels, image.band_names


class Cropped(Image):
    """A window of an image at full resolution, an image of its own.

    Its name holds the window, so that what is cached for the file is not taken for what belongs to its part.

    Attributes:
        base: the image below.
        x: left edge of the window in it, px.
        y: top edge.

    Args:
        image: where the window is.
        x: its left edge, px of level 0.
        y: its top edge.
        width: px.
        height: px.

    Raises:
        ImageError: the window is empty or reaches beyond the image.
    """

    def __init__(self, image: Image, x: int, y: int, width: int, height: int) -> None:
        if not (0 <= x < x + width <= image.width and 0 <= y < y + height <= image.height):
            size = f"{image.width} x {image.height} px"
            raise ImageError(image.name, f"expected a window inside {size}, got {width} x {height} at x {x}, y {y}")
        copy_description(self, image)
        self.name = f"{image.name}, {width} x {height} px at x {x}, y {y}"
        self.base, self.x, self.y, self.width, self.height = image, x, y, width, height
        self.levels = (Level(width, height, 1.0, 1.0),)
        if image.transform is not None:
            a, b, c, d, e, f = image.transform
            self.transform = (a, b, a * x + b * y + c, d, e, d * x + e * y + f)

    @property
    def all_valid(self) -> bool:
        """See `Image.all_valid`."""
        return self.base.all_valid

    def _read_inside(self, x: int, y: int, w: int, h: int, level: int) -> Pixels:
        return self.base._read_inside(x + self.x, y + self.y, w, h, 0)

    def _read_bands(self, bands: tuple[int, ...], x: int, y: int, w: int, h: int, level: int) -> Pixels:
        return self.base._read_bands(bands, x + self.x, y + self.y, w, h, 0)

    def _read_valid_inside(
        self, x: int, y: int, w: int, h: int, level: int, bands: tuple[int, ...] | None = None
    ) -> tuple[Pixels, Mask]:
        return self.base._read_valid_inside(x + self.x, y + self.y, w, h, 0, bands)

    def _read_each(
        self, out: Sequence[Pixels], windows: Sequence[Window], level: int, bands: tuple[int, ...] | None = None
    ) -> None:
        self.base._read_each(out, self._below(windows), 0, bands)

    def _expect(self, windows: Sequence[Window], level: int, bands: tuple[int, ...]) -> None:
        self.base._expect(self._below(windows), 0, bands)

    def _below(self, windows: Sequence[Window]) -> list[Window]:
        return [(x + self.x, y + self.y, w, h) for x, y, w, h in windows]


class Resampled(Image):
    """An image on another grid: a mean over valid pixels where it shrinks, bilinear where it grows.

    Validity: where it shrinks, a pixel is valid if any pixel below it is; where it grows, if the nearest one is.
    Means of integers are rounded. Reading a window gives exactly that part of the whole.

    Attributes:
        base: the image below.

    Args:
        image: what to resample.
        width: of the result.
        height: of the result.
        scale: level-0 px of `image` per px of the result, (x, y).
        offset: where the result begins, in level-0 px of `image`, (x, y).
        nearest: take the pixel below each centre instead, always of level 0 (for class indices).
        smooth: the mean where it shrinks is weighed by a triangle that reaches into the neighbours (see `resize`), not
            by the area below a pixel.
    """

    def __init__(
        self,
        image: Image,
        width: int,
        height: int,
        scale: tuple[float, float],
        offset: tuple[float, float] = (0.0, 0.0),
        *,
        nearest: bool = False,
        smooth: bool = False,
    ) -> None:
        copy_description(self, image)
        self.base, self._nearest, self.width, self.height = image, nearest, width, height
        if image.mpp is not None:
            self.mpp = (image.mpp[0] * scale[0], image.mpp[1] * scale[1])
        if image.transform is not None:
            a, b, c, d, e, f = image.transform
            (sx, sy), (x, y) = scale, offset
            self.transform = (a * sx, b * sy, a * x + b * y + c, d * sx, e * sy, d * x + e * y + f)
        self._level = 0 if nearest else _finer_level(image, scale)
        size, (dx, dy) = image.levels[self._level], true_factors(image, self._level)
        self._cols = Axis(size.width, scale[0] / dx, offset[0] / dx, nearest, smooth)
        self._rows = Axis(size.height, scale[1] / dy, offset[1] / dy, nearest, smooth)
        self._lower: list[int] = []
        if offset == (0.0, 0.0) and not nearest:  # coarser levels of the image serve as they are
            self._lower = [n for n, low in enumerate(image.levels) if low.downsample_x > 1.5 * max(1.0, *scale)]
        self.levels = (
            Level(width, height, 1.0, 1.0),
            *(
                Level(low.width, low.height, width / low.width, height / low.height)
                for low in (image.levels[n] for n in self._lower)
            ),
        )

    @property
    def all_valid(self) -> bool:
        """See `Image.all_valid`."""
        return self.base.all_valid

    def _read_inside(self, x: int, y: int, w: int, h: int, level: int) -> Pixels:
        if level:
            return self.base.read(x, y, w, h, self._lower[level - 1])
        return self._resample(None, x, y, w, h)[0]

    def _read_bands(self, bands: tuple[int, ...], x: int, y: int, w: int, h: int, level: int) -> Pixels:
        if level:
            return Select(self.base, bands).read(x, y, w, h, self._lower[level - 1])
        return self._resample(bands, x, y, w, h)[0]

    def _read_valid_inside(
        self, x: int, y: int, w: int, h: int, level: int, bands: tuple[int, ...] | None = None
    ) -> tuple[Pixels, Mask]:
        if level:
            source = self.base if bands is None else Select(self.base, bands)
            return source.read_valid(x, y, w, h, self._lower[level - 1])
        pixels, mask = self._resample(bands, x, y, w, h)
        return pixels, np.ones((h, w), np.bool_) if mask is None else mask

    def _expect(self, windows: Sequence[Window], level: int, bands: tuple[int, ...]) -> None:
        if level:
            self.base._expect(windows, self._lower[level - 1], bands)
            return
        below = []
        for x, y, w, h in windows:
            (left, right), (top, bottom) = self._cols.reach(x, w), self._rows.reach(y, h)
            below.append((left, top, right - left, bottom - top))
        self.base._expect(below, self._level, bands)

    def _resample(self, bands: tuple[int, ...] | None, x: int, y: int, w: int, h: int) -> tuple[Pixels, Mask | None]:
        """A window of all or some bands and its validity (None if all of it is valid), in blocks of bounded size."""
        rows, cols = self._rows.taps(y, h), self._cols.taps(x, w)
        left, top = int(cols.index.min()), int(rows.index.min())
        right, bottom = int(cols.index.max()) + 1, int(rows.index.max()) + 1
        if (right - left) * (bottom - top) > _BLOCK and w * h > 1:
            if (bottom - top > right - left and h > 1) or w == 1:
                parts = [self._resample(bands, x, y, w, h // 2), self._resample(bands, x, y + h // 2, w, h - h // 2)]
            else:
                parts = [self._resample(bands, x, y, w // 2, h), self._resample(bands, x + w // 2, y, w - w // 2, h)]
            axis = 0 if parts[0][0].shape[0] < h else 1
            masks = [mask for _, mask in parts if mask is not None]
            return np.concatenate([part for part, _ in parts], axis), np.concatenate(masks, axis) if masks else None
        source = self.base if bands is None else Select(self.base, bands)
        # Whether to weigh by validity is decided by the image, not by the window: windows would differ by rounding.
        pixels, mask = (
            (source.read(left, top, right - left, bottom - top, self._level), None)
            if source.all_valid
            else source.read_valid(left, top, right - left, bottom - top, self._level)
        )
        rows = replace(rows, index=rows.index - top, nearest=rows.nearest - top)
        cols = replace(cols, index=cols.index - left, nearest=cols.nearest - left)
        return self._combine(pixels, mask, rows, cols)

    def _combine(self, pixels: Pixels, mask: Mask | None, rows: Taps, cols: Taps) -> tuple[Pixels, Mask | None]:
        if rows.index.shape[1] == cols.index.shape[1] == 1:
            place = np.ix_(rows.index[:, 0], cols.index[:, 0])
            return pixels[place], None if mask is None else mask[place]
        averages = (self._rows.averages, self._cols.averages)
        result = self._as_stored(apply_taps(pixels, mask, rows, cols, averages))
        if mask is None:
            return result, None
        valid = valid_taps(mask, rows, cols, averages)
        if self.nodata is not None:
            result[~valid] = self.nodata
        return result, valid

    def _as_stored(self, values: NDArray[Any]) -> Pixels:
        if self.dtype.kind == "f":
            return values.astype(self.dtype, copy=False)
        limits: Any = np.iinfo(self.dtype)
        stored: Pixels = np.clip(np.rint(values), limits.min, limits.max).astype(self.dtype)
        return stored


def resample(image: Image, scale_x: float, scale_y: float | None = None, *, nearest: bool = False) -> Image:
    """A view of an image with other pixels: `scale_x` x `scale_y` of the image's px make one.

    Reads from the next finer level. Its size is max(1, round(size / scale)); the last pixel of a row may so reach
    beyond the image (only what lies inside counts) or leave up to half a pixel out. Where all of `nearest` is False it
    is the mean over valid pixels if `scale` > 1 and bilinear below; see `Resampled`.

    Args:
        image: what to resample.
        scale_x: px of level 0 per px of the view, along x; 2 halves the width.
        scale_y: along y; as `scale_x` if not given.
        nearest: take single pixels of level 0, for class indices.

    Raises:
        ImageError: a scale that is not positive.
    """
    scale_y = scale_x if scale_y is None else scale_y
    if not (0 < scale_x < np.inf and 0 < scale_y < np.inf):
        raise ImageError(image.name, f"expected a positive scale to resample by, got {scale_x} x {scale_y}")
    if scale_x == scale_y == 1:
        return image
    width, height = (max(1, round(size / by)) for size, by in ((image.width, scale_x), (image.height, scale_y)))
    return Resampled(image, width, height, (scale_x, scale_y), nearest=nearest)


def true_factors(image: Image, level: int) -> tuple[float, float]:
    """Downsample factors of a level: whole numbers where its size is that of a whole factor, rounded up or down."""
    size = image.levels[level]
    pairs = ((image.width, size.width, size.downsample_x), (image.height, size.height, size.downsample_y))
    near = [round(factor) for _, _, factor in pairs]
    # A side of a few px fits many factors: the other side, or both together, decide.
    for whole in sorted(set(near), reverse=True):
        if all(abs(full / whole - low) < 1 for full, low, _ in pairs):
            return float(whole), float(whole)
    fx, fy = (
        float(whole) if abs(full / whole - low) < 1 else factor
        for whole, (full, low, factor) in zip(near, pairs, strict=True)
    )
    return fx, fy


def _finer_level(image: Image, scale: tuple[float, float]) -> int:
    """The coarsest level that is still at least as fine as `scale`, to a thousandth."""
    best = 0
    for level in range(1, len(image.levels)):
        factors = true_factors(image, level)
        if all(factor <= wanted * 1.001 for factor, wanted in zip(factors, scale, strict=True)):
            best = level
    return best
