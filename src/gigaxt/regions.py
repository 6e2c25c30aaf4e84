"""Which pixels: the lattice of regions that covers an image, its order, and the regions that hold nothing.

A **region** is the square that the region encoder sees. With a halo, its **core** (`region - 2 * halo` px) is what it
answers for: cores tile the image, halos overlap. Regions at the border reach over it; what lies outside is padded
when read and False in `pixel_validity`.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gigaxt.augment import Edges, below_turns, turn
from gigaxt.config import nearest
from gigaxt.errors import ConfigError, DataError
from gigaxt.image.base import Image, Mask

Order = Literal["raster", "snake", "hilbert"]

STRIDE = 32
"""Px that one token of a region encoder's last map covers; regions and halos are multiples of it."""
READ_BYTES = 128 * 2**20
"""What one read of `keep_valid` may hold, decoded: twice the largest strip that a TIFF may have here."""


class Place(NamedTuple):
    """A region's place on the lattice of its nesting level."""

    row: int
    col: int
    level: int = 0
    """0: full size; k: the image at 1 / `overview[k - 1]`."""


class RegionGrid:
    """The regions of one image, in scan order: those of full size that are kept, then each overview's.

    An overview region is left out where no kept region lies under it; with integer factors each one covers exactly
    `factor` x `factor` regions of full size, so every kept region lies under one region of every overview.

    Args:
        height: px of the image.
        width: px of the image.
        region: px on a side that the encoder sees, a multiple of 32.
        halo: px read around each core and cut off after decoding: a multiple of 32, less than half a region.
        overview: integer downsample factors above 1, ascending, such as (8,) or (8, 64): nesting levels that cover the
            whole image coarsely, as `resample(image, factor)` shows it.
        order: of the regions within each level.
        keep: (rows, cols), True where a region is worth encoding; None keeps all.

    Attributes:
        rows: regions down, `ceil(height / core)`.
        cols: regions across.
        core: px on a side that a region answers for.

    Raises:
        ConfigError: settings out of range, with the nearest right value.
        DataError: `keep` has another shape, or keeps nothing.
    """

    def __init__(
        self,
        height: int,
        width: int,
        region: int,
        *,
        halo: int = 0,
        overview: tuple[int, ...] = (),
        order: Order = "hilbert",
        keep: Mask | None = None,
    ) -> None:
        if height < 1 or width < 1:
            raise DataError(f"expected an image of at least 1 x 1 px, got {width} x {height}")
        self.core = core_px(region, halo)
        if order not in get_args(Order):
            raise ConfigError(f"order: got {order!r}{nearest(str(order), get_args(Order))}")
        if any(int(f) != f or f < 2 for f in overview) or sorted(set(overview)) != list(overview):
            raise ConfigError(f"overview: expected ascending integers from 2, such as (8, 64), got {overview}")
        self.height, self.width, self.region, self.halo = height, width, region, halo
        self.overview, self.order = tuple(overview), order
        self.rows, self.cols = -(-height // self.core), -(-width // self.core)
        self._lattice = self._scan(keep)  # (regions, 3): row, col, level

    def _scan(self, keep: Mask | None) -> NDArray[np.int64]:
        if keep is None:
            keep = np.ones((self.rows, self.cols), dtype=np.bool_)
        if keep.shape != (self.rows, self.cols):
            raise DataError(f"keep: expected {self.rows} x {self.cols} regions, got an array of shape {keep.shape}")
        kept = np.argwhere(keep)
        if not len(kept):
            raise DataError(f"none of {keep.size} regions is kept: the image has no valid pixels, or no foreground")
        levels = []
        for level in range(1 + len(self.overview)):
            height, width = self.level_shape(level)
            # A rest of less than half an overview pixel is rounded away with its row; its regions go to the last one.
            last = (-(-height // self.core) - 1, -(-width // self.core) - 1)
            cells = np.unique(np.minimum(kept // self.factor(level), last), axis=0) if level else kept
            cells = cells[scan_order(cells, self.order)]
            levels.append(np.column_stack([cells, np.full(len(cells), level)]))
        return np.concatenate(levels)

    @cached_property
    def places(self) -> tuple[Place, ...]:
        """All regions in scan order, level 0 first, then the overviews in the order of their factors."""
        return tuple(map(Place._make, self._lattice.tolist()))

    def __len__(self) -> int:
        return len(self._lattice)

    @property
    def full_size(self) -> int:
        """Regions of level 0; they come first."""
        return int((self._lattice[:, 2] == 0).sum())

    def factor(self, level: int) -> int:
        """Downsample factor of a nesting level; 1 for level 0."""
        return self.overview[level - 1] if level else 1

    def level_shape(self, level: int) -> tuple[int, int]:
        """(height, width) of the image at a nesting level, px; as `resample(image, factor)` has it."""
        factor = self.factor(level)
        return max(1, round(self.height / factor)), max(1, round(self.width / factor))

    def window_xywh(self, place: Place) -> tuple[int, int, int, int]:
        """The window to read, halo included, in px of the place's nesting level; may reach over the image's border."""
        row, col, _ = place
        return col * self.core - self.halo, row * self.core - self.halo, self.region, self.region

    def core_xywh(self, place: Place) -> tuple[int, int, int, int]:
        """The part of the image that the region answers for, cut at the border, in px of its nesting level.

        At each level these windows do not overlap; where all regions are kept they cover the image.
        """
        x, y = place.col * self.core, place.row * self.core
        height, width = self.level_shape(place.level)
        return x, y, min(self.core, width - x), min(self.core, height - y)

    def pixel_validity(self, place: Place) -> Mask:
        """(region, region), True where the region's window lies inside the image."""
        x, y, w, h = self.window_xywh(place)
        height, width = self.level_shape(place.level)
        rows, cols = np.arange(y, y + h), np.arange(x, x + w)
        return ((rows >= 0) & (rows < height))[:, None] & ((cols >= 0) & (cols < width))

    def lattice_shape(self, tokens_per_core: int) -> tuple[int, int]:
        """(rows, cols) of the lattice of level-0 tokens, those of regions left out included."""
        return self.rows * tokens_per_core, self.cols * tokens_per_core

    def token_coords(self, tokens_per_core: int) -> NDArray[np.float32]:
        """Where the tokens are: (regions, t * t, 2) as (row, col) in units of the level-0 token lattice.

        Args:
            tokens_per_core: t, tokens along one side of a core.

        Tokens of full size have whole numbers. A token of an overview has the centre of what it covers: with factor 8
        the first one covers tokens 0 to 7 and lies at 3.5. Within a region tokens go row by row.
        """
        t = tokens_per_core
        factors = np.array([self.factor(level) for level in range(1 + len(self.overview))])[self._lattice[:, 2]]
        index = self._lattice[:, :2, None] * t + np.arange(t)  # (regions, 2, t): on the token's own level
        along = (index + 0.5) * factors[:, None, None] - 0.5
        coords = np.empty((len(self), t, t, 2), dtype=np.float32)
        coords[..., 0] = along[:, 0, :, None]
        coords[..., 1] = along[:, 1, None, :]
        return coords.reshape(len(self), t * t, 2)  # (regions, t, t, 2) -> (regions, t * t, 2)

    def token_numbers(
        self, tokens_per_core: int, rows: NDArray[np.int64], cols: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """The tokens at places of the level-0 token lattice, or -1 where there is none: beyond it, or left out.

        Args:
            tokens_per_core: t, tokens along one side of a core.
            rows: of the places; may lie outside the lattice.
            cols: likewise; the two are broadcast.

        Returns:
            Numbers that count the tokens of full size in scan order of their regions, each region's row by row.
        """
        t = tokens_per_core
        regions = np.full((self.rows + 2, self.cols + 2), -1, dtype=np.int64)  # a frame of what lies beyond
        full_size = self._lattice[: self.full_size]
        regions[full_size[:, 0] + 1, full_size[:, 1] + 1] = np.arange(len(full_size))
        row, col = (np.clip(x // t + 1, 0, n + 1) for x, n in ((rows, self.rows), (cols, self.cols)))
        region = regions[row, col]
        found: NDArray[np.int64] = np.where(region < 0, -1, region * t * t + rows % t * t + cols % t)
        return found

    def tokens_with_halo(self, tokens_per_core: int, halo_tokens: int) -> NDArray[np.int64]:
        """The tokens of each region of full size and of its halo, which are its neighbours': see `token_numbers`.

        Args:
            tokens_per_core: t, tokens along one side of a core.
            halo_tokens: k, tokens along the halo.

        Returns:
            (regions, side * side), side = t + 2 * k, row by row.
        """
        along = np.arange(tokens_per_core + 2 * halo_tokens) - halo_tokens
        full_size = self._lattice[: self.full_size]
        rows, cols = (full_size[:, axis, None] * tokens_per_core + along for axis in (0, 1))  # (regions, side)
        # (regions, side, side) -> (regions, side * side)
        return self.token_numbers(tokens_per_core, rows[:, :, None], cols[:, None, :]).reshape(len(rows), -1)


def core_px(region: int, halo: int = 0) -> int:
    """Pitch of the lattice, `region - 2 * halo`.

    Raises:
        ConfigError: `region` is no multiple of 32; `halo` is none, is negative, or leaves no core.
    """
    if region < STRIDE or region % STRIDE:
        near = max(STRIDE, round(region / STRIDE) * STRIDE)
        raise ConfigError(f"region: expected a multiple of {STRIDE} px, got {region}; the nearest is {near}")
    if halo < 0 or halo % STRIDE or 2 * halo >= region:
        most = (region - 1) // (2 * STRIDE) * STRIDE
        near = min(max(0, round(halo / STRIDE) * STRIDE), most)
        raise ConfigError(
            f"halo: expected a multiple of {STRIDE} px below half of region={region}, got {halo}; the nearest is {near}"
        )
    return region - 2 * halo


def lattice_edges(size: int, core: int) -> Edges:
    """Lines between the cores along one axis: 0, core, 2 * core, ..., `size` px."""
    return np.minimum(np.arange(-(-size // core) + 1, dtype=np.int64) * core, size)


def scan_order(coords: ArrayLike, kind: Order) -> NDArray[np.int64]:
    """The order in which a scan visits places: a permutation of `coords`, found by sorting a key of each place.

    Args:
        coords: (places, 2) as (row, col) in lattice units, whole or not, gaps allowed. A scan goes over cells of one
            unit; places in one cell keep their given order, so an overview token follows the token beneath it.
        kind: `raster`: row by row; `snake`: every other row backwards; `hilbert`: along the Hilbert curve, which
            keeps neighbours in both directions near each other.

    The key depends on the place alone: leaving out places does not change the order of the others.

    Raises:
        ConfigError: another `kind`.
    """
    if kind not in get_args(Order):
        raise ConfigError(f"order: got {kind!r}{nearest(str(kind), get_args(Order))}")
    cells = np.floor(np.asarray(coords, dtype=np.float64)).astype(np.int64).reshape(-1, 2)
    if not len(cells):
        return np.empty(0, dtype=np.int64)
    cells -= np.minimum(cells.min(axis=0), 0)
    row, col = cells[:, 0], cells[:, 1]
    if kind == "hilbert":
        return np.argsort(hilbert_key(row, col), kind="stable")
    width = int(col.max()) + 1
    if kind == "snake":
        col = np.where(row & 1, width - 1 - col, col)
    raster_key: NDArray[np.int64] = row * width + col
    return np.argsort(raster_key, kind="stable")


def hilbert_key(row: NDArray[np.int64], col: NDArray[np.int64]) -> NDArray[np.int64]:
    """Distance along the Hilbert curve of cells (row, col), each from 0 to 2**31 - 1."""
    bits = max(int(row.max()), int(col.max())).bit_length()
    bits += bits & 1  # the curve of one bit more is transposed, of two bits more the same: so its start never changes
    x, y = col.copy(), row.copy()
    key = np.zeros_like(x)
    for bit in reversed(range(bits)):
        right, down = x >> bit & 1, y >> bit & 1
        key = key << 2 | (3 * right ^ down)
        low = (1 << bit) - 1
        x, y = x & low, y & low
        # Each quadrant holds a smaller curve: the upper two transposed, the upper right one turned as well.
        turned = (right & ~down & 1).astype(np.bool_)
        x, y = np.where(turned, low - x, x), np.where(turned, low - y, y)
        upper = down == 0
        x, y = np.where(upper, y, x), np.where(upper, x, y)
    return key


def keep_valid(image: Image, region: int, halo: int = 0) -> Mask:
    """Which regions hold at least one valid pixel in their core: (rows, cols).

    Never leaves out a valid pixel: only full resolution decides that a region is empty. It is read once, in bands as
    high as 128 MiB allows, so that strips and tiles are decoded once or little more. A pyramid saves most of that where
    its word can be trusted (see `_surely_valid`). Images without nodata and mask are not read at all. Cache the result.

    Args:
        image: views of `gigaxt.augment` are read in the direction of the file.
        region: px on a side.
        halo: px; see `RegionGrid`.
    """
    core = core_px(region, halo)
    row_edges, col_edges = lattice_edges(image.height, core), lattice_edges(image.width, core)
    base, row_edges, col_edges, k = below_turns(image, row_edges, col_edges)
    if base.all_valid:
        return np.ones((-(-image.height // core), -(-image.width // core)), dtype=np.bool_)
    rows, cols = np.column_stack([row_edges[:-1], row_edges[1:]]), np.column_stack([col_edges[:-1], col_edges[1:]])
    keep = _surely_valid(base, row_edges, col_edges)
    # Without help from a pyramid one pass over all. With it the rest lies scattered: rows of the usual tiles, 512 px.
    step = max(1, 512 // core) if keep.any() else len(rows)
    for top in range(0, len(rows), step):
        for left, right in _runs(~np.logical_and.reduce(keep[top : top + step], axis=0)):
            found = _any_valid(base, rows[top : top + step], cols[left:right], level=0)
            keep[top : top + step, left:right] |= found
    return np.ascontiguousarray(turn(keep, k))


def _surely_valid(image: Image, row_edges: Edges, col_edges: Edges) -> Mask:
    """Regions that a lower level shows to hold a valid pixel.

    Makers of overviews average or pick pixels, so a valid pixel down there has a valid one within the reach of the
    kernel: 3 px for Lanczos, 8 px for the blocks of JPEG. Only pixels that far inside a core count, at levels where
    such a margin leaves something. Floating point is left out, as the average of many -9999 can be -9998.999. Should a
    pyramid be wrong all the same, an empty region is kept; never the reverse.
    """
    margin, least = 8, 32
    found = np.zeros((len(row_edges) - 1, len(col_edges) - 1), dtype=np.bool_)
    if image.nodata is None or not np.issubdtype(image.dtype, np.integer):
        return found
    core = min(np.diff(row_edges).max(), np.diff(col_edges).max())
    fine_enough = [max(size.downsample_x, size.downsample_y) * least <= core for size in image.levels]
    level = max(n for n, fine in enumerate(fine_enough) if fine or n == 0)
    if level == 0:
        return found
    size = image.levels[level]
    rows = _spans_inside(row_edges / size.downsample_y, margin, size.height)
    cols = _spans_inside(col_edges / size.downsample_x, margin, size.width)
    return _any_valid(image, rows, cols, level)


def _spans_inside(edges: NDArray[np.float64], margin: int, size: int) -> NDArray[np.int64]:
    """(cells, 2): start and stop of the pixels that lie wholly inside each cell, `margin` away from its lines."""
    start = np.ceil(edges[:-1]) + margin
    stop = np.maximum(np.floor(edges[1:]) - margin, start)
    spans: NDArray[np.int64] = np.clip(np.column_stack([start, stop]), 0, size).astype(np.int64)
    return spans


def _any_valid(image: Image, rows: NDArray[np.int64], cols: NDArray[np.int64], level: int) -> Mask:
    """Whether each cell of spans rows (n, 2) x cols (m, 2), in px of `level`, holds a valid pixel: (n, m)."""
    found = np.zeros((len(rows), len(cols)), dtype=np.bool_)
    pixel_bytes = image.channels * image.dtype.itemsize + 1
    tallest = int((rows[:, 1] - rows[:, 0]).max())
    across = max(1, READ_BYTES // (pixel_bytes * max(1, tallest)))  # px of a row of regions that fit
    for piece in _pieces(cols, across):
        x, w = int(cols[piece][0, 0]), int(cols[piece][-1, 1] - cols[piece][0, 0])
        for band in _pieces(rows, max(1, READ_BYTES // (pixel_bytes * max(1, w)))):
            y, h = int(rows[band][0, 0]), int(rows[band][-1, 1] - rows[band][0, 0])
            if w < 1 or h < 1:
                continue
            mask = image.validity(x, y, w, h, level)
            for row in range(band.start, band.stop):
                line = mask[rows[row, 0] - y : rows[row, 1] - y].any(axis=0)
                count = np.concatenate([[0], np.cumsum(line)])  # valid columns left of each
                found[row, piece] = count[cols[piece][:, 1] - x] > count[cols[piece][:, 0] - x]
    return found


def _pieces(spans: NDArray[np.int64], most: int) -> Iterator[slice]:
    """Cut spans (n, 2) into slices that reach over `most` px at most, or hold a single span."""
    start = 0
    while start < len(spans):
        stop = int(np.searchsorted(spans[:, 1], spans[start, 0] + most, side="right"))
        stop = max(start + 1, stop)
        yield slice(start, stop)
        start = stop


def _runs(wanted: Mask) -> list[tuple[int, int]]:
    """Start and stop of the stretches where `wanted` (n,) is True."""
    steps = np.flatnonzero(np.diff(wanted, prepend=False, append=False))
    return [(int(start), int(stop)) for start, stop in steps.reshape(-1, 2)]
