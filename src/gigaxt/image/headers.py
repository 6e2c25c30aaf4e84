"""What the first bytes say: the kind of a file, and how large a coded picture claims to be before anyone decodes it."""

from __future__ import annotations

import struct
from typing import NamedTuple

PNG, JPEG, JP2, CODESTREAM = (
    b"\x89PNG\r\n\x1a\n",
    b"\xff\xd8\xff",
    b"\x00\x00\x00\x0cjP  \r\n\x87\n",
    b"\xff\x4f\xff\x51",
)

_MAGIC: tuple[tuple[int, bytes, str], ...] = (
    # offset, bytes, kind
    (0, b"II\x2a\x00", "tiff"),
    (0, b"MM\x00\x2a", "tiff"),
    (0, b"II\x2b\x00", "tiff"),
    (0, b"MM\x00\x2b", "tiff"),
    (0, PNG, "png"),
    (0, JPEG, "jpeg"),
    (0, JP2, "jp2"),
    (0, CODESTREAM, "jp2"),
    (0, b"NITF0", "nitf"),
    (0, b"NSIF0", "nitf"),
    (0, b"EHFA_HEADER_TAG", "hfa"),
    (0, b"PCIDSK", "pcidsk"),
    (128, b"DICM", "dicom"),
    (0, b"ZISRAWFILE", "czi"),
    (0, b"\x89HDF\r\n\x1a\n", "hdf5"),
    (0, b"SQLite format 3\x00", "sqlite"),
    (0, b"[Virtual Microscope Specimen]", "vms"),
    (0, b"[Uncompressed Virtual Microscope Specimen]", "vms"),
)
HEAD = 160
"""Bytes that `kind_of` needs."""


def kind_of(head: bytes) -> str | None:
    """Which format a file with these first bytes is, e.g. "tiff" or "png"; None where the bytes say nothing."""
    for offset, magic, kind in _MAGIC:
        if head.startswith(magic, offset):
            return kind
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return "webp"
    if head.startswith(b"BM") and len(head) >= 26 and head[6:10] == bytes(4):
        return "bmp"
    return None


class CodedSize(NamedTuple):
    """What a compressed picture says it decodes to."""

    width: int
    height: int
    samples: int


def coded_size(data: bytes) -> CodedSize | None:
    """Size of a PNG, JPEG, JPEG 2000, WebP, BMP or LERC picture from its header; None if that does not say."""
    try:
        if data.startswith(b"\xff\xd8"):
            return _jpeg(data)
        if data.startswith(PNG):
            width, height, _, colour = struct.unpack(">IIBB", data[16:26])
            return CodedSize(width, height, {0: 1, 2: 3, 3: 3, 4: 2, 6: 4}.get(colour, 4))
        if data.startswith((CODESTREAM, JP2)):
            return _jpeg2000(data)
        if data.startswith(b"RIFF"):
            return _webp(data)
        if data.startswith(b"BM"):
            width, height = struct.unpack("<ii", data[18:26])
            return CodedSize(width, abs(height), 4)
        if data.startswith((b"Lerc2 ", b"CntZImage ")):
            return _lerc(data)
    except (struct.error, IndexError):
        return None
    return None


def png_bits(data: bytes) -> tuple[int, int]:
    """Bits per sample and colour type (3 = palette) of a PNG."""
    return data[24], data[25]


def _jpeg(data: bytes) -> CodedSize | None:
    position, end = 2, len(data)
    while position + 9 < end:
        if data[position] != 0xFF:
            return None
        marker = data[position + 1]
        if marker == 0xFF:  # fill byte
            position += 1
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # start of frame, of any coding
            height, width, samples = struct.unpack_from(">HHB", data, position + 5)
            return CodedSize(width, height, samples)
        elif marker == 0x01 or 0xD0 <= marker <= 0xD8:  # markers without a length
            position += 2
        else:
            position += 2 + int.from_bytes(data[position + 2 : position + 4])
    return None


def _jpeg2000(data: bytes) -> CodedSize | None:
    start = data.find(CODESTREAM)
    if start < 0:
        return None
    x1, y1, x0, y0 = struct.unpack_from(">IIII", data, start + 8)
    (samples,) = struct.unpack_from(">H", data, start + 40)
    return CodedSize(x1 - x0, y1 - y0, samples)


def _webp(data: bytes) -> CodedSize | None:
    chunk = data[12:16]
    if chunk == b"VP8X":
        width, height = (1 + int.from_bytes(data[at : at + 3], "little") for at in (24, 27))
    elif chunk == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        width, height = 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    elif chunk == b"VP8 ":
        width, height = (value & 0x3FFF for value in struct.unpack("<HH", data[26:30]))
    else:
        return None
    return CodedSize(width, height, 4)


def _lerc(data: bytes) -> CodedSize | None:
    if data.startswith(b"CntZImage "):  # version 1: always one band
        height, width = struct.unpack_from("<ii", data, 18)
        return CodedSize(width, height, 1)
    (version,) = struct.unpack_from("<i", data, 6)
    at = 14 if version >= 3 else 10  # a checksum from version 3 on
    height, width = struct.unpack_from("<ii", data, at)
    samples = struct.unpack_from("<i", data, at + 8)[0] if version >= 4 else 1
    return CodedSize(width, height, samples * data.count(b"Lerc2 "))  # bands may follow each other, one blob each
