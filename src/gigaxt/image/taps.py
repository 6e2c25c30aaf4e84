"""Resampling along one axis at a time, so that a window's pixels do not depend on where the window begins.

Each output pixel is a weighted sum of a few input pixels ("taps"), whose places and weights follow from its absolute
index alone, always added in the same order. So any window equals that part of the whole, to the last bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gigaxt.image.base import Mask, Pixels

_EXACT = 1e-9  # px; what is closer to a whole number than this came from rounding


@dataclass(frozen=True)
class Taps:
    """The input pixels of some output pixels."""

    index: NDArray[np.int64]
    """(outputs, taps), absolute, inside the input."""
    weight: NDArray[np.float64]
    """(outputs, taps), adding up to 1; 0 where `index` only repeats another."""
    nearest: NDArray[np.int64]
    """(outputs,): the input pixel below each output pixel's centre."""


@dataclass(frozen=True)
class Axis:
    """How the pixels of an output lie on those of an input, along one axis."""

    size: int
    """Of the input, px."""
    scale: float
    """Input px per output px."""
    offset: float = 0.0
    """Where output pixel 0 begins, in input px."""
    nearest: bool = False
    smooth: bool = False
    """Where it shrinks: weigh by a triangle twice as wide as an output pixel, not by the area below it."""

    @property
    def is_copy(self) -> bool:
        """Output pixels are input pixels, perhaps shifted by whole pixels."""
        return abs(self.scale - 1) < _EXACT and abs(self.offset - round(self.offset)) < _EXACT

    @property
    def averages(self) -> bool:
        """Whether output pixels cover several input pixels and take their mean."""
        return not self.nearest and not self.is_copy and self.scale > 1

    def taps(self, start: int, count: int) -> Taps:
        """Taps of output pixels `start` to `start + count - 1`."""
        out = np.arange(start, start + count, dtype=np.float64)
        centre = (out + 0.5) * self.scale + self.offset
        nearest = np.clip(np.floor(centre + _EXACT), 0, self.size - 1).astype(np.int64)
        if self.nearest or self.is_copy:
            return Taps(nearest[:, None], np.ones((count, 1)), nearest)
        if self.scale <= 1:
            index, weight = self._bilinear(centre)
        else:
            index, weight = self._triangle(centre) if self.smooth else self._area(out)
        weight[weight < _EXACT] = 0.0
        total = weight.sum(axis=1, keepdims=True)
        outside = total[:, 0] == 0  # an output pixel beside the input repeats its border
        index[outside, 0], weight[outside, 0], total[outside] = nearest[outside], 1.0, 1.0
        # Taps without weight repeat one with weight: a NaN beyond the pixel's reach must not enter as 0 * NaN.
        first = np.take_along_axis(index, (weight > 0).argmax(axis=1)[:, None], axis=1)
        return Taps(np.where(weight > 0, index, first).astype(np.int64), weight / total, nearest)

    def reach(self, start: int, count: int) -> tuple[int, int]:
        """The input pixels that some output pixels are made of: the first, and one past the last."""
        first, last = self.taps(start, 1), self.taps(start + count - 1, 1)
        return int(first.index.min()), int(last.index.max()) + 1

    def _area(self, out: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        low = out * self.scale + self.offset
        low, high = np.clip(low, 0, self.size), np.clip(low + self.scale, 0, self.size)
        steps = np.arange(int(np.ceil(self.scale - _EXACT)) + 1)
        index = np.floor(low + _EXACT)[:, None] + steps
        weight = np.minimum(index + 1, high[:, None]) - np.maximum(index, low[:, None])
        return np.clip(index, 0, self.size - 1), np.clip(weight, 0.0, None)

    def _triangle(self, centre: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        steps = np.arange(int(np.ceil(2 * self.scale)) + 1)
        index = np.floor(centre - self.scale + 0.5)[:, None] + steps
        weight = np.clip(1 - np.abs(index + 0.5 - centre[:, None]) / self.scale, 0.0, None)
        weight[(index < 0) | (index >= self.size)] = 0.0
        return np.clip(index, 0, self.size - 1), weight

    def _bilinear(self, centre: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        place = np.clip(centre - 0.5, 0, self.size - 1)
        index = np.floor(place)
        weight = np.stack([1 - (place - index), place - index], axis=1)
        return np.clip(index[:, None] + np.arange(2), 0, self.size - 1), weight


def sum_type(dtype: np.dtype[Any]) -> np.dtype[np.floating[Any]]:
    """What sums of `dtype` are kept in: float32 where it holds every value, else float64."""
    small = dtype.itemsize <= 2 or dtype == np.float32
    return np.dtype(np.float32 if small else np.float64)


def apply_taps(pixels: Pixels, mask: Mask | None, rows: Taps, cols: Taps, averages: tuple[bool, bool]) -> Pixels:
    """Weighted sums over valid pixels, as floats; 0 where there is none.

    Args:
        pixels: (h, w, channels), the input from row 0 and column 0 of the taps on.
        mask: (h, w) validity of the input; None if all of it is valid.
        rows: taps that index `pixels`' rows.
        cols: taps that index `pixels`' columns.
        averages: whether rows and columns average; see `valid_taps`.
    """
    kind = sum_type(pixels.dtype)
    if mask is None:
        return _sum(_sum(pixels, rows, 0, kind), cols, 1, kind)
    clean = np.where(mask[..., None], pixels, np.zeros((), pixels.dtype))  # a NaN counts even with weight 0
    total = _sum(_sum(clean, rows, 0, kind), cols, 1, kind)
    share = _sum(_sum(mask[..., None], rows, 0, kind), cols, 1, kind)
    valid = valid_taps(mask, rows, cols, averages)[..., None] & (share > 0)
    mean: Pixels = np.divide(total, share, out=np.zeros_like(total), where=valid)
    return mean


def valid_taps(mask: Mask, rows: Taps, cols: Taps, averages: tuple[bool, bool]) -> Mask:
    """Validity of the output: along an axis that averages where any tap is valid, else where the nearest pixel is."""
    for axis, (taps, any_tap) in enumerate(zip((rows, cols), averages, strict=True)):
        mask = np.take(mask, taps.index if any_tap else taps.nearest, axis)
        mask = np.any(mask, axis=axis + 1) if any_tap else mask
    return mask


def _sum(values: NDArray[Any], taps: Taps, axis: int, kind: np.dtype[np.floating[Any]]) -> NDArray[Any]:
    shape = (-1, 1, 1) if axis == 0 else (1, -1, 1)
    weight = taps.weight.astype(kind)
    total: NDArray[Any] = np.multiply(np.take(values, taps.index[:, 0], axis), weight[:, 0].reshape(shape), dtype=kind)
    for tap in range(1, taps.index.shape[1]):
        total += np.take(values, taps.index[:, tap], axis) * weight[:, tap].reshape(shape)
    return total
