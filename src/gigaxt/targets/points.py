"""Points of a scene as what a detector learns: Gaussians and what is known of each object, drawn region by region.

All is computed from places in px of the whole scene, so that it does not know of regions or windows: the Gaussian of an
object reaches across every border, also into a window that the object itself lies outside of.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gigaxt.errors import DataError
from gigaxt.targets.base import Grid, SceneTarget
from gigaxt.targets.boxes import as_array

NOTHING, IGNORED, UNKNOWN = -1, -2, -3
"""Classes of cells without an object, of those that count as neither, and of an object whose class is not known."""
REACH = 4.0
"""Standard deviations at which a Gaussian, 0.0003 there, is cut off."""
IGNORED_REACH = 2.0
"""Standard deviations around an ignored object within which nothing is learnt."""


class PointLattice(NamedTuple):
    """Where a detector of points answers."""

    stride: int
    """px per cell of its map."""
    sigma_px: float
    """Standard deviation of the Gaussians."""


class PointTarget(SceneTarget):
    """Points of one scene with their classes and attributes.

    Args:
        places: (n, 2) as (row, col), px from the upper left corner: the first pixel's centre is at (0.5, 0.5).
        classes: (n,) from 0; `UNKNOWN` where the class is not known. None: all 0.
        attributes: (n, k), NaN where not known. None: k = 0.
        ignored: (n,) bool: objects that count neither as such nor as background. None: none.
        weights: (n,) how often windows are drawn around each; None: equally often.
        name: of the file that they come from.
        size_px: height and width of the image; None: those of the image that `check` sees first, in which all must lie.
        lattice: of the detector that learns them; see `on`.

    Raises:
        DataError: shapes that do not fit, or places that are not finite.
    """

    def __init__(
        self,
        places: Any,
        classes: Any = None,
        attributes: Any = None,
        ignored: Any = None,
        *,
        weights: Any = None,
        name: str = "points",
        size_px: tuple[int, int] | None = None,
        lattice: PointLattice | None = None,
    ) -> None:
        self.name, self.size_px, self.lattice = name, size_px, lattice
        self.places = np.asarray(places, dtype=np.float64).reshape(-1, 2)
        n = len(self.places)
        self.classes = np.zeros(n, np.int64) if classes is None else np.asarray(classes, dtype=np.int64)
        self.attributes = np.zeros((n, 0)) if attributes is None else np.asarray(attributes, dtype=np.float64)
        self.ignored = np.zeros(n, np.bool_) if ignored is None else np.asarray(ignored, dtype=np.bool_)
        self.weights = np.ones(n) if weights is None else np.asarray(weights, dtype=np.float64)
        if self.classes.shape != (n,) or self.ignored.shape != (n,) or self.attributes.shape[:1] != (n,):
            raise DataError(
                f"{name}: expected a class and attributes for each of {n} points, got {self.classes.shape}, "
                f"{self.attributes.shape} and {self.ignored.shape}"
            )
        broken = np.flatnonzero(~np.isfinite(self.places).all(axis=1))
        if len(broken):
            raise DataError(f"{name}: expected finite places, got {self.places[broken[0]].tolist()} (row, col)")

    def __len__(self) -> int:
        return len(self.places)

    def on(self, lattice: PointLattice) -> PointTarget:
        """The same points for the map of a detector."""
        return self._with(self.places, lattice=lattice)

    def check(self, image: Grid) -> None:
        """Points lie in their image."""
        size = (image.height, image.width)
        if self.size_px is None:
            outside = np.flatnonzero(((self.places < 0) | (self.places > size)).any(axis=1))
            if len(outside):
                row, col = self.places[outside[0]]
                raise DataError(
                    f"{self.name}: {len(outside)} of {len(self)} points lie outside of {image.name}, {image.width} x "
                    f"{image.height} px, the first at row {row:.6g}, column {col:.6g} in px from the corner"
                )
            self.size_px = size
        if self.size_px != size:
            raise DataError(
                f"{self.name}: points of an image of {self.size_px[1]} x {self.size_px[0]} px, "
                f"but {image.name} has {image.width} x {image.height}"
            )

    def draw(self, x: int, y: int, w: int, h: int) -> dict[str, NDArray[Any]]:
        """What is learnt at the cells (rows, cols) of one region.

        Returns:
            heat (rows, cols) float32: the largest of the objects' Gaussians at the cell's centre, 1 in the cell that
            holds an object. classes (rows, cols) int64: of the object in the cell, `UNKNOWN`, `NOTHING` or `IGNORED`.
            attributes (k, rows, cols) float32: NaN where not known. offsets (2, rows, cols) float32: from the cell's
            centre to the object as (row, col), in cells, from -0.5 to 0.5.
        """
        assert self.lattice is not None, "see PointTarget.on"
        stride, sigma = self.lattice
        rows, cols = h // stride, w // stride
        corner = np.array([y, x])
        margin = REACH * sigma + stride
        half = np.array([h, w]) / 2
        near = (np.abs(self.places - corner - half) < half + margin).all(axis=1)
        at = (self.places[near] - corner) / stride  # in cells of the region
        ignored = self.ignored[near]
        own = np.floor(at)
        own -= (self.places[near] == (self.size_px or (-1, -1))) & (own == at)  # on the last edge: of the last cell
        own = own.astype(np.int64)

        heat = np.zeros((rows, cols), np.float32)
        _paint(heat, at[~ignored], own[~ignored], sigma / stride, REACH)
        close = np.zeros((rows, cols), np.float32)
        _paint(close, at[ignored], own[ignored], sigma / stride, IGNORED_REACH)
        classes = np.where(close > 0, IGNORED, NOTHING)
        attributes = np.full((self.attributes.shape[1], rows, cols), np.nan, np.float32)
        offsets = np.zeros((2, rows, cols), np.float32)

        # Of several objects in one cell the first stays: it is written last.
        here = np.flatnonzero(~ignored & ((own >= 0) & (own < (rows, cols))).all(axis=1))[::-1]
        row, col = own[here].T
        heat[row, col] = 1
        classes[row, col] = self.classes[near][here]
        attributes[:, row, col] = self.attributes[near][here].T
        offsets[:, row, col] = (at - own - 0.5)[here].T
        return {"heat": heat, "classes": classes, "attributes": attributes, "offsets": offsets}

    def objects_at(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Objects that lie in the image and are not ignored."""
        kept = self.inside & ~self.ignored
        return self.places[kept], self.weights[kept]

    def turned(self, k: int) -> PointTarget:
        """See `SceneTarget.turned`."""
        (height, width), places = self._size, self.places
        if k & 4:
            places, height, width = places[:, ::-1], width, height
        if k & 2:
            places = places * (-1, 1) + (height, 0)
        if k & 1:
            places = places * (1, -1) + (0, width)
        return self._with(places, size_px=(height, width))

    def cropped(self, x: int, y: int, width: int, height: int) -> PointTarget:
        """See `SceneTarget.cropped`. Points outside of the window stay: their Gaussians may reach into it."""
        return self._with(self.places - (y, x), size_px=(height, width))

    def resampled(self, scale_x: float, scale_y: float) -> PointTarget:
        """See `SceneTarget.resampled`."""
        # As `gigaxt.image.views.resample` does, which rounds the size and not the scale.
        height, width = (
            max(1, round(side / scale)) for side, scale in zip(self._size, (scale_y, scale_x), strict=True)
        )
        return self._with(self.places / (scale_y, scale_x), size_px=(height, width))

    def resized(self, width: int, height: int) -> PointTarget:
        """See `SceneTarget.resized`."""
        scale = np.array([height, width]) / self._size
        return self._with(self.places * scale, size_px=(height, width))

    @property
    def inside(self) -> NDArray[np.bool_]:
        """Which points lie in the image: (n,). Of a window some do not."""
        return np.asarray(((self.places >= 0) & (self.places <= self._size)).all(axis=1))

    @property
    def _size(self) -> tuple[int, int]:
        if self.size_px is None:
            raise DataError(f"{self.name}: the size of the image is not known: give `size_px`")
        return self.size_px

    def _with(self, places: NDArray[np.float64], **changed: Any) -> PointTarget:
        kept: dict[str, Any] = {
            "weights": self.weights,
            "name": self.name,
            "size_px": self.size_px,
            "lattice": self.lattice,
        }
        return PointTarget(places, self.classes, self.attributes, self.ignored, **(kept | changed))


