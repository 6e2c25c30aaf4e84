"""Boxes of a scene as what a detector learns: assigned to the cells of its maps, region by region.

A location is the centre of a cell, in px of the whole scene, so that the assignment does not know of regions: a box
that reaches across a border is learnt, whole, at each of its locations, in whatever region they lie.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gigaxt.errors import DataError
from gigaxt.targets.base import Grid, SceneTarget

NOTHING, IGNORED = -1, -2
"""Classes of locations that no object is learnt at, and of those that count as neither."""
VISIBLE = 0.3
"""Share of an object that must lie in a crop for it to be learnt there; with less it is ignored."""
OUTSIDE_PX = 1.0
"""How far a box may reach beyond its image: rounding."""


class Lattice(NamedTuple):
    """Where a detector answers, and for which boxes."""

    strides: tuple[int, ...]
    """px per cell of its maps, fine to coarse."""
    max_cells: float
    """A box belongs to the finest map on which its longer side is at most so many cells; to the coarsest, if to none.
    """
    radius: float
    """Cells around a box's centre, along each axis, within which locations in the box answer for it."""

    def levels(self, boxes_xyxy: NDArray[np.float64]) -> NDArray[np.int64]:
        """The number of the map that each box belongs to: (n,)."""
        side = (boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]).max(axis=1, initial=0)
        limits = self.max_cells * np.asarray(self.strides[:-1], dtype=np.float64)
        return np.asarray(np.searchsorted(limits, side, side="left"), dtype=np.int64)


