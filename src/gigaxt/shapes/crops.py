"""Masks of single objects, each cut to a window that holds it: moved, painted, outlined."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from contourpy import FillType, contour_generator
from numpy.typing import NDArray
from torch.nn import functional as F

COVERED = 0.5
"""Chance from which on a pixel belongs to an object."""


class Crop(NamedTuple):
    """The mask of one object; nothing of it lies outside of the window."""

    x: int
    """Left edge of the window, px of the image; may be below 0, as the window may reach beyond it."""
    y: int
    """Top edge."""
    pixels: NDArray[np.bool_]
    """(h, w), which pixels are the object's."""

    def transposed(self) -> Crop:
        """In the image with rows and columns swapped."""
        return Crop(self.y, self.x, self.pixels.T)

    def mirrored(self, width: int) -> Crop:
        """In the image of so many px, left and right swapped."""
        return Crop(width - self.x - self.pixels.shape[1], self.y, self.pixels[:, ::-1])

    def cut(self, x: int, y: int, width: int, height: int) -> Crop:
        """In a window of the image."""
        left, top = max(self.x, x), max(self.y, y)
        right, bottom = min(self.x + self.pixels.shape[1], x + width), min(self.y + self.pixels.shape[0], y + height)
        inside = self.pixels[top - self.y : max(bottom, top) - self.y, left - self.x : max(right, left) - self.x]
        return Crop(left - x, top - y, inside)

    def scaled(self, scale_x: float, scale_y: float) -> Crop:
        """In the image at pixels `scale_x` times as wide and `scale_y` times as high; the nearest pixel decides."""
        x, cols = _nearest(self.x, self.pixels.shape[1], scale_x)
        y, rows = _nearest(self.y, self.pixels.shape[0], scale_y)
        return Crop(x, y, np.pad(self.pixels, 1)[rows + 1][:, cols + 1])


def painted(chances: NDArray[np.float32], box_xyxy: Sequence[float], height: int, width: int) -> Crop:
    """The pixels of an image that belong to an object.

    Args:
        chances: (side, side), that the cells of the object's box are covered; between their centres it is linear.
        box_xyxy: left, top, right, bottom in px.
        height: of the image.
        width: of the image.
    """
    left, top, right, bottom = box_xyxy
    x0, x1 = max(int(np.floor(left)), 0), min(int(np.ceil(right)), width)
    y0, y1 = max(int(np.floor(top)), 0), min(int(np.ceil(bottom)), height)
    if x1 <= x0 or y1 <= y0:
        return Crop(x0, y0, np.zeros((0, 0), np.bool_))
    x = (torch.arange(x0, x1) + 0.5 - left) / (right - left) * 2 - 1  # -1 and 1: the sides of the box
    y = (torch.arange(y0, y1) + 0.5 - top) / (bottom - top) * 2 - 1
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).float()  # (h, w, 2) as (x, y)
    known = torch.from_numpy(np.ascontiguousarray(chances, dtype=np.float32))
    found = F.grid_sample(known[None, None], grid[None], align_corners=False, padding_mode="zeros")
    return Crop(x0, y0, (found[0, 0] >= COVERED).numpy())


def outlines(chances: NDArray[np.float32], box_xyxy: Sequence[float]) -> list[list[NDArray[np.float64]]]:
    """The same object as polygons in px, each a list of closed rings (n, 2) of (x, y): outline first, then holes."""
    left, top, right, bottom = box_xyxy
    side = chances.shape[0]
    centres = (np.arange(-1, side + 1) + 0.5) / side
    lines = contour_generator(
        left + centres * (right - left),
        top + centres * (bottom - top),
        np.pad(chances.astype(np.float64), 1),
        fill_type=FillType.OuterOffset,
    )
    found: Any = lines.filled(COVERED, 2.0)  # above any chance; its type says what any fill type may give
    return [[ring[a:b] for a, b in pairwise(starts)] for ring, starts in zip(*found, strict=True)]


def _nearest(start: int, length: int, scale: float) -> tuple[int, NDArray[np.int64]]:
    """First new pixel, and for each the old one at its centre, from 0; -1 and `length` where there is none."""
    first, last = int(np.floor(start / scale)), int(np.ceil((start + length) / scale))
    old = np.floor((np.arange(first, max(last, first)) + 0.5) * scale).astype(np.int64) - start
    return first, np.clip(old, -1, length)