def as_points(target: Any, classes: int, attributes: Sequence[str]) -> PointTarget:
    """Points from a PointTarget, or from a mapping of arrays or tensors.

    Args:
        target: `points` (n, 2) as (row, col) in px from the upper left corner; optional: `labels` (n,) from 0, -3 where
            not known; `ignored` (n,) bool; and each attribute by its name (n,), NaN where not known.
        classes: how many there are.
        attributes: names, in order.

    Raises:
        DataError: something else, a class out of range, or unknown names.
    """
    if isinstance(target, Mapping) and "points" in target:
        unknown = target.keys() - {"points", "labels", "ignored", *attributes}
        if unknown:
            raise DataError(f"points: unknown {sorted(unknown)}; the model's attributes are {list(attributes)}")
        places, labels, ignored = (as_array(target.get(key)) for key in ("points", "labels", "ignored"))
        count = len(np.asarray(places, dtype=np.float64).reshape(-1, 2))
        columns = [
            np.asarray(as_array(target.get(name, np.full(count, np.nan))), dtype=np.float64) for name in attributes
        ]
        target = PointTarget(places, labels, np.stack(columns, axis=1) if columns else None, ignored)
    if not isinstance(target, PointTarget):
        raise DataError(f"expected a PointTarget, or a mapping with `points`, got {type(target).__name__}")
    if target.attributes.shape[1] != len(attributes):
        raise DataError(
            f"{target.name}: expected the attributes {list(attributes)} for each point, got "
            f"{target.attributes.shape[1]} columns"
        )
    wrong = target.classes[(target.classes >= classes) | ((target.classes < 0) & (target.classes != UNKNOWN))]
    if len(wrong):
        raise DataError(f"{target.name}: class {wrong[0]} is out of range 0..{classes - 1}")
    return target


def _paint(
    canvas: NDArray[np.float32], at: NDArray[np.float64], own: NDArray[np.int64], sigma: float, reach: float
) -> None:
    """Raise a canvas to Gaussians around places (n, 2), cut off at `reach` sigmas; all in cells."""
    rows, cols = canvas.shape
    steps = np.arange(-(most := int(np.ceil(reach * sigma + 0.5))), most + 1)
    row, col = own[:, :1] + steps, own[:, 1:] + steps  # (n, k) cells
    along_row, along_col = ((row + 0.5 - at[:, :1]) / sigma) ** 2, ((col + 0.5 - at[:, 1:]) / sigma) ** 2
    square = along_row[:, :, None] + along_col[:, None, :]  # (n, k, k)
    inside = ((row >= 0) & (row < rows))[:, :, None] & ((col >= 0) & (col < cols))[:, None, :] & (square <= reach**2)
    cells = row[:, :, None] * cols + col[:, None, :]
    np.maximum.at(canvas.reshape(-1), cells[inside], np.exp(-square[inside] / 2).astype(np.float32))
