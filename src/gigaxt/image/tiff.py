"""TIFF of every common kind, window by window: an index made once, few positional reads, one decoder call a tile."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gigaxt.amounts import amount
from gigaxt.image.base import Image, Level, Mask, Pixels, Window
from gigaxt.image.files import File
from gigaxt.image.tiff_index import build_index, compression_name
from gigaxt.image.tiff_pieces import Piece, PlaneReader, fetch_ahead, fill_pieces, whole_segment

_numbers = itertools.count()


class TiffImage(Image):
    """A TIFF, BigTIFF, COG, GeoTIFF, OME-TIFF or Aperio SVS file, tiled or in strips.

    Pixels are those in the file: palette indices, stored orientation, an alpha band as a band. Tiles that the file
    leaves out are nodata (0 where it has none). Levels are overview pages or SubIFDs of the image's proportions; of
    stacks, the first z and t; of several unrelated pages, the first. Bands are samples, and OME channels.

    Args:
        path: the file.
        max_pixels: a larger width x height is refused.
        max_tile_bytes: a larger decoded tile or strip is refused; uncompressed strips of any size are read by row.
        cached: see `open_image`.

    Raises:
        ImageError: the file is no TIFF, is truncated or corrupt, or of a kind that is not read.
    """

    def __init__(
        self, path: str | Path, *, max_pixels: int = 2**34, max_tile_bytes: int = 64 << 20, cached: bool = True
    ) -> None:
        self.name = str(path)
        self._options: dict[str, Any] = {"max_pixels": max_pixels, "max_tile_bytes": max_tile_bytes, "cached": cached}
        self._file = File(self.name, cached=cached)
        index = build_index(self._file, max_pixels, max_tile_bytes)
        self.vendor_slide = index.vendor
        """Whether openslide should read this file: its levels overlap, are padded or lie beyond 32-bit offsets."""
        if not index.levels:
            return
        self._planes, self._masks = index.levels, index.masks
        full = self._planes[0][0]
        self.width, self.height, self.dtype = full.width, full.height, full.dtype
        self.channels = sum(plane.samples for plane in self._planes[0])
        self.levels = tuple(
            Level(planes[0].width, planes[0].height, full.width / planes[0].width, full.height / planes[0].height)
            for planes in self._planes
        )
        self.nodata, self.mpp, self.orientation = index.nodata, index.mpp, index.orientation
        self.crs, self.crs_unit_m, self.transform = index.geo
        self.pages = index.pages
        self.band_names = index.band_names or tuple(str(band + 1) for band in range(self.channels))
        self._number = next(_numbers)
        self._known_readers: dict[tuple[tuple[int, ...], int], list[tuple[PlaneReader, list[tuple[int, int]]]]] = {}

    def __reduce__(self) -> tuple[Callable[..., TiffImage], tuple[str]]:
        return functools.partial(TiffImage, **self._options), (self.name,)

    @property
    def all_valid(self) -> bool:
        """See `Image.all_valid`."""
        return self.nodata is None and self._masks[0] is None

    @property
    def storage(self) -> str:
        """How level 0 lies in the file, such as "tiles of 512 x 512 px, deflate"."""
        plane = self._planes[0][0]
        codec = compression_name(plane.compression)
        if plane.segment_width == plane.width and plane.across == 1:
            rows = min(plane.segment_height, plane.height)
            return f"strips of {amount(rows, 'row')}, {codec}"
        return f"tiles of {plane.segment_width} x {plane.segment_height} px, {codec}"

    def _read_inside(self, x: int, y: int, w: int, h: int, level: int) -> Pixels:
        return self._read_bands(tuple(range(self.channels)), x, y, w, h, level)

    def _read_bands(self, bands: tuple[int, ...], x: int, y: int, w: int, h: int, level: int) -> Pixels:
        out = np.empty((h, w, len(bands)), self.dtype)  # costs nothing until it is written
        pieces = self._pieces([out], [(x, y, w, h)], level, bands)
        if len(pieces) == 1 and pieces[0].target.shape == out.shape:
            tile = whole_segment(self._file, pieces[0])
            if tile is not None:
                return tile
        fill_pieces(self._file, pieces)
        return out

    def _read_each(
        self, out: Sequence[Pixels], windows: Sequence[Window], level: int, bands: tuple[int, ...] | None = None
    ) -> None:
        bands = tuple(range(self.channels)) if bands is None else bands
        fill_pieces(self._file, self._pieces(out, windows, level, bands))

    def _pieces(
        self, out: Sequence[Pixels], windows: Sequence[Window], level: int, bands: tuple[int, ...]
    ) -> list[Piece]:
        """What to fill of `out` (h, w, bands each); what needs no decoding is filled here."""
        pieces: list[Piece] = []
        for reader, wanted in self._readers(bands, level):
            if reader.plane.stored is None:
                pieces += reader.pieces(out, windows, wanted)
                continue
            for target, (x, y, _, _) in zip(out, windows, strict=True):
                reader.read_rows(target, wanted, x, y)
        return pieces

    def _valid_inside(self, x: int, y: int, w: int, h: int, level: int) -> Mask | None:
        reader = self._mask_reader(level)
        if reader is None:
            return None
        out = np.empty((h, w, 1), reader.plane.dtype)
        if reader.plane.stored is None:
            fill_pieces(self._file, reader.pieces([out], [(x, y, w, h)], [(0, 0)]))
        else:
            reader.read_rows(out, [(0, 0)], x, y)
        return np.not_equal(out[..., 0], 0)

    def _expect(self, windows: Sequence[Window], level: int, bands: tuple[int, ...]) -> None:
        readers = self._readers(bands, level)
        mask = self._mask_reader(level)
        if mask is not None:
            readers.append((mask, [(0, 0)]))
        segments = [
            segment
            for window in windows
            for reader, wanted in readers
            if reader.plane.stored is None
            for segment in reader.segments(window, wanted)
        ]
        fetch_ahead(self._file, segments)

    def _readers(self, bands: tuple[int, ...], level: int) -> list[tuple[PlaneReader, list[tuple[int, int]]]]:
        """The planes that hold some of `bands`, each with pairs of a band's place in `bands` and in the plane."""
        known = self._known_readers.get((bands, level))
        if known is not None:
            return list(known)
        found, first = [], 0
        for number, plane in enumerate(self._planes[level]):
            wanted = [(at, band - first) for at, band in enumerate(bands) if first <= band < first + plane.samples]
            if wanted:
                key = (self._number, level, number)
                found.append((PlaneReader(self._file, plane, key, f"level {level}", self.nodata or 0), wanted))
            first += plane.samples
        self._known_readers[bands, level] = found
        return list(found)

    def _mask_reader(self, level: int) -> PlaneReader | None:
        plane = self._masks[level]
        if plane is None:
            return None
        return PlaneReader(self._file, plane, (self._number, level, -1), f"mask of level {level}", 0)
