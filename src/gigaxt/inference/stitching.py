"""Stitching: the maps of overlapping windows become one map of the scene, block by block."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from gigaxt.image.base import Mask
from gigaxt.inference.scene_pass import WindowMaps
from gigaxt.inference.windows import WindowGrid


class Block(NamedTuple):
    """A part of the scene's map that is complete."""

    row: int
    """Which row of windows it belongs to: its pixels lie between the top edges of this row and the next."""
    x: int
    y: int
    """Its place in px of the image."""
    maps: Tensor | None
    """(channels, h, w) in cells of `stride` px; None where no region is kept."""
    valid: Mask
    """(h, w) in px: the image has data, and the region is kept."""


class Stitcher:
    """Adds up the weighted maps of windows that come row by row, and yields what is complete.

    Held are the rows of cells that the next row of windows will add to, `core - step` px of them as wide as the scene,
    and one window; nothing but the latter without overlap.

    Args:
        windows: the lattice.
        channels: of the maps.
        stride: px a cell of the maps.
        dtype: to add up in.
    """

    def __init__(self, windows: WindowGrid, channels: int, *, stride: int = 1, dtype: torch.dtype = torch.float32):
        self.windows, self.stride = windows, stride
        self.side, self.step = windows.core // stride, windows.step // stride
        self.width, self.height = -(-windows.grid.width // stride), -(-windows.grid.height // stride)
        self.row_weights, self.col_weights = (
            torch.from_numpy(weights).to(dtype) for weights in windows.axis_weights(stride)
        )
        columns = (len(windows.xs) - 1) * self.step + self.side
        self.below = torch.zeros(channels, self.side - self.step, columns, dtype=dtype)

    def blocks(self, rows: Sequence[int], answers: Iterator[WindowMaps]) -> Iterator[Block]:
        """Complete blocks, row by row, each row's from left to right.

        Args:
            rows: of windows, ascending. A row is complete if all `WindowGrid.rows_reaching` it are among them.
            answers: of the needed windows of these rows, in their order.
        """
        for row in rows:  # where some are left out, what waits in `below` lies above the next row that is complete
            yield from self._row(row, answers)

    def _row(self, row: int, answers: Iterator[WindowMaps]) -> Iterator[Block]:
        side, step, shared = self.side, self.step, self.side - self.step
        left = self.below.new_zeros(len(self.below), side, shared)  # what the windows before add to the next one's
        for col, needed in enumerate(self.windows.needed[row]):
            found = next(answers) if needed else None
            if found is None:
                window = self.below.new_zeros(len(self.below), side, side)
            else:
                assert (found.row, found.col) == (row, col)
                window = found.maps * (self.row_weights[row][:, None] * self.col_weights[col])
            window[:, :, :shared] += left
            x, last = col * step, col + 1 == len(self.windows.xs)
            # Of the rows above, but for those columns where `left` has them.
            start = 0 if col == 0 else shared
            window[:, :shared, start:] += self.below[:, :, x + start : x + side]
            yield self._block(row, col, found, window)
            done = side if last else step
            self.below[:, :, x : x + done] = window[:, step:, :done]
            left = window[:, :, step:]

    def _block(self, row: int, col: int, found: WindowMaps | None, window: Tensor) -> Block:
        windows, grid = self.windows, self.windows.grid
        x, y = int(windows.xs[col]), int(windows.ys[row])
        w = grid.width - x if col + 1 == len(windows.xs) else min(windows.step, grid.width - x)
        h = grid.height - y if row + 1 == len(windows.ys) else min(windows.step, grid.height - y)
        if found is None:
            return Block(row, x, y, None, np.zeros((h, w), np.bool_))
        valid = found.valid[:h, :w] & windows.kept_pixels(x, y, w, h)
        rows, cols = -(-h // self.stride), -(-w // self.stride)
        return Block(row, x, y, window[:, :rows, :cols], valid)
