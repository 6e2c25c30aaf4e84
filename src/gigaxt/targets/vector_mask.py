"""Polygons as a mask that is drawn window by window, and as the limits of what is known of another mask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from gigaxt.image.base import Image, Level, Mask, Pixels
from gigaxt.image.views import copy_description
from gigaxt.shapes.polygons import Polygon, crossings, sides_of

STRIPE = 256
"""Rows of pixels whose sides are looked up together."""


class Painter:
    """Draws polygons into any window; where they overlap, the last one is on top.

    A pixel belongs to a polygon where its centre lies inside of an odd number of its rings. Each pixel follows from its
    own place alone, so windows fit together. Only what crosses a window's rows is looked at, by an index of the sides.

    Args:
        polygons: in px.
        height: of the image, px.
    """

    def __init__(self, polygons: Sequence[Polygon], height: int) -> None:
        sides = sides_of(list(polygons))
        top, bottom = np.minimum(sides[:, 1], sides[:, 3]), np.maximum(sides[:, 1], sides[:, 3])
        self._sides = sides[(bottom > 0) & (top < height)]
        across = [np.concatenate(polygon)[:, 0] for polygon in polygons]
        bounds = [(x.min(), x.max()) for x in across]
        self._left, self._right = np.asarray(bounds, dtype=np.float64).reshape(-1, 2).T
        self._stripes, self._starts = self._index(height)

    def _index(self, height: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Sides stripe by stripe, and where each stripe begins among them."""
        y = self._sides[:, [1, 3]].clip(0, height - 1)
        first, last = (edge.astype(np.int64) // STRIPE for edge in (y.min(axis=1), y.max(axis=1)))
        count = last - first + 1
        side = np.repeat(np.arange(len(first)), count)
        stripe = np.arange(len(side)) - np.repeat(np.cumsum(count) - count, count) + first[side]
        order = np.argsort(stripe, kind="stable")
        return side[order], np.searchsorted(stripe[order], np.arange(-(-height // STRIPE) + 1))

    def paint(self, canvas: NDArray[Any], values: NDArray[np.integer], x: int, y: int) -> None:
        """Draw the window at (x, y), inside the image, into `canvas` (h, w), with a value for each polygon."""
        h, w = canvas.shape
        number, row, across = crossings(self._near(x, y, w, h), y, y + h)
        column = np.clip(np.ceil(across - 0.5) - x, 0, w).astype(np.int64)
        # Along a row the crossings of one polygon go in, out, in, out, ...
        start, stop, row, number = column[::2], column[1::2], row[::2] - y, number[::2]
        count = stop - start
        begin = np.cumsum(count) - count
        pixel = np.arange(count.sum()) - np.repeat(begin, count) + np.repeat(row * w + start, count)
        # Sorted by polygon: of several values for one pixel NumPy leaves the last.
        canvas.reshape(-1)[pixel] = np.repeat(values[number], count)

    def _near(self, x: int, y: int, w: int, h: int) -> NDArray[np.float64]:
        """Sides of the polygons that may touch a window, where they cross its rows."""
        found = self._stripes[self._starts[y // STRIPE] : self._starts[(y + h - 1) // STRIPE + 1]]
        sides = self._sides[found if h <= STRIPE and y // STRIPE == (y + h - 1) // STRIPE else np.unique(found)]
        number = sides[:, 4].astype(np.int64)
        return np.asarray(sides[(self._left[number] < x + w) & (self._right[number] > x)])


class VectorMask(Image):
    """A mask on the grid of an image, drawn from polygons as it is read.

    Args:
        name: of the file.
        polygons: in px of the image.
        numbers: class, or band, of each polygon.
        image: whose grid it has.
        bands: of the mask; 1: pixels hold class numbers; more, or with `labels`: each band holds 0 and 1.
        labels: whether bands are labels.
        empty: what stands where no polygon is.
        dtype: of the mask.
    """

    def __init__(
        self,
        name: str,
        polygons: Sequence[Polygon],
        numbers: Sequence[int],
        image: Image,
        *,
        bands: int,
        labels: bool,
        empty: int,
        dtype: DTypeLike,
    ) -> None:
        copy_description(self, image)
        self.name, self.nodata, self.channels, self.dtype = name, None, bands, np.dtype(dtype)
        self.band_names = tuple(str(band + 1) for band in range(bands))
        self.height, self.width = image.height, image.width
        self.levels = (Level(self.width, self.height, 1.0, 1.0),)
        self._numbers, self._empty = np.asarray(numbers, dtype=np.int64), empty
        # Labels may overlap: each is drawn alone.
        groups = [self._numbers == band for band in range(bands)] if labels else [np.ones_like(self._numbers)]
        self._painters = [Painter([p for p, own in zip(polygons, g, strict=True) if own], image.height) for g in groups]
        self._labels = labels

    def _read_inside(self, x: int, y: int, w: int, h: int, level: int) -> Pixels:
        found = np.full((self.channels, h, w), 0 if self._labels else self._empty, dtype=self.dtype)
        for canvas, painter in zip(found, self._painters, strict=True):
            painter.paint(canvas, np.ones_like(self._numbers) if self._labels else self._numbers, x, y)
        if self._labels and self._empty:
            found[:, ~found.any(axis=0)] = self._empty
        return found.transpose(1, 2, 0)  # (bands, h, w) -> (h, w, bands)


class Within(Image):
    """A mask of which only what lies inside of polygons is known.

    Args:
        mask: any.
        polygons: in px of the mask.
    """

    def __init__(self, mask: Image, polygons: Sequence[Polygon]) -> None:
        copy_description(self, mask)
        self.height, self.width, self.levels = mask.height, mask.width, mask.levels[:1]
        self._mask, self._painter = mask, Painter(polygons, mask.height)
        self._ones = np.ones(len(polygons), dtype=np.uint8)

    @property
    def all_valid(self) -> bool:
        """See `Image.all_valid`."""
        return False

    def _read_inside(self, x: int, y: int, w: int, h: int, level: int) -> Pixels:
        return self._mask._read_inside(x, y, w, h, level)

    def _read_valid_inside(
        self, x: int, y: int, w: int, h: int, level: int, bands: tuple[int, ...] | None = None
    ) -> tuple[Pixels, Mask]:
        pixels, valid = self._mask._read_valid_inside(x, y, w, h, level, bands)
        inside = np.zeros((h, w), dtype=np.uint8)
        self._painter.paint(inside, self._ones, x, y)
        return pixels, valid & (inside > 0)
