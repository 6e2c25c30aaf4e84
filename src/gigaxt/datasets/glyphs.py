"""Shapes and texture for synthetic scenes, computed from coordinates so that any window can be drawn alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


CASING = 1.45
"""Diameter of the dark disc around a glyph, in diameters of the glyph."""


class Glyphs(NamedTuple):
    """Places and looks of n glyphs."""

    rows: NDArray[np.float64]
    """(n,) centres, px; a pixel's centre is at + 0.5."""
    cols: NDArray[np.float64]
    kinds: NDArray[np.int64]
    """(n,) indices into `KINDS`."""
    angles: NDArray[np.float64]
    """(n,) radians."""
    tones: NDArray[np.float32]
    """(n, channels) colours, 0 to 1."""

    def take(self, chosen: NDArray[np.int64] | NDArray[np.bool_] | slice) -> Glyphs:
        """Some of the glyphs, by number, mask or slice."""
        return Glyphs(self.rows[chosen], self.cols[chosen], self.kinds[chosen], self.angles[chosen], self.tones[chosen])


def stamps(glyphs: Glyphs, size_px: int) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.int64]]:
    """How much of each pixel a glyph covers, on a square of its own.

    Args:
        glyphs: n glyphs.
        size_px: diameter of the circle that holds a glyph.

    Returns:
        Coverage (n, 2, side, side) from 0 to 1, first of the shape (a pixel above 0.5 belongs to the glyph), then of
        the casing, a disc `CASING` times as wide without the shape; and the row and the column (n,) of the squares'
        left top pixel.
    """
    side = int(np.ceil(size_px * CASING)) + 3  # one px of soft edge on either side, one for the centre's fraction
    tops = np.floor(glyphs.rows - side / 2).astype(np.int64)
    lefts = np.floor(glyphs.cols - side / 2).astype(np.int64)
    axis = np.arange(side) + 0.5
    v = (tops - glyphs.rows)[:, None, None] + axis[None, :, None]  # (n, side, 1), px from the centre, down
    u = (lefts - glyphs.cols)[:, None, None] + axis[None, None, :]  # (n, 1, side), px from the centre, right
    cos, sin = np.cos(glyphs.angles)[:, None, None], np.sin(glyphs.angles)[:, None, None]
    u, v = cos * u + sin * v, cos * v - sin * u  # (n, side, side)
    beyond = np.hypot(u, v) - size_px / 2
    coverage = np.empty((len(u), 2, side, side), dtype=np.float32)
    for kind in np.unique(glyphs.kinds):
        chosen = glyphs.kinds == kind
        distance = _DISTANCES[int(kind)](u[chosen], v[chosen], size_px / 2)
        # The circle cuts the soft edges of sharp tips, which would reach beyond it.
        coverage[chosen, 0] = np.clip(0.5 - np.maximum(distance, beyond[chosen]), 0, 1)
    coverage[:, 1] = np.clip(0.5 - beyond + (CASING - 1) * size_px / 2, 0, 1) - coverage[:, 0]
    return coverage, tops, lefts


def relief(coverage: NDArray[np.float32]) -> NDArray[np.float32]:
    """Bright shapes in dark casings whose sum is 0, so that an averaged thumbnail shows neither.

    Args:
        coverage: (n, 2, side, side), see `stamps`.

    Returns:
        (n, side, side), from the casing's dark to the shape's bright 1 in all.
    """
    shape, casing = coverage[:, 0], coverage[:, 1]
    ratio = shape.sum(axis=(1, 2), keepdims=True) / casing.sum(axis=(1, 2), keepdims=True)  # (n, 1, 1)
    return np.asarray((shape - casing * ratio) / (1 + ratio), dtype=np.float32)


