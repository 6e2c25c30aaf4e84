"""A PNG of any size as bands of rows, in memory of a few rows.

PNG is one zlib stream of rows, each filtered against the row above. So the stream is inflated piece by piece, and each
piece of rows becomes a small PNG of its own, [the last decoded row, unfiltered] + [the rows as they are], which libpng
decodes exactly, whatever the filters. Samples of less than 8 bits are decoded as bytes and taken apart afterwards.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import imagecodecs
import numpy as np
from numpy.typing import NDArray

from gigaxt.errors import ImageError
from gigaxt.image.base import Pixels
from gigaxt.image.headers import PNG
from gigaxt.image.rows import Rows, exif_orientation

_SAMPLES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by colour type: gray, RGB, palette, gray + alpha, RGB + alpha
_DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}
_KEPT = {b"PLTE": 768, b"tRNS": 256, b"eXIf": 1 << 16}  # chunks that are read, and the longest that is believed
_DECODED_BYTES = 8 << 20  # decoded at once: large against one row, small against a row of tiles
_FILE_BYTES = 1 << 20  # read from the file at once


@dataclass
class _Header:
    """What stands before the pixels, and where they begin."""

    width: int
    height: int
    depth: int
    colour: int
    chunks: dict[bytes, bytes] = field(default_factory=dict)
    pixels_at: int = 0

    @property
    def row_bytes(self) -> int:
        return -(-self.width * _SAMPLES[self.colour] * self.depth // 8)


def png_rows(path: Path) -> Rows:
    """The PNG at `path` as `Rows`, with the values of `PillowImage`.

    Samples have 8 or 16 bits; palettes give their indices, 1 bit gives 0 and 1 (both as classes with colours), 2 and 4
    bits are scaled to 0-255.

    Raises:
        ImageError: interlaced, not a PNG, damaged or truncated (the latter two also while reading bands).
    """
    header = _read_header(path)
    levels = 255 // (2**header.depth - 1) if header.colour == 0 and header.depth in (2, 4) else 1
    return Rows(
        name=str(path),
        height=header.height,
        width=header.width,
        channels=_SAMPLES[header.colour],
        dtype=np.dtype(np.uint16 if header.depth == 16 else np.uint8),
        bands=lambda n: _bands(path, header, levels, n),
        nodata=_transparent(header, levels),
        colormap=_palette(header, path),
        alpha=header.colour in (4, 6),
        orientation=exif_orientation(header.chunks[b"eXIf"]) if b"eXIf" in header.chunks else 1,
    )


def _bands(path: Path, header: _Header, levels: int, n: int) -> Iterator[Pixels]:
    """Bands of `n` rows, each decoded in pieces, so that little is held beside the band itself."""
    dtype = np.uint16 if header.depth == 16 else np.uint8
    shape = header.width, _SAMPLES[header.colour]
    piece = max(1, _DECODED_BYTES // (1 + header.row_bytes))
    above = bytes(header.row_bytes)  # the row above the first counts as zeros
    with path.open("rb") as file:
        stream = _PixelStream(file, header.pixels_at, path)
        for y in range(0, header.height, n):
            band = np.empty((min(n, header.height - y), *shape), dtype)
            for start in range(0, len(band), piece):
                number = min(piece, len(band) - start)
                place = f"rows {y + start} to {y + start + number - 1}"
                filtered = stream.read(number * (1 + header.row_bytes), place)
                rows = _decode(header, above, filtered, number, path, place)
                above = rows[-1].astype(rows.dtype.newbyteorder(">")).tobytes()
                band[start : start + number] = _samples(header, rows, levels)
            yield band
        stream.finish()


def _decode(
    header: _Header, above: bytes, filtered: bytes, number: int, path: Path, place: str
) -> NDArray[np.uint8] | NDArray[np.uint16]:
    """Undo the filters of `number` rows: (number, width[, samples]), or (number, row bytes) for smaller samples."""
    as_bytes = header.depth < 8 or header.colour == 3
    width, depth, colour = (header.row_bytes, 8, 0) if as_bytes else (header.width, header.depth, header.colour)
    small = b"".join(
        (
            PNG,
            _chunk(b"IHDR", struct.pack(">IIBBBBB", width, number + 1, depth, colour, 0, 0, 0)),
            _chunk(b"IDAT", zlib.compress(b"\0" + above + filtered, 0)),
            _chunk(b"IEND", b""),
        )
    )
    try:
        rows: NDArray[np.uint8] | NDArray[np.uint16] = imagecodecs.png_decode(small)
    except imagecodecs.PngError as error:
        raise ImageError(path, f"damaged PNG data ({error})", place) from error
    return rows[1:]


def _samples(header: _Header, rows: NDArray[np.uint8] | NDArray[np.uint16], levels: int) -> Pixels:
    """(number, width, samples) from what `_decode` returns."""
    number = len(rows)
    if header.depth < 8:
        shifts = np.arange(8 - header.depth, -1, -header.depth, dtype=np.uint8)
        parts = (rows[..., None] >> shifts) & np.uint8(2**header.depth - 1)  # (number, row bytes, samples a byte)
        rows = parts.reshape(number, -1)[:, : header.width] * np.uint8(levels)
    return rows.reshape(number, header.width, -1)


class _PixelStream:
    """The inflated bytes of the IDAT chunks, read forwards."""

    def __init__(self, file: BinaryIO, at: int, path: Path) -> None:
        self._path = path
        self._pieces = _pixel_data(file, at, path)
        self._zlib = zlib.decompressobj()

    def read(self, number: int, place: str) -> bytes:
        """The next `number` bytes; `place` is for errors."""
        found: list[bytes] = []
        while number and not self._zlib.eof:
            data = self._inflate(number, place)
            found.append(data)
            number -= len(data)
        if number:
            raise ImageError(self._path, "damaged: the pixel data hold fewer rows than the header says", place)
        return b"".join(found)

    def finish(self) -> None:
        """Verify the checksums that stand behind the last row."""
        while not self._zlib.eof:
            self._inflate(_FILE_BYTES, "after the last row")
        for _ in self._pieces:
            pass

    def _inflate(self, most: int, place: str) -> bytes:
        piece = self._zlib.unconsumed_tail or next(self._pieces, b"")
        try:
            data = self._zlib.decompress(piece, most)
        except zlib.error as error:
            raise ImageError(self._path, f"damaged PNG data ({error})", place) from error
        if not piece and not data:
            raise ImageError(self._path, "truncated: the pixel data end too early", place)
        return data


def _pixel_data(file: BinaryIO, at: int, path: Path) -> Iterator[bytes]:
    """The contents of the IDAT chunks in pieces, each chunk's checksum verified at its end."""
    file.seek(at)
    while True:
        length, kind = _chunk_head(file, path)
        if kind != b"IDAT":
            return
        check = zlib.crc32(kind)
        while length:
            data = file.read(min(length, _FILE_BYTES))
            if not data:
                raise ImageError(path, "truncated: the file ends inside its pixel data")
            check = zlib.crc32(data, check)
            length -= len(data)
            yield data
        _verify(file, check, kind, path)