class BoxTarget(SceneTarget):
    """Boxes of one scene with their classes.

    Args:
        boxes_xyxy: (n, 4) left, top, right, bottom in px of the image, of any size above 0.
        classes: (n,) from 0.
        ignored: (n,) bool: areas where nothing is learnt, such as crowds; their class does not matter. None: none.
        name: of the file that they come from.
        size_px: height and width of the image; None: those of the image that `check` sees first.
        lattice: of the detector that learns them; see `on`.

    Raises:
        DataError: shapes that do not fit, numbers that are not finite, boxes without an area.
    """

    def __init__(
        self,
        boxes_xyxy: Any,
        classes: Any,
        ignored: Any = None,
        *,
        name: str = "boxes",
        size_px: tuple[int, int] | None = None,
        lattice: Lattice | None = None,
    ) -> None:
        self.name, self.size_px, self.lattice = name, size_px, lattice
        self.boxes_xyxy = np.asarray(boxes_xyxy, dtype=np.float64).reshape(-1, 4)
        self.classes = np.asarray(classes, dtype=np.int64)
        self.ignored = np.zeros(len(self.boxes_xyxy), np.bool_) if ignored is None else np.asarray(ignored, np.bool_)
        count = len(self.boxes_xyxy)
        if self.classes.shape != (count,) or self.ignored.shape != (count,):
            raise DataError(
                f"{name}: expected a class for each of {count} boxes, got {self.classes.shape} and {self.ignored.shape}"
            )
        x0, y0, x1, y1 = self.boxes_xyxy.T
        wrong = ~(np.isfinite(self.boxes_xyxy).all(axis=1) & (x1 > x0) & (y1 > y0))
        if wrong.any():
            box = self.boxes_xyxy[wrong][0].tolist()
            raise DataError(f"{name}: expected boxes (left, top, right, bottom) with an area above 0, got {box}")
        # Largest first, equal ones as given: so of several boxes at one location the smallest is painted last.
        order = np.argsort(-(x1 - x0) * (y1 - y0), kind="stable")
        self._learnt, self._left_out = order[~self.ignored[order]], np.flatnonzero(self.ignored)

    def on(self, lattice: Lattice) -> BoxTarget:
        """The same boxes for the maps of a detector."""
        return self._with(self.boxes_xyxy, lattice=lattice)

    def check(self, image: Grid) -> None:
        """Boxes lie in their image."""
        size = (image.height, image.width)
        if self.size_px is None:
            self.size_px = size
        if self.size_px != size:
            raise DataError(
                f"{self.name}: boxes of an image of {self.size_px[1]} x {self.size_px[0]} px, "
                f"but {image.name} has {image.width} x {image.height}"
            )
        x0, y0, x1, y1 = self.boxes_xyxy.T
        low, right, bottom = -OUTSIDE_PX, image.width + OUTSIDE_PX, image.height + OUTSIDE_PX
        outside = (x0 < low) | (y0 < low) | (x1 > right) | (y1 > bottom)
        if outside.any():
            raise DataError(
                f"{self.name}: box {self.boxes_xyxy[outside][0].tolist()} (left, top, right, bottom) lies outside of "
                f"{image.name}, {image.width} x {image.height} px; cut boxes at the image's border"
            )

    def draw(self, x: int, y: int, w: int, h: int) -> dict[str, NDArray[Any]]:
        """What is learnt at the locations of one region, those of all maps in turn, row by row.

        Returns:
            classes (cells,) int64: of the box, `NOTHING` or `IGNORED`. distances_ltrb (cells, 4) float32: from the
            location to the box's left, top, right and bottom in px; below 0 where a small box lies beside it.
        """
        assert self.lattice is not None, "see BoxTarget.on"
        levels = self.lattice.levels(self.boxes_xyxy)
        drawn = [self._draw_level(i, levels, x, y, w, h) for i in range(len(self.lattice.strides))]
        classes, distances = (np.concatenate(parts) for parts in zip(*drawn, strict=True))
        return {"classes": classes, "distances_ltrb": distances}

    def _draw_level(
        self, level: int, levels: NDArray[np.int64], x: int, y: int, w: int, h: int
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        assert self.lattice is not None
        stride, radius = self.lattice.strides[level], self.lattice.radius
        top, left, rows, cols = y // stride, x // stride, h // stride, w // stride
        learnt = self._learnt[levels[self._learnt] == level]
        first, last = answering_cells(self.boxes_xyxy[learnt], stride, radius)
        owner = np.full((rows, cols), NOTHING, dtype=np.int64)
        _paint(owner, learnt, first - (left, top), last - (left, top))
        # Locations in an ignored box, unless an object is learnt there.
        covered = np.full((rows, cols), NOTHING, dtype=np.int64)
        boxes = self.boxes_xyxy[self._left_out]
        inner = np.ceil(boxes[:, :2] / stride - 0.5), np.floor(boxes[:, 2:] / stride - 0.5)
        _paint(covered, self._left_out, *(cells.astype(np.int64) - (left, top) for cells in inner))
        found = owner >= 0
        classes = np.where(covered >= 0, IGNORED, NOTHING)
        classes[found] = self.classes[owner[found]]
        location_x = (left + np.arange(cols) + 0.5) * stride
        location_y = (top + np.arange(rows) + 0.5) * stride
        location = np.stack(np.meshgrid(location_x, location_y), axis=-1)  # (rows, cols, 2) as (x, y)
        distances = np.zeros((rows, cols, 4), dtype=np.float32)
        distances[found, :2] = location[found] - self.boxes_xyxy[owner[found], :2]
        distances[found, 2:] = self.boxes_xyxy[owner[found], 2:] - location[found]
        return classes.ravel(), distances.reshape(-1, 4)

    def objects_at(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """The centres of boxes that are learnt, each as likely."""
        boxes = self.boxes_xyxy[~self.ignored]
        return (boxes[:, 1::-1] + boxes[:, 3:1:-1]) / 2, np.ones(len(boxes))

    def turned(self, k: int) -> BoxTarget:
        """See `SceneTarget.turned`."""
        height, width = self.size
        x0, y0, x1, y1 = self.boxes_xyxy.T
        if k & 4:
            x0, y0, x1, y1, height, width = y0, x0, y1, x1, width, height
        if k & 2:
            y0, y1 = height - y1, height - y0
        if k & 1:
            x0, x1 = width - x1, width - x0
        return self._with(np.stack([x0, y0, x1, y1], axis=1), size_px=(height, width))

    def cropped(self, x: int, y: int, width: int, height: int) -> BoxTarget:
        """See `SceneTarget.cropped`; boxes are cut, those of which too little is left are ignored."""
        cut, share = self._cut(x, y, width, height), self.share_in(x, y, width, height)
        kept = share > 0
        return BoxTarget(
            cut[kept],
            self.classes[kept],
            (self.ignored | (share < VISIBLE))[kept],
            name=self.name,
            size_px=(height, width),
            lattice=self.lattice,
        )

    def share_in(self, x: int, y: int, width: int, height: int) -> NDArray[np.float64]:
        """How much of each box lies in a window of the image, 0 to 1: (n,)."""
        cut, whole = self._cut(x, y, width, height), self.boxes_xyxy
        return np.asarray(np.prod(cut[:, 2:] - cut[:, :2], axis=1) / np.prod(whole[:, 2:] - whole[:, :2], axis=1))

    def _cut(self, x: int, y: int, width: int, height: int) -> NDArray[np.float64]:
        return np.asarray(np.clip(self.boxes_xyxy - [x, y, x, y], 0, [width, height, width, height]))

    def resampled(self, scale_x: float, scale_y: float) -> BoxTarget:
        """See `SceneTarget.resampled`."""
        # As `gigaxt.image.views.resample` does, which rounds the size and not the scale.
        height, width = (max(1, round(side / scale)) for side, scale in zip(self.size, (scale_y, scale_x), strict=True))
        return self._with(self.boxes_xyxy / [scale_x, scale_y, scale_x, scale_y], size_px=(height, width))

    def resized(self, width: int, height: int) -> BoxTarget:
        """See `SceneTarget.resized`."""
        scale_y, scale_x = height / self.size[0], width / self.size[1]
        return self._with(self.boxes_xyxy * [scale_x, scale_y, scale_x, scale_y], size_px=(height, width))

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the image, px."""
        if self.size_px is None:
            raise DataError(f"{self.name}: the size of the image is not known: give `size_px`")
        return self.size_px

    def _with(self, boxes_xyxy: NDArray[np.float64], **changed: Any) -> BoxTarget:
        kept = {"name": self.name, "size_px": self.size_px, "lattice": self.lattice}
        return BoxTarget(boxes_xyxy, self.classes, self.ignored, **(kept | changed))


def as_boxes(target: Any, classes: int) -> BoxTarget:
    """Boxes from a BoxTarget, or from a mapping as torchvision's detectors take it.

    Args:
        target: `boxes` (n, 4) left, top, right, bottom in px, `labels` (n,) from 0, and `ignored` (n,) if wanted.
        classes: how many there are.

    Raises:
        DataError: something else, or a class out of range.
    """
    if isinstance(target, Mapping) and {"boxes", "labels"} <= target.keys():
        boxes, labels, ignored = (as_array(target.get(key)) for key in ("boxes", "labels", "ignored"))
        target = BoxTarget(boxes, labels, ignored)
    if not isinstance(target, BoxTarget):
        raise DataError(f"expected a BoxTarget, or a mapping with `boxes` and `labels`, got {type(target).__name__}")
    learnt = target.classes[~target.ignored]
    wrong = learnt[(learnt < 0) | (learnt >= classes)]
    if len(wrong):
        raise DataError(f"{target.name}: class {wrong[0]} is out of range 0..{classes - 1}")
    return target


def as_array(part: Any) -> Any:
    """A tensor as an array; other things as they are."""
    return part.detach().cpu().numpy() if hasattr(part, "detach") else part


def answering_cells(
    boxes_xyxy: NDArray[np.float64], stride: int, radius: float
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The cells that answer for boxes: first and last (n, 2) as (col, row).

    Those whose location lies in the box and within `radius` cells of its centre, along each axis; and always the cell
    that holds the centre, since the locations may all lie beside a small box.
    """
    centre = (boxes_xyxy[:, :2] + boxes_xyxy[:, 2:]) / 2
    own = np.floor(centre / stride)
    first = np.ceil(np.maximum(centre - radius * stride, boxes_xyxy[:, :2]) / stride - 0.5)
    last = np.floor(np.minimum(centre + radius * stride, boxes_xyxy[:, 2:]) / stride - 0.5)
    return np.minimum(first, own).astype(np.int64), np.maximum(last, own).astype(np.int64)


def _paint(
    canvas: NDArray[np.int64], values: NDArray[np.int64], first: NDArray[np.int64], last: NDArray[np.int64]
) -> None:
    """Write each value over its cells from `first` to `last` (n, 2) as (col, row), the later over the earlier."""
    rows, cols = canvas.shape
    seen = ((last >= 0) & (first < (cols, rows)) & (first <= last)).all(axis=1)
    first, last = np.maximum(first, 0), last + 1
    for value, (col, row), (col_end, row_end) in zip(values[seen], first[seen], last[seen], strict=True):
        canvas[row:row_end, col:col_end] = value
