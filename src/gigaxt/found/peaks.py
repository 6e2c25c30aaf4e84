"""Peaks of a heat map that comes region by region, each once, in px of the whole scene.

A peak is a cell that none of its eight neighbours exceeds, also across the borders of regions. Of each region only the
cells along its border are kept, and what is said at its peaks: a scene of 29,000 x 25,000 px in regions of 512 px needs
12 MiB for the borders at stride 2.
"""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial import KDTree
from torch import Tensor
from torch.nn import functional as F

ROOM = 4
"""Candidates that are held, as a multiple of the objects that are wanted."""


class PeakFinder:
    """Gathers the peaks of one scene's heat map.

    Args:
        stride: px per cell.
        side: cells along the side of a region.
        score: least chance of a peak, 0 to 1.
        max_objects: the best so many are kept.
    """

    def __init__(self, *, stride: int, side: int, score: float, max_objects: int) -> None:
        self.stride, self.side, self.max_objects = stride, side, max_objects
        self.least = math.log(score) - math.log1p(-score) if 0 < score < 1 else math.inf * (2 * score - 1)
        self._borders: dict[tuple[int, int], tuple[NDArray[np.float32], ...]] = {}
        self._cells = np.zeros((0, 2), np.int64)
        self._values = np.zeros((0, 0))

    def add(self, x: int, y: int, answers: Tensor, valid: NDArray[np.bool_]) -> None:
        """Add a region.

        Args:
            x: left edge, px.
            y: top edge, px.
            answers: (channels, h, w), the first the logit of a peak; cut at the image's border.
            valid: (height, width) of its pixels; there are no peaks in cells without a valid one.
        """
        heat = answers[0].float()
        if not valid.all():
            real = F.max_pool2d(torch.from_numpy(valid).float()[None], self.stride, ceil_mode=True)[0] > 0
            heat = heat.masked_fill(~real.to(heat.device), -math.inf)
        highest = F.max_pool2d(heat[None], 3, stride=1, padding=1)[0]
        peaks = ((heat == highest) & (heat >= self.least) & (heat > -math.inf)).nonzero()  # (m, 2)
        if len(peaks) > self.max_objects:
            best = heat[peaks[:, 0], peaks[:, 1]].topk(self.max_objects).indices
            peaks = peaks[best]
        values = answers[:, peaks[:, 0], peaks[:, 1]].T.double().cpu().numpy()  # (channels, m) -> (m, channels)
        corner = np.array([y, x]) // self.stride
        known = heat.cpu().numpy()
        row, col = corner // self.side
        # Copies: a part of the map would keep all of the region's answers.
        lines = (known[0].copy(), known[-1].copy(), known[:, 0].copy(), known[:, -1].copy())
        self._borders[int(row), int(col)] = lines
        self._keep(peaks.cpu().numpy() + corner, values)

    def finish(self) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """All peaks, best first; equal ones row by row.

        Returns:
            cells (n, 2) as (row, col) of the whole map, values (n, channels) of `answers` there.
        """
        inner = self._cells % self.side
        edge = np.flatnonzero(((inner == 0) | (inner == self.side - 1)).any(axis=1))
        exceeded = [i for i in edge if self._exceeded(self._cells[i], float(np.float32(self._values[i, 0])))]
        cells, values = np.delete(self._cells, exceeded, axis=0), np.delete(self._values, exceeded, axis=0)
        order = np.lexsort((cells[:, 1], cells[:, 0], -values[:, 0] if len(values) else cells[:, 0]))
        return cells[order][: self.max_objects], values[order][: self.max_objects]

    def _keep(self, cells: NDArray[np.int64], values: NDArray[np.float64]) -> None:
        self._values = np.concatenate([self._values, values]) if len(self._cells) else values
        self._cells = np.concatenate([self._cells, cells])
        if len(self._cells) > ROOM * self.max_objects:
            best = np.sort(np.argsort(-self._values[:, 0], kind="stable")[: ROOM * self.max_objects // 2])
            self._cells, self._values = self._cells[best], self._values[best]

    def _exceeded(self, cell: NDArray[np.int64], value: float) -> bool:
        """Whether a neighbour in another region is higher."""
        row, col = cell.tolist()
        home = (row // self.side, col // self.side)
        around = ((row + i, col + j) for i, j in product((-1, 0, 1), repeat=2))
        others = ((r, c) for r, c in around if (r // self.side, c // self.side) != home)
        return any(self._at(r, c) > value for r, c in others)

    def _at(self, row: int, col: int) -> float:
        border = self._borders.get((row // self.side, col // self.side))
        if border is None:
            return -math.inf
        top, bottom, left, right = border
        row, col = row % self.side, col % self.side
        if row in (0, self.side - 1):
            line, at = (bottom if row else top), col
        else:
            line, at = (right if col else left), row
        return float(line[at]) if at < len(line) else -math.inf


def apart(places: NDArray[np.float64], distance: float) -> NDArray[np.int64]:
    """Which of places (n, 2), best first, have no better one within `distance`: indices, rising."""
    stays = np.ones(len(places), np.bool_)
    if len(places) > 1:
        pairs = np.sort(KDTree(places).query_pairs(distance, output_type="ndarray"), axis=1)
        for better, worse in pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))].tolist():
            if stays[better]:
                stays[worse] = False
    return np.flatnonzero(stays)