def _read_header(path: Path) -> _Header:
    with path.open("rb") as file:
        if file.read(8) != PNG:
            raise ImageError(path, "expected a PNG file, got other first bytes")
        length, kind = _chunk_head(file, path)
        if (length, kind) != (13, b"IHDR"):
            raise ImageError(path, "damaged: a PNG starts with its header chunk, this one does not")
        data = _chunk_body(file, length, kind, path)
        width, height, depth, colour, method, filters, interlace = struct.unpack(">IIBBBBB", data)
        if depth not in _DEPTHS.get(colour, ()) or method or filters or not (0 < width < 2**31 and 0 < height < 2**31):
            cause = f"{width} x {height} px, colour type {colour} with {depth} bits: not valid in a PNG header"
            raise ImageError(path, cause)
        if interlace:
            cause = "an interlaced (Adam7) PNG cannot be read row by row: save it without interlacing first"
            raise ImageError(path, cause)
        header = _Header(width, height, depth, colour)
        while True:
            header.pixels_at = file.tell()
            length, kind = _chunk_head(file, path)
            if kind == b"IDAT":
                return header
            if kind == b"IEND":
                raise ImageError(path, "a PNG without pixel data")
            if length <= _KEPT.get(kind, -1):
                header.chunks[kind] = _chunk_body(file, length, kind, path)
            else:
                file.seek(length + 4, 1)


def _chunk_head(file: BinaryIO, path: Path) -> tuple[int, bytes]:
    data = file.read(8)
    if len(data) < 8:
        raise ImageError(path, "truncated: the file ends where a chunk was expected")
    length, kind = struct.unpack(">I4s", data)
    return length, kind


def _chunk_body(file: BinaryIO, length: int, kind: bytes, path: Path) -> bytes:
    data = file.read(length)
    if len(data) < length:
        raise ImageError(path, f"truncated: the file ends inside its {kind.decode()} chunk")
    _verify(file, zlib.crc32(data, zlib.crc32(kind)), kind, path)
    return data


def _verify(file: BinaryIO, check: int, kind: bytes, path: Path) -> None:
    if file.read(4) != check.to_bytes(4):
        raise ImageError(path, f"damaged: the checksum of a {kind.decode()} chunk that ends at {file.tell()} is wrong")


def _chunk(kind: bytes, data: bytes) -> bytes:
    return b"".join((len(data).to_bytes(4), kind, data, zlib.crc32(data, zlib.crc32(kind)).to_bytes(4)))


def _palette(header: _Header, path: Path) -> list[tuple[int, int, int]] | None:
    if header.depth == 1 and header.colour == 0:
        return [(0, 0, 0), (255, 255, 255)]
    if header.colour != 3:
        return None
    data = header.chunks.get(b"PLTE", b"")
    if not data or len(data) % 3:
        raise ImageError(path, f"damaged: a palette PNG with a palette of {len(data)} bytes")
    return [(data[i], data[i + 1], data[i + 2]) for i in range(0, len(data), 3)]


def _transparent(header: _Header, levels: int) -> float | None:
    """The one value that means nothing, where the file names one; several, or half transparent ones, cannot be kept."""
    data = header.chunks.get(b"tRNS", b"")
    if header.colour == 3:
        clear = [i for i, opacity in enumerate(data) if opacity == 0]
        return float(clear[0]) if len(clear) == 1 else None
    if header.colour in (0, 2) and len(data) == 2 * _SAMPLES[header.colour]:
        values = set(struct.unpack(f">{len(data) // 2}H", data))
        return float(values.pop() * levels) if len(values) == 1 else None
    return None
