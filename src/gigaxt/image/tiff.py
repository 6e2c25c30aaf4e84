"""TIFF of every common kind, window by window: an index made once, positional reads, one decoder call a segment."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gigaxt.errors import ImageError
from gigaxt.image.base import Image, Level, Mask, Pixels
from gigaxt.image.cache import SEGMENTS
from gigaxt.image.process import File
from gigaxt.image.tiff_index import NONE, Plane, build_index, compression_name

_WASTE = 16 << 10  # bytes of a row read for nothing before a read call for each row is cheaper
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

    Raises:
        ImageError: the file is no TIFF, is truncated or corrupt, or of a kind that is not read.
    """

    def __init__(self, path: str | Path, *, max_pixels: int = 2**34, max_tile_bytes: int = 64 << 20) -> None:
        self.name = str(path)
        self._options: dict[str, Any] = {"max_pixels": max_pixels, "max_tile_bytes": max_tile_bytes}
        self._file = File(self.name)
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
        self.band_names = index.band_names or tuple(str(band + 1) for band in range(self.channels))
        self._number = next(_numbers)

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
            return f"strips of {rows} {'row' if rows == 1 else 'rows'}, {codec}"
        return f"tiles of {plane.segment_width} x {plane.segment_height} px, {codec}"

    def _read_inside(self, x: int, y: int, w: int, h: int, level: int) -> Pixels:
        return self._read_bands(tuple(range(self.channels)), x, y, w, h, level)

    def _read_bands(self, bands: tuple[int, ...], x: int, y: int, w: int, h: int, level: int) -> Pixels:
        out = np.empty((h, w, len(bands)), self.dtype)
        first = 0
        for number, plane in enumerate(self._planes[level]):
            wanted = [(at, band - first) for at, band in enumerate(bands) if first <= band < first + plane.samples]
            if wanted:
                reader = _PlaneReader(self, plane, (self._number, level, number), f"level {level}")
                reader.read(out, wanted, x, y)
            first += plane.samples
        return out

    def _valid_inside(self, x: int, y: int, w: int, h: int, level: int) -> Mask | None:
        plane = self._masks[level]
        if plane is None:
            return None
        out = np.empty((h, w, 1), plane.dtype)
        _PlaneReader(self, plane, (self._number, level, -1), f"mask of level {level}", fill=0).read(out, [(0, 0)], x, y)
        return np.not_equal(out[..., 0], 0)


