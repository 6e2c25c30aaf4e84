"""An in-memory pyramid that remembers what was read, for tests of what lies above `image/`."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gigaxt.image.base import Image, Level, Mask, Pixels


class ArrayImage(Image):
    """Levels given as arrays (h, w) or (h, w, c), the first of full size; `masks`: one a level, or none."""

    def __init__(self, *levels: ArrayLike, masks: tuple[NDArray[np.bool_], ...] = (), nodata: float | None = None):
        self.arrays = [np.atleast_3d(np.asarray(level)) for level in levels]
        self.masks = masks
        self.name, self.nodata = "array", nodata
        self.height, self.width, self.channels = self.arrays[0].shape
        self.dtype = self.arrays[0].dtype
        self.levels = tuple(
            Level(a.shape[1], a.shape[0], self.width / a.shape[1], self.height / a.shape[0]) for a in self.arrays
        )
        self.band_names = tuple(str(n + 1) for n in range(self.channels))
        self.windows: list[tuple[int, int, int, int, int]] = []

    @property
    def all_valid(self) -> bool:
        return self.nodata is None and not self.masks

    def _read_inside(self, x: int, y: int, w: int, h: int, level: int) -> Pixels:
        self.windows.append((x, y, w, h, level))
        return self.arrays[level][y : y + h, x : x + w].copy()

    def _valid_inside(self, x: int, y: int, w: int, h: int, level: int) -> Mask | None:
        return self.masks[level][y : y + h, x : x + w].copy() if self.masks else None

    def times_read(self, level: int = 0) -> NDArray[np.int64]:
        """How often each pixel of a level was read: (h, w)."""
        count = np.zeros(self.arrays[level].shape[:2], dtype=np.int64)
        for x, y, w, h, _ in (window for window in self.windows if window[4] == level):
            count[y : y + h, x : x + w] += 1
        return count
