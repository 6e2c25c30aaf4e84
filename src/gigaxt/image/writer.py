"""`TiffWriter`: a tiled, pyramidal TIFF written window by window, in any order, from several threads.

Tiles are appended in the order in which they become complete; directories follow last. Overviews are chained
directories with NewSubfileType 1, as in GDAL's files: GDAL (QGIS), tifffile and OpenSlide (QuPath) see them as levels;
SubIFDs, which Bio-Formats prefers, GDAL would not find. Pixels never written are nodata (0 without): such tiles all
point to one stored tile, which any reader understands, unlike the missing tiles of GDAL's SPARSE_OK.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import DTypeLike, NDArray

from gigaxt.errors import ConfigError, ImageError
from gigaxt.image.base import Image, Pixels
from gigaxt.image.part_file import PartFile
from gigaxt.image.reduce import halve
from gigaxt.image.tiff_geo import geo_tags
from gigaxt.image.tiff_layout import (
    HEADER,
    Colormap,
    Compression,
    Tag,
    TileFormat,
    ascii_tag,
    bands_tag,
    encode_directory,
    long8_tag,
    long_tag,
    nodata_in_dtype,
    nodata_tag,
    short_tag,
)


@dataclass
class _Pending:
    """A tile that waits for the rest of its pixels."""

    pixels: Pixels
    missing: int


@dataclass
class _Level:
    """One resolution: where its tiles lie in the file, and those that are not complete yet."""

    height: int
    width: int
    offsets: NDArray[np.uint64]  # (rows, cols) of tiles; 0 until written
    sizes: NDArray[np.uint64]
    pending: dict[tuple[int, int], _Pending] = field(default_factory=dict)


class TiffWriter:
    """Writes one TIFF as a context manager: complete under its name after the `with`, or not there at all.

    Every pixel may be written once, in windows of any size and place. The overviews are made as tiles become complete.
    Memory: a tile is held from its first pixel to its last. Windows in raster order hold one row of tiles, and as much
    for the overviews together: at most 2 * width * tile * bytes per pixel, whatever the height; in Hilbert order a few
    tiles a level; in random order up to the whole image. Windows that cover whole tiles are held only in the overviews.
    A tile that never gets all of its pixels, and the overviews above it, are held to the end: declare with `leave_out`
    what will not be written.

    Args:
        path: where the file appears when it is complete; until then `path + ".part"`.
        height: px.
        width: px.
        channels: bands, stored interleaved.
        dtype: uint8, uint16, int16, float16 or float32.
        tile: px on a side, a multiple of 16.
        compression: of the tiles; deflate, the default, is what every program opens; zstd is smaller and faster to
            read; jpeg (quality 90, 1 or 3 bands of uint8) loses; None stores the bytes as they are.
        like: its CRS and transform, micrometres per pixel and orientation are copied; must have the same size.
        nodata: the value of pixels that hold nothing; not counted in overviews.
        colormap: colours of the classes 0, 1, ... as (red, green, blue), each 0-255.
        categorical: values are classes, so overviews take the most frequent, not the mean; None: with a colormap.
        alpha: the last band is opacity.
        band_names: one a band, as QGIS shows them.
        scale: what stored values are to be multiplied by, as GDAL and QGIS do; readers of gigaxt give them as stored.
        orientation: as EXIF and TIFF count it, 1 to 8; None: that of `like`, else none.
        levels: make overviews, each half as large, down to one tile.

    Raises:
        ConfigError: the settings contradict each other.
        ImageError: the file cannot be written; also from `write` and on leaving the `with`.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        height: int,
        width: int,
        channels: int = 1,
        dtype: DTypeLike = "uint8",
        *,
        tile: int = 512,
        compression: Compression = "deflate",
        like: Image | None = None,
        nodata: float | None = None,
        colormap: Colormap | None = None,
        categorical: bool | None = None,
        alpha: bool = False,
        band_names: Sequence[str] | None = None,
        scale: float | None = None,
        orientation: int | None = None,
        levels: bool = True,
    ) -> None:
        self.path = Path(path)
        self.height, self.width, self.channels, self.dtype = height, width, channels, np.dtype(dtype)
        self._categorical = colormap is not None if categorical is None else categorical
        self._format = TileFormat(
            channels=channels,
            dtype=self.dtype,
            tile=tile,
            compression=compression,
            colormap=colormap,
            categorical=self._categorical,
            alpha=alpha,
        )
        self._nodata = None if nodata is None else nodata_in_dtype(nodata, self.dtype)
        self._check(like, nodata, band_names)
        self._fill = np.asarray(0 if self._nodata is None else self._nodata).astype(self.dtype)
        self._tags = _file_tags(like, orientation)
        if band_names is not None or scale is not None:
            self._tags.append(bands_tag(channels, band_names, scale))
        self._levels = _make_levels(height, width, tile, halved=levels)
        self._lock = threading.Lock()
        self._file = PartFile(self.path)
        self._file.append(HEADER.pack(b"II", 43, 8, 0, 0))
        self._filler: tuple[int, int] | None = None

    def write(self, x: int, y: int, pixels: Pixels) -> None:
        """Put a window at its place. May be called from several threads; compression runs outside the lock.

        Args:
            x: left edge in px; what lies outside the image is left out.
            y: top edge in px.
            pixels: (h, w, channels), or (h, w) for one band, in the file's dtype. Not kept after the call.

        Raises:
            ImageError: wrong shape or dtype, a pixel written twice, or the disk refuses.
        """
        place = f"x {x}, y {y}"
        if pixels.ndim == 2 and self.channels == 1:
            pixels = pixels[..., None]  # (h, w) -> (h, w, 1)
        if pixels.ndim != 3 or pixels.shape[2] != self.channels or pixels.dtype != self.dtype:
            wanted = f"(h, w, {self.channels}) of {self.dtype}"
            raise ImageError(self.path, f"expected pixels {wanted}, got {pixels.shape} of {pixels.dtype}", place)
        left, top = max(0, -x), max(0, -y)
        inside = pixels[top : max(0, self.height - y), left : max(0, self.width - x)]
        if inside.size:
            self._put(0, x + left, y + top, inside)

    def leave_out(self, x: int, y: int, w: int, h: int) -> None:
        """Declare that a window, in px, will not be written: it is nodata, and nothing waits for it in memory."""
        self.write(x, y, np.broadcast_to(self._fill, (h, w, self.channels)))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._file.discard()
            for level in self._levels:
                level.pending.clear()

    def _check(self, like: Image | None, nodata: float | None, band_names: Sequence[str] | None) -> None:
        if self.height < 1 or self.width < 1 or max(self.height, self.width) >= 2**31:
            raise ConfigError(f"expected a size from 1 to 2^31 - 1 px, got {self.height} x {self.width}")
        if nodata is not None and self._nodata is None:
            raise ConfigError(f"expected a nodata value that {self.dtype} can hold, got {nodata}")
        if like is not None and (like.height, like.width) != (self.height, self.width):
            raise ConfigError(
                f"expected `like` to have the size {self.height} x {self.width} of the file, got {like.height} x"
                f" {like.width}: resample it first"
            )
        if band_names is not None and len(band_names) != self.channels:
            raise ConfigError(f"expected {self.channels} band names, got {len(band_names)}")

    def _put(self, index: int, x: int, y: int, pixels: Pixels) -> None:
        """Put a window that lies inside level `index`, tile by tile."""
        level, tile = self._levels[index], self._format.tile
        h, w = pixels.shape[:2]
        for row in range(y // tile, (y + h - 1) // tile + 1):
            for col in range(x // tile, (x + w - 1) // tile + 1):
                top, left = row * tile, col * tile
                part = pixels[max(top - y, 0) : top + tile - y, max(left - x, 0) : left + tile - x]
                whole = self._gather(level, row, col, max(x - left, 0), max(y - top, 0), part)
                if whole is not None:
                    self._store(index, row, col, whole)

    def _gather(self, level: _Level, row: int, col: int, x: int, y: int, part: Pixels) -> Pixels | None:
        """Add pixels to a tile, x and y in its own frame; the tile's pixels once they are all there."""
        tile = self._format.tile
        h, w = min(tile, level.height - row * tile), min(tile, level.width - col * tile)
        with self._lock:
            if level.offsets[row, col]:
                place = f"x {col * tile + x}, y {row * tile + y}, {part.shape[1]} x {part.shape[0]} px"
                raise ImageError(self.path, "a pixel was written twice", place)
            pending = level.pending.get((row, col))
            if pending is None:
                if part.shape[:2] == (h, w):
                    return part
                pending = _Pending(np.full((h, w, self.channels), self._fill), h * w)
                level.pending[row, col] = pending
            pending.pixels[y : y + part.shape[0], x : x + part.shape[1]] = part
            pending.missing -= part.shape[0] * part.shape[1]
            if pending.missing > 0:
                return None
            del level.pending[row, col]
        return pending.pixels

    def _store(self, index: int, row: int, col: int, pixels: Pixels) -> None:
        """Append a tile to the file and hand its half-size copy to the next level."""
        level = self._levels[index]
        if self._is_fill(pixels):
            offset, size = self._filler_tile()
        else:
            data = self._format.encode(pixels)
            offset, size = self._file.append(data), len(data)
        level.offsets[row, col], level.sizes[row, col] = offset, size
        if index + 1 < len(self._levels):
            half = self._format.tile // 2
            self._put(index + 1, col * half, row * half, halve(pixels, self._nodata, categorical=self._categorical))

    def _is_fill(self, pixels: Pixels) -> bool:
        if np.isnan(self._fill):
            return bool(np.isnan(pixels[0, 0, 0]) and np.isnan(pixels).all())
        return bool(pixels[0, 0, 0] == self._fill and (pixels == self._fill).all())

    def _filler_tile(self) -> tuple[int, int]:
        """Offset and size of the one stored tile of nothing but fill."""
        with self._lock:
            if self._filler is None:
                data = self._format.encode(np.full((1, 1, self.channels), self._fill))
                self._filler = self._file.append(data), len(data)
            return self._filler

    def _finish(self) -> None:
        """Complete the tiles that lack pixels, finest level first, and write the directories."""
        for index, level in enumerate(self._levels):
            while level.pending:
                (row, col), pending = level.pending.popitem()
                self._store(index, row, col, pending.pixels)
        for level in self._levels:
            empty = level.offsets == 0
            if empty.any():
                level.offsets[empty], level.sizes[empty] = self._filler_tile()
        first = self._file.append(b"", align=8)
        for index, level in enumerate(self._levels):
            last = index + 1 == len(self._levels)
            at = self._file.append(b"", align=8)
            self._file.append(encode_directory(self._directory(index, level), at, last=last))
        self._file.rewrite(HEADER.pack(b"II", 43, 8, 0, first), 0)
        self._file.commit()

    def _directory(self, index: int, level: _Level) -> list[Tag]:
        tags = self._format.tags(level.height, level.width)
        tags += [long8_tag(324, level.offsets), long8_tag(325, level.sizes), long_tag(254, min(index, 1))]
        if self._nodata is not None:
            tags.append(nodata_tag(self._nodata))
        return tags + self._tags if index == 0 else tags


def _file_tags(like: Image | None, orientation: int | None) -> list[Tag]:
    """What is said once, with the full-size level."""
    tags = [ascii_tag(305, "gigaxt")]
    if like is not None:
        tags += geo_tags(like)
        orientation = like.orientation if orientation is None else orientation
    if orientation is not None:
        tags.append(short_tag(274, orientation))
    return tags


def _make_levels(height: int, width: int, tile: int, *, halved: bool) -> list[_Level]:
    """Full size, then halves rounded up, until a level is one tile."""
    levels: list[_Level] = []
    while True:
        shape = -(-height // tile), -(-width // tile)
        levels.append(_Level(height, width, np.zeros(shape, np.uint64), np.zeros(shape, np.uint64)))
        if not halved or shape == (1, 1):
            return levels
        height, width = -(-height // 2), -(-width // 2)
