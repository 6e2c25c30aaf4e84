"""Windows of a TIFF's planes: the tiles and strips that they touch, fetched with few reads, decoded, put into place."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gigaxt.errors import ImageError
from gigaxt.image.base import Pixels
from gigaxt.image.cache import FETCHED, SEGMENTS, Fetched
from gigaxt.image.files import File
from gigaxt.image.ranges import runs, span
from gigaxt.image.tiff_index import NONE, Plane

_WASTE = 16 << 10  # bytes of a row read for nothing before a read call for each row is cheaper
MOST_AHEAD = 4 << 20
"""Bytes that one announcement fetches at most, of compressed tiles: 8 regions of 1,024 px in JPEG."""

Bands = slice | list[int]


class Piece(NamedTuple):
    """The part of one tile or strip ("segment") that a window needs."""

    reader: PlaneReader
    number: int
    """Of the segment, in its plane."""
    key: Hashable
    """What the stores know the segment by."""
    extent: tuple[int, int]
    """Its (offset, count) in the file; either is 0 where the file leaves it out."""
    left: int
    """Of the segment, px of the plane."""
    top: int
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
        self.target[..., self.place] = self.reader.fill

    def copy(self, segment: NDArray[Any]) -> None:
        """Put its part of the decoded segment (rows, columns, bands) into place."""
        part = segment[self.part]
        if part.shape[:2] != self.target.shape[:2]:
            size = f"{segment.shape[1]} x {segment.shape[0]} px"
            raise self.reader.error(f"the tile ends early, at {size}", self.left, self.top)
        self.target[..., self.place] = part[..., self.samples]

    def decode(self, file: File, data: bytes | None, *, shared: bool = False) -> NDArray[Any]:
        """The whole segment from its bytes, which are read here where they are None.

        It is kept for the next window if this one needs only a part of it, or it is known to be `shared`.
        """
        plane = self.reader.plane
        try:
            segment = plane.decode(file.read(*self.extent) if data is None else data, self.number)
        except ImageError as error:
            raise self.reader.error(error.cause, self.left, self.top) from error
        except Exception as error:  # codecs raise whatever they like, MemoryError included
            raise self.reader.error(f"{type(error).__name__}: {error}", self.left, self.top) from error
        if shared or (self.partly and plane.compression != NONE):
            SEGMENTS.put(self.key, segment)
        return segment


def fill_pieces(file: File, pieces: Sequence[Piece]) -> None:
    """Put all pieces into place. What is not at hand is read in runs of neighbours and decoded one by one.

    Raises:
        ImageError: a segment cannot be read or decoded; names it.
    """
    missing: list[Piece] = []
    for piece in pieces:
        if 0 in piece.extent:
            piece.fill()
            continue
        segment = SEGMENTS.get(piece.key)
        if segment is not None:
            piece.copy(segment)
            continue
        fetched = FETCHED.take(piece.key)
        if fetched is not None:
            piece.copy(piece.decode(file, fetched.data, shared=fetched.shared))
        else:
            missing.append(piece)
    for piece, data in _read_runs(file, missing):
        piece.copy(piece.decode(file, data))


def whole_segment(file: File, piece: Piece) -> NDArray[Any] | None:
    """A window that is one segment, as it is decoded; None: there is more to do than that.

    Saves the copy, which takes a third as long as decoding a JPEG tile.
    """
    if 0 in piece.extent or piece.partly or piece.samples != slice(None) or SEGMENTS.has(piece.key):
        return None
    fetched = FETCHED.take(piece.key)
    if fetched is not None and fetched.shared:  # kept for others, who must not see it change
        FETCHED.put(piece.key, fetched)
        return None
    segment = piece.decode(file, None if fetched is None else fetched.data)
    if segment.shape == piece.target.shape and segment.flags.writeable and segment.flags.c_contiguous:
        return segment
    piece.copy(segment)  # of a tile that ends beyond the image
    return piece.target


def fetch_ahead(file: File, pieces: Sequence[Piece]) -> None:
    """Read what several windows need in runs of neighbours, up to `MOST_AHEAD` bytes; it is decoded when it is used."""
    wanted: dict[Hashable, Piece] = {}
    shared: set[Hashable] = set()
    left = MOST_AHEAD
    for piece in pieces:
        if piece.key in wanted:
            shared.add(piece.key)
        elif 0 not in piece.extent and not SEGMENTS.has(piece.key) and not FETCHED.has(piece.key):
            left -= piece.extent[1]
            if left >= 0:
                wanted[piece.key] = piece
    if len(wanted) < 2 and not shared:
        return
    for piece, data in _read_runs(file, list(wanted.values())):
        if data is not None:
            FETCHED.put(piece.key, Fetched(data, piece.key in shared))


def _read_runs(file: File, pieces: Sequence[Piece]) -> Iterator[tuple[Piece, bytes | None]]:
    """Each piece with its bytes, in the order of the file; None: the read failed, and a read of its own shall tell."""
    parts = [piece.extent for piece in pieces]
    for run in runs(parts):
        start, count = span(parts, run)
        try:
            block = file.read(start, count)
        except (ImageError, OSError):
            yield from ((pieces[index], None) for index in run)
            continue
        for index in run:
            offset, size = parts[index]
            yield pieces[index], block if size == count else block[offset - start : offset - start + size]


class PlaneReader:
    """One plane of an image, for windows.

    Args:
        file: that it is in.
        plane: what to read.
        key: tells its segments from all others.
        place: what errors call it.
        fill: the value of pixels that the file leaves out.
    """

    def __init__(self, file: File, plane: Plane, key: tuple[int, int, int], place: str, fill: float) -> None:
        self.file, self.plane, self.key, self.place, self.fill = file, plane, key, place, fill

    def pieces(self, out: Pixels, wanted: Sequence[tuple[int, int]], x: int, y: int) -> Iterator[Piece]:
        """What to fill of bands of `out` (h, w, bands), its corner at (x, y); `wanted` pairs them with the plane's."""
        if self.plane.planar:
            per_band = self.plane.across * self.plane.down
            for at, sample in wanted:
                yield from self._pieces(out, slice(at, at + 1), slice(None), x, y, sample * per_band)
            return
        yield from self._pieces(out, *self._bands(wanted), x, y, 0)

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

    def _pieces(self, out: Pixels, place: Bands, samples: Bands, x: int, y: int, base: int) -> Iterator[Piece]:
        plane, (h, w) = self.plane, out.shape[:2]
        for row in range(y // plane.segment_height, -(-(y + h) // plane.segment_height)):
            top = row * plane.segment_height
            y0, y1 = max(y, top), min(y + h, top + plane.segment_height)
            for col in range(x // plane.segment_width, -(-(x + w) // plane.segment_width)):
                left = col * plane.segment_width
                x0, x1 = max(x, left), min(x + w, left + plane.segment_width)
                partly = y1 - y0 < min(plane.segment_height, plane.height - top) or (
                    x1 - x0 < min(plane.segment_width, plane.width - left)
                )
                index = base + row * plane.across + col
                yield Piece(
                    self,
                    index,
                    (*self.key, index),
                    (int(plane.offsets[index]), int(plane.counts[index])),
                    left,
                    top,
                    out[y0 - y : y1 - y, x0 - x : x1 - x],
                    place,
                    (slice(y0 - top, y1 - top), slice(x0 - left, x1 - left)),
                    samples,
                    partly,
                )

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
