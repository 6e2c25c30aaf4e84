"""Windows: the places of a scene that are decoded, and how much each counts where they overlap."""

from __future__ import annotations

import math
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from gigaxt.errors import ConfigError
from gigaxt.image.base import Mask
from gigaxt.regions import RegionGrid

Weights = NDArray[np.float64]


class WindowGrid:
    """The lattice of windows, each as large as a region's core, whose answers are blended into the scene's.

    Without overlap these are the cores of the region grid. With it the next window begins `core - overlap` px further,
    so that what one window sees at its border another one sees inside; windows begin at whole tokens of the region
    grid, whose context they take. A window is needed where it covers part of a region that is kept.

    Args:
        grid: the region grid.
        tokens_per_core: t, tokens along a side of a core.
        overlap: px that neighbouring windows share: a multiple of what a token covers, less than the core.

    Attributes:
        core: side of a window, px.
        step: from one window to the next, px.
        xs: left edges of the columns of windows, px; ascending.
        ys: top edges of the rows of windows, px.

    Raises:
        ConfigError: an overlap out of range, with the nearest right value.
    """

    def __init__(self, grid: RegionGrid, tokens_per_core: int, overlap: int = 0) -> None:
        self.grid, self.core, self.t = grid, grid.core, tokens_per_core
        check_overlap(overlap, grid.core, tokens_per_core)
        self.step = grid.core - overlap
        self.xs, self.ys = (window_starts(size, self.core, self.step) for size in (grid.width, grid.height))

    @cached_property
    def kept(self) -> Mask:
        """(rows, cols) of the region grid: the regions that are encoded at full size."""
        kept = np.zeros((self.grid.rows, self.grid.cols), np.bool_)
        for row, col, level in self.grid.places:
            if level == 0:
                kept[row, col] = True
        return kept

    @cached_property
    def needed(self) -> Mask:
        """(rows, cols) of windows: those that cover part of a kept region."""
        sums = np.pad(self.kept.cumsum(0).cumsum(1), ((1, 0), (1, 0)))  # of all regions above and to the left
        top, left = self.ys // self.core, self.xs // self.core
        bottom = -(-np.minimum(self.ys + self.core, self.grid.height) // self.core)
        right = -(-np.minimum(self.xs + self.core, self.grid.width) // self.core)
        inside = sums[bottom][:, right] - sums[top][:, right] - sums[bottom][:, left] + sums[top][:, left]
        needed: Mask = inside > 0
        return needed

    def kept_pixels(self, x: int, y: int, w: int, h: int) -> Mask:
        """(h, w): which pixels of a part of the image lie in regions that are kept."""
        rows, cols = np.arange(y, y + h) // self.core, np.arange(x, x + w) // self.core
        return self.kept.take(rows, axis=0).take(cols, axis=1)  # a fifth of the time of indexing by both at once

    def token_rows(self, row: int, halo_tokens: int = 0) -> NDArray[np.int64]:
        """Where the context of a row of windows and their halos is found, or -1; see `RegionGrid.token_numbers`.

        Args:
            row: of windows.
            halo_tokens: k, tokens along the halo.

        Returns:
            (cols, side, side), side = t + 2 * k.
        """
        along = np.arange(self.t + 2 * halo_tokens) - halo_tokens
        down = self.ys[row] * self.t // self.core + along  # (side,)
        across = self.xs[:, None] * self.t // self.core + along  # (cols, side)
        return self.grid.token_numbers(self.t, down[None, :, None], across[:, None, :])

    def rows_reaching(self, row: int) -> range:
        """The rows of windows that cover pixels from the top edge of `row` up to that of the next."""
        return range(int(np.searchsorted(self.ys, self.ys[row] - self.core, side="right")), row + 1)

    def axis_weights(self, stride: int = 1) -> tuple[Weights, Weights]:
        """What the windows count along each axis, (rows, n) and (cols, n), in cells of `stride` px, n = core / stride.

        The weight of a window's cell is the product of the two. Over all windows that cover a cell inside the image
        they add up to one.
        """
        size = self.core // stride
        overlap = (self.core - self.step) // stride
        rows, cols = (
            blend_weights(starts // stride, size, overlap, -(-length // stride))
            for starts, length in ((self.ys, self.grid.height), (self.xs, self.grid.width))
        )
        return rows, cols


def usual_overlap(core: int, tokens_per_core: int, halo: int) -> int:
    """A quarter of a window, in whole tokens, px; none where a model looks beyond its windows anyway."""
    unit = token_px(core, tokens_per_core)
    return 0 if halo else core // 4 // unit * unit


def token_px(core: int, tokens_per_core: int) -> int:
    """The least px that are whole tokens: what one covers, where that is a whole number."""
    return core // math.gcd(core, tokens_per_core)


def check_overlap(overlap: int, core: int, tokens_per_core: int) -> None:
    """Refuse an overlap that is no multiple of what a token covers, negative, or as large as a core.

    Raises:
        ConfigError: with the nearest right value.
    """
    unit = token_px(core, tokens_per_core)
    if overlap < 0 or overlap >= core or overlap % unit:
        near = min(max(0, round(overlap / unit) * unit), core - unit)
        what = f"a multiple of {unit} px, which are whole tokens of the model, from 0 to {core - unit}"
        raise ConfigError(f"overlap: expected {what}, got {overlap}; the nearest is {near}")


def window_starts(size: int, core: int, step: int) -> NDArray[np.int64]:
    """Where windows of `core` px begin that are `step` px apart and cover `size` px; the last may reach beyond."""
    count = 1 + max(0, -(-(size - core) // step))
    return np.arange(count, dtype=np.int64) * step


def blend_weights(starts: NDArray[np.int64], core: int, overlap: int, size: int) -> Weights:
    """How much each window counts at its pixels, (windows, core), such that at each of `size` pixels the sum is one.

    From nothing at its border a window's say rises as the square of a sine over the overlap, so that of two windows
    that share no more than their halves the one's rise is the other's fall. The first and the last window keep their
    say up to the border of the image.
    """
    rise = np.sin(np.pi / 2 * (np.arange(overlap) + 0.5) / max(overlap, 1)) ** 2
    shape = np.ones(core)
    shape[:overlap] *= rise
    shape[core - overlap :] *= rise[::-1]
    total = np.zeros(max(size, int(starts[-1]) + core))
    for start in starts:
        total[start : start + core] += shape
    return np.stack([shape / total[start : start + core] for start in starts])
