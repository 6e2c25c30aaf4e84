"""Band statistics and class values from windows that are spread over an image."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from gigaxt.errors import DataError
from gigaxt.image.base import Image, Mask, Pixels

WINDOW = 256
"""Side of the windows that are read, px."""
MANY_VALUES = 1024
"""So many different values are no classes."""


class BandStatistics:
    """Mean and standard deviation a band, in the file's units, from windows that come one by one (Welford, Chan).

    Attributes:
        count: (bands,) int64, values seen.
        mean: (bands,) float64.
    """

    def __init__(self, bands: int) -> None:
        self.count = np.zeros(bands, dtype=np.int64)
        self.mean = np.zeros(bands)
        self._squares = np.zeros(bands)  # sums of squared distances from the mean

    @property
    def std(self) -> NDArray[np.float64]:
        """(bands,) standard deviations, 0 where nothing was seen."""
        return np.sqrt(self._squares / np.maximum(self.count, 1))

    def add(self, pixels: Pixels, valid: Mask, *, nodata: float | None = None) -> None:
        """Count a window: (h, w, bands) and (h, w).

        Left out, band by band, is what is not finite, and of floats what is `nodata`: as the model sees them.
        """
        values = pixels[valid].astype(np.float64)  # (n, bands)
        finite = np.isfinite(values)
        if nodata is not None and pixels.dtype.kind == "f":
            finite &= values != nodata
        part = BandStatistics(values.shape[1])
        part.count = finite.sum(axis=0)
        part.mean = np.where(finite, values, 0).sum(axis=0) / np.maximum(part.count, 1)
        part._squares = (np.where(finite, values - part.mean, 0) ** 2).sum(axis=0)
        self.merge(part)

    def select(self, bands: Sequence[int]) -> BandStatistics:
        """Those of some bands, in the order given; indices from 0."""
        part, chosen = BandStatistics(len(bands)), list(bands)
        part.count, part.mean, part._squares = self.count[chosen], self.mean[chosen], self._squares[chosen]
        return part

    def merge(self, other: BandStatistics) -> None:
        """Count what another one has seen."""
        total = self.count + other.count
        share = other.count / np.maximum(total, 1)
        distance = other.mean - self.mean
        self._squares = self._squares + other._squares + distance**2 * self.count * share
        self.mean = self.mean + distance * share
        self.count = total


def spread_windows(height: int, width: int, count: int, keep: Mask | None = None) -> list[tuple[int, int, int, int]]:
    """At most `count` windows (x, y, w, h) of up to `WINDOW` px a side, spread evenly; a small image is covered.

    Args:
        height: of the image, px.
        width: of the image, px.
        count: how many at most.
        keep: (rows, cols) of the lattice of `WINDOW` px: only these.
    """
    rows, cols = math.ceil(height / WINDOW), math.ceil(width / WINDOW)
    if keep is not None:
        cells = np.argwhere(keep)
        chosen = cells[np.unique(np.linspace(0, len(cells) - 1, min(count, len(cells))).round().astype(np.int64))]
        return [_cut(int(col) * WINDOW, int(row) * WINDOW, height, width) for row, col in chosen]
    if rows * cols <= count:
        return [_cut(col * WINDOW, row * WINDOW, height, width) for row in range(rows) for col in range(cols)]
    down = min(rows, count, max(1, round(math.sqrt(count * rows / cols))))
    across = max(1, min(cols, count // down))
    ys, xs = (np.linspace(0, max(size - WINDOW, 0), n + 2)[1:-1] for size, n in ((height, down), (width, across)))
    return [_cut(int(x), int(y), height, width) for y in ys for x in xs]


def class_values(mask: Image, max_pixels: int) -> tuple[Counter[int], bool]:
    """Pixels of each value of a one-band integer mask, and whether only a sample of it was read.

    Args:
        mask: the mask; pixels that are not valid are left out. Reading stops beyond `MANY_VALUES` different values.
        max_pixels: how many to read at most; the whole mask where it has no more.

    Raises:
        ImageError: the mask cannot be read.
    """
    sampled = mask.height * mask.width > max_pixels
    counts: Counter[int] = Counter()
    for x, y, w, h in _windows(mask, max_pixels):
        pixels, valid = mask.read_valid(x, y, w, h)
        values, numbers = np.unique(pixels[:, :, 0][valid], return_counts=True)
        counts.update(dict(zip(values.tolist(), numbers.tolist(), strict=True)))
        if len(counts) > MANY_VALUES:
            return counts, True
    return counts, sampled


def label_pixels(mask: Image, max_pixels: int, ignore: int) -> tuple[Counter[int], int, bool]:
    """Pixels in which each band of a mask is 1, how many pixels were read, and whether only a sample was.

    Raises:
        DataError: a value other than 0, 1 and `ignore`. ImageError: the mask cannot be read.
    """
    counts: Counter[int] = Counter(dict.fromkeys(range(mask.channels), 0))
    known = 0
    for x, y, w, h in _windows(mask, max_pixels):
        pixels, valid = mask.read_valid(x, y, w, h)
        values = pixels[valid]  # (n, bands)
        wrong = (values != 0) & (values != 1) & (values != ignore)
        if wrong.any():
            raise DataError(f"{mask.name}: expected labels 0 and 1 (and {ignore}: not known), got {values[wrong][0]}")
        counts.update({band: int(count) for band, count in enumerate((values == 1).sum(axis=0))})
        known += len(values)
    return counts, known, mask.height * mask.width > max_pixels


def number_statistics(raster: Image, max_pixels: int) -> BandStatistics:
    """Mean and standard deviation of the numbers that are known in each band, of the whole raster or of a sample.

    Raises:
        ImageError: the raster cannot be read.
    """
    found = BandStatistics(raster.channels)
    for x, y, w, h in _windows(raster, max_pixels):
        pixels, valid = raster.read_valid(x, y, w, h)
        values = pixels.astype(np.float64)
        if raster.nodata is not None:  # also in single bands
            values[pixels == np.asarray(raster.nodata).astype(pixels.dtype)] = np.nan
        found.add(values, valid)
    return found


def _windows(image: Image, max_pixels: int) -> list[tuple[int, int, int, int]]:
    """Windows that cover an image, or are spread over it where it has more pixels."""
    if image.height * image.width > max_pixels:
        return spread_windows(image.height, image.width, max(1, max_pixels // WINDOW**2))
    return list(_blocks(image.height, image.width))


def _blocks(height: int, width: int, side: int = 2048) -> Iterator[tuple[int, int, int, int]]:
    for y in range(0, height, side):
        for x in range(0, width, side):
            yield x, y, min(side, width - x), min(side, height - y)


def _cut(x: int, y: int, height: int, width: int) -> tuple[int, int, int, int]:
    return x, y, min(WINDOW, width - x), min(WINDOW, height - y)