def boxes_xywh(glyphs: Glyphs, size_px: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Tight boxes (n, 4) as xywh and areas (n,), both in px, of the pixels that belong to each glyph."""
    boxes = np.zeros((len(glyphs.rows), 4), dtype=np.int64)
    areas = np.zeros(len(glyphs.rows), dtype=np.int64)
    for start in range(0, len(boxes), 1024):
        part = slice(start, start + 1024)
        coverage, tops, lefts = stamps(glyphs.take(part), size_px)
        inside: NDArray[np.bool_] = coverage[:, 0] > 0.5  # (n, side, side)
        rows, cols = np.asarray(inside.any(axis=2)), np.asarray(inside.any(axis=1))  # (n, side)
        boxes[part] = np.stack(
            [lefts + cols.argmax(axis=1), tops + rows.argmax(axis=1), _extent(cols), _extent(rows)], axis=1
        )
        areas[part] = inside.sum(axis=(1, 2))
    return boxes, areas


def texture(
    key: int, x: int, y: int, w: int, h: int, channels: int, *, smooth: float, noise: float
) -> NDArray[np.float32]:
    """Smooth colour noise plus noise of single pixels, (h, w, channels), around 0.

    Args:
        key: which texture, below 2**32.
        x: left edge of the window, px.
        y: top edge, px.
        w: width, px.
        h: height, px.
        channels: bands.
        smooth: amplitude of the smooth part.
        noise: amplitude of the pixel noise.
    """
    field = _lattice_noise(key, 96, x, y, w, h, channels)
    field *= np.float32(0.7 * smooth)
    field += _lattice_noise(key + 1, 24, x, y, w, h, 1) * np.float32(0.3 * smooth)  # grey: broadcasts over the bands
    words = -(-channels // 4)  # one hash gives four bytes
    fine = np.stack([_hash_grid(key + 2 + i, y, x, h, w) for i in range(words)], axis=2).astype("<u4", copy=False)
    grains = fine.view(np.uint8)[:, :, :channels]  # (h, w, words) of uint32 -> (h, w, channels)
    # A table of 256 entries: exact, and cheaper than arithmetic on every pixel.
    field += ((np.arange(256) - 127.5) / 127.5 * noise).astype(np.float32)[grains]
    return field


def _lattice_noise(key: int, pitch: int, x: int, y: int, w: int, h: int, channels: int) -> NDArray[np.float32]:
    """Value noise in -1 to 1: random numbers on a lattice, smoothly interpolated, (h, w, channels).

    Plain elementwise arithmetic, no matrix product: its rounding would depend on the window.
    """
    row, row_weight = _between(y, h, pitch)
    col, col_weight = _between(x, w, pitch)
    rows, cols = row[-1] - row[0] + 2, col[-1] - col[0] + 2
    values = np.stack([_hash_grid(key + 97 * c, row[0], col[0], rows, cols) for c in range(channels)], axis=2)
    nodes = values.astype(np.float32) * np.float32(2 / 2**32) - np.float32(1)  # (rows, cols, channels)
    r, c = row - row[0], col - col[0]
    bands = nodes[r] + (nodes[r + 1] - nodes[r]) * row_weight[:, None, None]  # (h, cols, channels)
    slope = np.diff(bands, axis=1)
    return np.asarray(np.take(bands, c, axis=1) + np.take(slope, c, axis=1) * col_weight[:, None], dtype=np.float32)


def _between(start: int, count: int, pitch: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """For each of `count` pixels: the lattice node before it and the smooth weight of the next one."""
    node, rest = np.divmod(np.arange(start, start + count), pitch)
    part = (rest / pitch).astype(np.float32)
    return node, part * part * (3 - 2 * part)


def _hash_grid(key: int, row: int, col: int, rows: int, cols: int) -> NDArray[np.uint32]:
    """Random bits (rows, cols) that depend on key, row and column alone ("lowbias32" of C. Wellons, twice)."""
    line = _mix((np.arange(row, row + rows) * 0x9E3779B1 + key).astype(np.uint32))
    return _mix(line[:, None] + (np.arange(col, col + cols) * 0x85EBCA6B).astype(np.uint32)[None, :])


def _mix(bits: NDArray[np.uint32]) -> NDArray[np.uint32]:
    bits ^= bits >> np.uint32(16)
    bits *= np.uint32(0x7FEB352D)
    bits ^= bits >> np.uint32(15)
    bits *= np.uint32(0x846CA68B)
    bits ^= bits >> np.uint32(16)
    return bits


def _extent(filled: NDArray[np.bool_]) -> NDArray[np.int64]:
    """From the first to the last True of each line, (n, side) -> (n,)."""
    side = filled.shape[1]
    return np.asarray(side - filled[:, ::-1].argmax(axis=1) - filled.argmax(axis=1), dtype=np.int64)


# Signed distances to the outlines in px, negative inside; u right, v down, from the centre; all within radius r.


def _cross(u: Floats, v: Floats, r: float) -> Floats:
    long, short = 0.966 * r, 0.259 * r
    u, v = np.abs(u), np.abs(v)
    return np.asarray(np.minimum(np.maximum(u - long, v - short), np.maximum(v - long, u - short)))


def _disc(u: Floats, v: Floats, r: float) -> Floats:
    return np.hypot(u, v) - r


def _ring(u: Floats, v: Floats, r: float) -> Floats:
    return np.abs(np.hypot(u, v) - 0.75 * r) - 0.25 * r


def _square(u: Floats, v: Floats, r: float) -> Floats:
    side: Floats = np.maximum(np.abs(u), np.abs(v))
    return side - 0.70711 * r


def _star(u: Floats, v: Floats, r: float) -> Floats:
    # Fold the plane into half a point of the star: there the outline is one line, from the tip to the notch.
    turn = np.arctan2(u, -v)
    turn = np.abs((turn + np.pi / 5) % (2 * np.pi / 5) - np.pi / 5)
    radius = np.hypot(u, v)
    notch_along, notch_across = 0.42 * r * np.cos(np.pi / 5), 0.42 * r * np.sin(np.pi / 5)
    along, across = r - notch_along, notch_across
    length = float(np.hypot(along, across))
    distance: Floats = ((radius * np.cos(turn) - r) * across + radius * np.sin(turn) * along) / length
    return distance


def _triangle(u: Floats, v: Floats, r: float) -> Floats:
    edge: Floats = np.maximum(np.abs(u) * np.sqrt(0.75) - v * 0.5, v)
    return edge - r / 2


def _vee(u: Floats, v: Floats, r: float) -> Floats:
    inside: Floats = np.maximum(_triangle(u, v, r), -_triangle(u, v - 0.7 * r, r))
    return inside


def _wedge(u: Floats, v: Floats, r: float) -> Floats:
    half: Floats = np.maximum(np.hypot(u, v) - r, v)
    return half


_DISTANCES: tuple[Callable[[Floats, Floats, float], Floats], ...] = (
    _cross,
    _disc,
    _ring,
    _square,
    _star,
    _triangle,
    _vee,
    _wedge,
)
KINDS = ("cross", "disc", "ring", "square", "star", "triangle", "vee", "wedge")
"""Names of the shapes, sorted, so that class numbers of masks and of manifests agree."""
