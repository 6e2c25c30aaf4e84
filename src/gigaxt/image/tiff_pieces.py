"""Windows of a TIFF's planes: the tiles and strips that they touch, fetched with few reads, decoded, put into place."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gigaxt.errors import ImageError
from gigaxt.image.base import Pixels, Window, copy_pixels
from gigaxt.image.cache import FETCHED, SEGMENTS, Fetched
from gigaxt.image.files import File
from gigaxt.image.ranges import runs, span
from gigaxt.image.tiff_index import NONE, Plane

_WASTE = 16 << 10  # bytes of a row read for nothing before a read call for each row is cheaper
MOST_AHEAD = 4 << 20
"""Bytes that one announcement fetches at most, of compressed tiles: 8 regions of 1,024 px in JPEG."""

Bands = slice | list[int]


class Segment(NamedTuple):
    """One tile or strip of a plane."""

    reader: PlaneReader
    number: int
    """In its plane."""
    key: Hashable
    """What the stores know it by."""

    @property
    def extent(self) -> tuple[int, int]:
        """Its (offset, count) in the file; either is 0 where the file leaves it out."""
        plane = self.reader.plane
        return int(plane.offsets[self.number]), int(plane.counts[self.number])

    def decode(self, file: File, data: bytes | None, *, keep: bool) -> NDArray[Any]:
        """All of it (rows, columns, bands) from its bytes, which are read here where they are None.

        Args:
            file: that it is in.
            data: as they are in the file.
            keep: for the windows to come.
        """
        plane = self.reader.plane
        try:
            pixels = plane.decode(file.read(*self.extent) if data is None else data, self.number)
        except ImageError as error:
            raise self.error(error.cause) from error
        except Exception as error:  # codecs raise whatever they like, MemoryError included
            raise self.error(f"{type(error).__name__}: {error}") from error
        if keep:
            SEGMENTS.put(self.key, pixels)
        return pixels

    def error(self, cause: str) -> ImageError:
        """An error about it."""
        plane = self.reader.plane
        row, col = divmod(self.number % (plane.across * plane.down), plane.across)
        return self.reader.error(cause, col * plane.segment_width, row * plane.segment_height)


class Piece(NamedTuple):
    """The part of a segment that a window needs."""

    segment: Segment
    target: Pixels
    """Where it goes: a view of the window."""
    place: Bands
    """The target's bands that are filled."""
    part: tuple[slice, slice]
    """Rows and columns of the segment."""
    samples: Bands
    """The segment's bands that are taken."""
    partly: bool
    """Whether the next window may need the rest of it."""

    def fill(self) -> None:
        """The file leaves the segment out."""
        self.target[..., self.place] = self.segment.reader.fill

    def copy(self, decoded: NDArray[Any]) -> None:
        """Put its part of the decoded segment (rows, columns, bands) into place."""
        part = decoded[self.part]
        if part.shape[:2] != self.target.shape[:2]:
            raise self.segment.error(f"the tile ends early, at {decoded.shape[1]} x {decoded.shape[0]} px")
        if isinstance(self.place, slice):
            copy_pixels(self.target[..., self.place], part[..., self.samples])
        else:
            self.target[..., self.place] = part[..., self.samples]

    @property
    def worth_keeping(self) -> bool:
        """Whether the segment should stay for the next window, which may need the rest of it."""
        return self.partly and self.segment.reader.plane.compression != NONE


def fill_pieces(file: File, pieces: Sequence[Piece]) -> None:
    """Put all pieces into place. What is not at hand is read in runs of neighbours, and each segment decoded once.

    Raises:
        ImageError: a segment cannot be read or decoded; names it.
    """
    wanted: dict[Hashable, list[Piece]] = {}
    for piece in pieces:
        wanted.setdefault(piece.segment.key, []).append(piece)
    missing: dict[Segment, tuple[int, int]] = {}
    for key, parts in wanted.items():
        segment = parts[0].segment
        extent = segment.extent
        if 0 in extent:
            for piece in parts:
                piece.fill()
        elif (decoded := SEGMENTS.get(key)) is not None:
            _copy_all(parts, decoded)
        elif (fetched := FETCHED.take(key)) is not None:
            _decode_all(file, parts, fetched.data, shared=fetched.shared)
        else:
            missing[segment] = extent
    for segment, data in _read_runs(file, missing):
        _decode_all(file, wanted[segment.key], data)


