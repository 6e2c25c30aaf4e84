"""A JPEG of any size (the format ends at 65,535 px a side) as bands of rows.

libjpeg-turbo through imagecodecs notices damaged data, but decodes the whole picture at once: used where that fits.
GDAL through rasterio decodes row by row in little memory; damage inside the data passes it unnoticed (a hole of wrong
colours), only a truncated file is an error. Progressive files need all their coefficients in memory, in any library.
"""

from __future__ import annotations

import importlib.util
import struct
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import imagecodecs
import numpy as np

from gigaxt.amounts import GIB
from gigaxt.errors import ImageError
from gigaxt.image.base import Pixels
from gigaxt.image.rows import Rows, copying_bytes, exif_orientation


@dataclass(frozen=True)
class _Header:
    width: int
    height: int
    samples: int
    coefficient_bytes: int
    """What libjpeg holds of a progressive picture, two bytes each; 0 for others."""
    orientation: int
    end: int
    """Where the frame header ends in the file."""

    @property
    def decoded_bytes(self) -> int:
        return self.width * self.height * self.samples


def jpeg_rows(path: Path, tile: int, budget_bytes: int) -> Rows:
    """The JPEG at `path` as `Rows`.

    Args:
        path: the file.
        tile: px on a side of the tiles that the rows will become.
        budget_bytes: memory for decoding and copying; where the whole picture fits, the careful decoder is used.

    Raises:
        ImageError: not a JPEG of 1 or 3 bands of 8 bits; damaged; too large for `budget_bytes` without rasterio, or a
            progressive one with it.
    """
    header = _read_header(path)
    budget_bytes = max(0, budget_bytes - copying_bytes(header.width, header.samples, np.dtype(np.uint8), tile))
    whole = header.decoded_bytes + header.coefficient_bytes + path.stat().st_size <= budget_bytes
    if not whole:
        _check_frugal(path, header, budget_bytes)
    return Rows(
        name=str(path),
        height=header.height,
        width=header.width,
        channels=header.samples,
        dtype=np.dtype(np.uint8),
        bands=lambda n: _bands_of_whole(path, header, n) if whole else _bands_by_gdal(path, header, n),
        orientation=header.orientation,
    )


def _check_frugal(path: Path, header: _Header, budget_bytes: int) -> None:
    if importlib.util.find_spec("rasterio") is None:
        needed = (header.decoded_bytes + header.coefficient_bytes) / GIB
        cause = (
            f"decodes to {needed:.1f} GiB, more than the {budget_bytes / GIB:.1f} GiB allowed: allow that much memory,"
            " or pip install 'gigaxt[geo]', which decodes row by row"
        )
        raise ImageError(path, cause)
    if header.coefficient_bytes > budget_bytes:
        cause = (
            f"a progressive JPEG, whose coefficients need {header.coefficient_bytes / GIB:.1f} GiB of memory, more than"
            f" the {budget_bytes / GIB:.1f} GiB allowed: allow that, or make it a baseline JPEG first (jpegtran)"
        )
        raise ImageError(path, cause)


def _bands_of_whole(path: Path, header: _Header, n: int) -> Iterator[Pixels]:
    data = path.read_bytes()
    if data.rfind(b"\xff\xd9", header.end) < 0:  # libjpeg would go on with gray
        raise ImageError(path, "truncated: the JPEG data have no end marker")
    try:
        pixels = imagecodecs.jpeg8_decode(data)
    except imagecodecs.Jpeg8Error as error:
        raise ImageError(path, f"damaged JPEG data ({error})") from error
    pixels = pixels.reshape(header.height, header.width, header.samples)  # gray comes as (h, w)
    for y in range(0, header.height, n):
        yield pixels[y : y + n]


def _bands_by_gdal(path: Path, header: _Header, n: int) -> Iterator[Pixels]:
    import rasterio
    from rasterio.windows import Window

    def settings() -> rasterio.Env:  # entered anew for each read: it must not stay in force while the caller works
        return rasterio.Env(
            GDAL_CACHEMAX=64,  # MB; the default is a share of all memory
            GDAL_DISABLE_READDIR_ON_OPEN="EMPTY_DIR",
            GDAL_ERROR_ON_LIBJPEG_WARNING=True,  # a truncated file is an error, not gray rows
            GDAL_ALLOW_LARGE_LIBJPEG_MEM_ALLOC=True,  # coefficients of progressive files: checked by the caller,
            JPEGMEM=f"{header.coefficient_bytes // 10**6 + 64}M",  # and limited to that once more
        )

    y, file = 0, None
    try:
        with settings(), warnings.catch_warnings():
            warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
            file = rasterio.open(path, driver="JPEG", sharing=False)
        for y in range(0, header.height, n):
            with settings():
                pixels = file.read(window=Window(0, y, header.width, min(n, header.height - y)))
            yield np.ascontiguousarray(np.moveaxis(pixels, 0, 2))  # (samples, rows, width) -> (rows, width, samples)
    except rasterio.errors.RasterioError as error:
        raise ImageError(path, f"damaged JPEG data ({error.__cause__ or error})", f"from row {y}") from error
    finally:
        if file is not None:
            file.close()


def _read_header(path: Path) -> _Header:
    """Walk the segments up to the start of frame."""
    orientation = 1
    with path.open("rb") as file:
        if file.read(2) != b"\xff\xd8":
            raise ImageError(path, "expected a JPEG file, got other first bytes")
        while True:
            marker, length = _segment(file, path)
            if marker == 0xE1:
                data = file.read(length)
                if data.startswith(b"Exif\0\0"):
                    orientation = exif_orientation(data[6:])
            elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
                return _frame(file, marker, orientation, path)
            else:
                file.seek(length, 1)


def _segment(file: BinaryIO, path: Path) -> tuple[int, int]:
    """The next marker and the bytes that follow its length."""
    start = file.read(1)
    marker = file.read(1)
    while marker == b"\xff":  # fill bytes
        marker = file.read(1)
    length = file.read(2)
    if start != b"\xff" or len(length) < 2 or marker in (b"\0", b"\xd9", b"\xda") or int.from_bytes(length) < 2:
        raise ImageError(path, "damaged or truncated: no JPEG frame header was found")
    return marker[0], int.from_bytes(length) - 2


def _frame(file: BinaryIO, marker: int, orientation: int, path: Path) -> _Header:
    data = file.read(6)
    if len(data) < 6:
        raise ImageError(path, "truncated: the file ends inside the JPEG frame header")
    bits, height, width, samples = struct.unpack(">BHHB", data)
    if bits != 8 or samples not in (1, 3) or not height or not width:
        cause = f"expected a JPEG of 1 or 3 bands of 8 bits, got {samples} of {bits} ({width} x {height} px)"
        raise ImageError(path, f"{cause}: convert its colours first" if samples == 4 else cause)
    sampling = file.read(3 * samples)[1::3]  # per band: horizontal factor in the upper four bits, vertical in the lower
    factors = [max(1, (byte >> 4) * (byte & 15)) for byte in sampling] or [1]
    coefficients = width * height * sum(factors) // max(factors)
    progressive = marker in (0xC2, 0xC6, 0xCA, 0xCE)
    return _Header(width, height, samples, 2 * coefficients if progressive else 0, orientation, file.tell())