class _PlaneReader:
    """Copies a window of one plane into place."""

    def __init__(
        self, image: TiffImage, plane: Plane, key: tuple[int, int, int], place: str, fill: float | None = None
    ) -> None:
        self.image, self.plane, self.key, self.place = image, plane, key, place
        self.fill = (image.nodata or 0) if fill is None else fill

    def read(self, out: Pixels, wanted: list[tuple[int, int]], x: int, y: int) -> None:
        """Fill bands of `out` (h, w, bands), its corner at (x, y); `wanted` pairs its bands with the plane's."""
        plane = self.plane
        if plane.planar:
            per_band = plane.across * plane.down
            for at, sample in wanted:
                self._copy(out[..., at : at + 1], x, y, sample * per_band, slice(None))
            return
        places, samples = [at for at, _ in wanted], [sample for _, sample in wanted]
        if samples == list(range(plane.samples)) and places == list(range(places[0], places[0] + len(places))):
            self._copy(out[..., places[0] : places[0] + len(places)], x, y, 0, slice(None))
            return
        part = np.empty((*out.shape[:2], len(samples)), out.dtype)
        self._copy(part, x, y, 0, samples)
        out[..., places] = part

    def _copy(self, out: Pixels, x: int, y: int, base: int, samples: slice | list[int]) -> None:
        if self.plane.stored is not None:
            self._copy_rows(out, x, y, base, samples, self.plane.stored)
            return
        plane, (h, w) = self.plane, out.shape[:2]
        for row in range(y // plane.segment_height, -(-(y + h) // plane.segment_height)):
            top = row * plane.segment_height
            y0, y1 = max(y, top), min(y + h, top + plane.segment_height)
            for col in range(x // plane.segment_width, -(-(x + w) // plane.segment_width)):
                left = col * plane.segment_width
                x0, x1 = max(x, left), min(x + w, left + plane.segment_width)
                target = out[y0 - y : y1 - y, x0 - x : x1 - x]
                partly = y1 - y0 < min(plane.segment_height, plane.height - top) or (
                    x1 - x0 < min(plane.segment_width, plane.width - left)
                )
                segment = self._segment(base + row * plane.across + col, left, top, keep=partly)
                if segment is None:
                    target[...] = self.fill
                    continue
                part = segment[y0 - top : y1 - top, x0 - left : x1 - left]
                if part.shape[:2] != target.shape[:2]:
                    raise self._error(f"the tile ends early, at {segment.shape[1]} x {segment.shape[0]} px", left, top)
                target[...] = part if isinstance(samples, slice) else part[..., samples]

    def _segment(self, index: int, left: int, top: int, *, keep: bool) -> NDArray[Any] | None:
        """A decoded tile or strip (rows, columns, bands); None where the file leaves it out.

        It is kept for the next window if this one needs only a part of it.
        """
        plane = self.plane
        offset, count = int(plane.offsets[index]), int(plane.counts[index])
        if not offset or not count:
            return None
        key = (*self.key, index)
        segment = SEGMENTS.get(key)
        if segment is not None:
            return segment
        try:
            segment = plane.decode(self.image._file.read(offset, count), index)
        except ImageError as error:
            raise self._error(error.cause, left, top) from error
        except Exception as error:  # codecs raise whatever they like, MemoryError included
            raise self._error(f"{type(error).__name__}: {error}", left, top) from error
        if keep and plane.compression != NONE:
            SEGMENTS.put(key, segment)
        return segment

    def _copy_rows(
        self, out: Pixels, x: int, y: int, base: int, samples: slice | list[int], stored: np.dtype[Any]
    ) -> None:
        """Uncompressed strips: only the bytes of the window are read, straight into place where the layout allows."""
        plane, (h, w) = self.plane, out.shape[:2]
        direct = isinstance(samples, slice) and stored == out.dtype and out.flags.c_contiguous
        part = out if direct else np.empty((h, w, plane.together), stored)
        pixel = plane.together * stored.itemsize
        view = memoryview(part.reshape(-1).view(np.uint8).data)
        for strip in range(y // plane.segment_height, -(-(y + h) // plane.segment_height)):
            top = strip * plane.segment_height
            y0, y1 = max(y, top), min(y + h, top + plane.segment_height)
            start = int(plane.offsets[base + strip])
            if not start or not plane.counts[base + strip]:
                part[y0 - y : y1 - y] = self.fill
                continue
            start += ((y0 - top) * plane.width + x) * pixel
            try:
                self._read_rows(
                    view[(y0 - y) * w * pixel : (y1 - y) * w * pixel], start, w * pixel, plane.width * pixel
                )
            except ImageError as error:
                raise self._error(error.cause, x, y0) from error
            except OSError as error:
                raise self._error(f"cannot be read: {error.strerror or error}", x, y0) from error
        if not direct:
            out[...] = part if isinstance(samples, slice) else part[..., samples]

    def _read_rows(self, view: memoryview, start: int, length: int, stride: int) -> None:
        """Rows of `length` bytes that lie `stride` bytes apart in the file, into a view without gaps."""
        file, rows = self.image._file, len(view) // length
        if length == stride or rows == 1:
            file.read_into(view, start)
        elif stride - length <= _WASTE:
            block = np.frombuffer(file.read(start, (rows - 1) * stride + length), np.uint8)
            spaced = np.lib.stride_tricks.as_strided(block, (rows, length), (stride, 1), writeable=False)
            np.asarray(view).reshape(rows, length)[...] = spaced
        else:
            for row in range(rows):
                file.read_into(view[row * length : (row + 1) * length], start + row * stride)

    def _error(self, cause: str, left: int, top: int) -> ImageError:
        plane = self.plane
        kind = "strip" if plane.segment_width == plane.width else "tile"
        place = f"{self.place}, {kind} at x {left}, y {top}, {plane.segment_width} x {plane.segment_height} px"
        return ImageError(self.image.name, cause, place)