def _decode_all(file: File, pieces: Sequence[Piece], data: bytes | None, *, shared: bool = False) -> None:
    """Put pieces of one segment into place; it is kept if it is `shared` with other windows or a window may follow."""
    keep = shared or any(piece.worth_keeping for piece in pieces)
    _copy_all(pieces, pieces[0].segment.decode(file, data, keep=keep))


def _copy_all(pieces: Sequence[Piece], decoded: NDArray[Any]) -> None:
    for piece in pieces:
        piece.copy(decoded)


def whole_segment(file: File, piece: Piece) -> NDArray[Any] | None:
    """A window that is one segment, as it is decoded; None: there is more to do than that.

    Saves the copy, which takes a third as long as decoding a JPEG tile.
    """
    segment = piece.segment
    if 0 in segment.extent or piece.partly or piece.samples != slice(None) or SEGMENTS.has(segment.key):
        return None
    fetched = FETCHED.take(segment.key)
    if fetched is not None and fetched.shared:  # kept for others, who must not see it change
        FETCHED.put(segment.key, fetched)
        return None
    decoded = segment.decode(file, None if fetched is None else fetched.data, keep=False)
    if decoded.shape == piece.target.shape and decoded.flags.writeable and decoded.flags.c_contiguous:
        return decoded
    piece.copy(decoded)  # of a tile that ends beyond the image
    return piece.target


def fetch_ahead(file: File, segments: Sequence[Segment]) -> None:
    """Read what several windows need in runs of neighbours, up to `MOST_AHEAD` bytes; it is decoded when it is used.

    Args:
        file: that they are in.
        segments: those of each window, one window after the other.
    """
    wanted: dict[Segment, tuple[int, int]] = {}
    shared: set[Segment] = set()
    left = MOST_AHEAD
    for segment in segments:
        if segment in wanted:
            shared.add(segment)
            continue
        extent = segment.extent
        if 0 not in extent and not SEGMENTS.has(segment.key) and not FETCHED.has(segment.key):
            left -= extent[1]
            if left >= 0:
                wanted[segment] = extent
    if len(wanted) < 2 and not shared:
        return
    for segment, data in _read_runs(file, wanted):
        if data is not None:
            FETCHED.put(segment.key, Fetched(data, segment in shared))


def _read_runs(file: File, extents: Mapping[Segment, tuple[int, int]]) -> Iterator[tuple[Segment, bytes | None]]:
    """Each segment with its bytes, in the order of the file; None if the run could not be read: then read it alone."""
    segments, parts = list(extents), list(extents.values())
    for run in runs(parts):
        start, count = span(parts, run)
        try:
            block = file.read(start, count)
        except (ImageError, OSError):
            yield from ((segments[index], None) for index in run)
            continue
        for index in run:
            offset, size = parts[index]
            yield segments[index], block if size == count else block[offset - start : offset - start + size]


class _Cut(NamedTuple):
    """Where a window and a segment overlap along one axis."""

    number: int
    """Of the row or column of segments."""
    target: slice
    """Px of the window."""
    part: slice
    """Px of the segment."""
    partly: bool
    """Whether more of the segment lies in the image."""


def _touched(start: int, length: int, segment: int) -> range:
    """The rows or columns of segments of `segment` px that `length` px from `start` on touch."""
    return range(start // segment, -(-(start + length) // segment))


class _Cuts(dict[tuple[int, int, int, int], list[_Cut]]):
    """Of `length` px from `start` on, by segments of `segment` px along an axis of `size` px: by these four numbers.

    Made when they are first asked for, as the regions of a lattice share their rows and columns.
    """

    def __missing__(self, key: tuple[int, int, int, int]) -> list[_Cut]:
        start, length, segment, size = key
        found = self[key] = []
        for number in _touched(start, length, segment):
            first = number * segment
            low, high = max(start, first), min(start + length, first + segment)
            partly = high - low < min(segment, size - first)
            found.append(_Cut(number, slice(low - start, high - start), slice(low - first, high - first), partly))
        return found


class PlaneReader:
    """One plane of an image, for windows.

    Args:
        file: that it is in.
        plane: what to read.
        key: identifies the plane, and so its segments in the stores.
        place: what errors call it.
        fill: the value of pixels that the file leaves out.
    """

    def __init__(self, file: File, plane: Plane, key: tuple[int, int, int], place: str, fill: float) -> None:
        self.file, self.plane, self.key, self.place = file, plane, key, place
        self._across = plane.across
        self.fill = np.full((), fill, plane.dtype)  # as the file would store it, whatever it is put into

    def pieces(
        self, out: Sequence[Pixels], windows: Sequence[Window], wanted: Sequence[tuple[int, int]]
    ) -> list[Piece]:
        """What to fill of bands of `out` (h, w, bands), one for each window; `wanted` pairs them with the plane's."""
        plane, cuts = self.plane, _Cuts()
        found = []
        for place, samples, base in self._places(wanted):
            for target, (x, y, w, h) in zip(out, windows, strict=True):
                cols = cuts[x, w, plane.segment_width, plane.width]
                for row in cuts[y, h, plane.segment_height, plane.height]:
                    first = base + row.number * self._across
                    for col in cols:
                        segment = self._segment(first + col.number)
                        part, partly = (row.part, col.part), row.partly or col.partly
                        found.append(Piece(segment, target[row.target, col.target], place, part, samples, partly))
        return found

    def segments(self, window: Window, wanted: Sequence[tuple[int, int]]) -> list[Segment]:
        """Those that `pieces` of a window lie in."""
        x, y, w, h = window
        rows, cols = _touched(y, h, self.plane.segment_height), _touched(x, w, self.plane.segment_width)
        return [
            self._segment(base + row * self._across + col)
            for _, _, base in self._places(wanted)
            for row in rows
            for col in cols
        ]

    def read_rows(self, out: Pixels, wanted: Sequence[tuple[int, int]], x: int, y: int) -> None:
        """Fill bands of `out` as `pieces` does, at once, from strips that need no decoding."""
        if self.plane.planar:
            per_band = self.plane.down
            for at, sample in wanted:
                self._copy_rows(out[..., at : at + 1], x, y, sample * per_band, slice(None))
            return
        places, samples = self._bands(wanted)
        if isinstance(places, slice):
            self._copy_rows(out[..., places], x, y, 0, samples)
            return
        part = np.empty((*out.shape[:2], len(places)), out.dtype)
        self._copy_rows(part, x, y, 0, samples)
        out[..., places] = part

    def _bands(self, wanted: Sequence[tuple[int, int]]) -> tuple[Bands, Bands]:
        """Bands of the window and of the segment, as slices where the plane is taken as it is."""
        places, samples = [at for at, _ in wanted], [sample for _, sample in wanted]
        if samples == list(range(self.plane.samples)) and places == list(range(places[0], places[0] + len(places))):
            return slice(places[0], places[0] + len(places)), slice(None)
        return places, samples

    def _places(self, wanted: Sequence[tuple[int, int]]) -> list[tuple[Bands, Bands, int]]:
        """Bands of the window, of the segment, and the first segment of those that hold them."""
        if not self.plane.planar:
            return [(*self._bands(wanted), 0)]
        per_band = self._across * self.plane.down
        return [(slice(at, at + 1), slice(None), sample * per_band) for at, sample in wanted]

    def _segment(self, number: int) -> Segment:
        return Segment(self, number, (*self.key, number))

    def _copy_rows(self, out: Pixels, x: int, y: int, base: int, samples: Bands) -> None:
        """Uncompressed strips: only the bytes of the window are read, straight into place where the layout allows."""
        plane, (h, w) = self.plane, out.shape[:2]
        stored = plane.stored
        assert stored is not None
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
                raise self.error(error.cause, x, y0) from error
            except OSError as error:
                raise self.error(f"cannot be read: {error.strerror or error}", x, y0) from error
        if not direct:
            out[...] = part if isinstance(samples, slice) else part[..., samples]

    def _read_rows(self, view: memoryview, start: int, length: int, stride: int) -> None:
        """Rows of `length` bytes that lie `stride` bytes apart in the file, into a view without gaps."""
        file, rows = self.file, len(view) // length
        if length == stride or rows == 1:
            file.read_into(view, start)
        elif stride - length <= _WASTE:
            block = np.frombuffer(file.read(start, (rows - 1) * stride + length), np.uint8)
            spaced = np.lib.stride_tricks.as_strided(block, (rows, length), (stride, 1), writeable=False)
            np.asarray(view).reshape(rows, length)[...] = spaced
        else:
            for row in range(rows):
                file.read_into(view[row * length : (row + 1) * length], start + row * stride)

    def error(self, cause: str, left: int, top: int) -> ImageError:
        """An error about the segment at a place."""
        plane = self.plane
        kind = "strip" if plane.segment_width == plane.width else "tile"
        place = f"{self.place}, {kind} at x {left}, y {top}, {plane.segment_width} x {plane.segment_height} px"
        return ImageError(self.file.path, cause, place)
