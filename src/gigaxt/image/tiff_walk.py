"""A first look at a TIFF's directories that trusts nothing, before tifffile or a C library sees the file.

tifffile follows a long loop of directories for ever and openslide ends the process on a tile of 65,520 px, so the chain
is walked here: every offset inside the file, no directory twice, no value larger than the file or `MAX_VALUE_BYTES`.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

from gigaxt.errors import ImageError
from gigaxt.image.files import File

MAX_DIRECTORIES = 1 << 16
MAX_ENTRIES = 4096
MAX_VALUE_BYTES = 32 << 20
"""Of one tag: 4 million tile offsets of 8 bytes, i.e. 64 px tiles over the largest image that is opened by default."""

_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
_FORMATS = {1: "B", 3: "H", 4: "I", 13: "I", 16: "Q", 18: "Q"}  # unsigned integers and offsets
_STRUCTURE = frozenset((256, 257, 258, 259, 273, 277, 278, 279, 284, 317, 322, 323, 324, 325, 330, 338, 339, 347))
_NDPI = 65420


@dataclass
class Directory:
    """One image file directory: where it is and its integers that matter before anything is decoded."""

    offset: int
    values: dict[int, tuple[int, ...]] = field(default_factory=dict)
    """Tag code to values, for the tags in `_WANTED`."""
    following: int = 0
    """Offset of the next directory of the chain, 0 at the end."""

    @property
    def subdirectories(self) -> tuple[int, ...]:
        """Offsets of the SubIFDs: lower levels in OME-TIFF."""
        return tuple(offset for offset in self.values.get(330, ()) if offset)

    def first(self, code: int, default: int = 0) -> int:
        """The first value of a tag."""
        return self.values.get(code, (default,))[0]


_WANTED = frozenset((254, 256, 257, 322, 323, 330, _NDPI))


class Walk:
    """The directories of a TIFF file, read one by one with every check.

    Args:
        file: the file.
        max_tile_bytes: a tile may have at most this many pixels (their bytes are checked later).

    Raises:
        ImageError: no TIFF, truncated, a loop, a value outside the file, an absurd tile size.
    """

    def __init__(self, file: File, max_tile_bytes: int) -> None:
        self.file, self.max_tile_bytes = file, max_tile_bytes
        if file.size < 16:
            raise self.error(f"expected a TIFF file, got {file.size} bytes")
        head = file.read(0, 16)
        self.order = {b"II": "<", b"MM": ">"}.get(head[:2], "")
        version = struct.unpack(self.order + "H", head[2:4])[0] if self.order else 0
        if version not in (42, 43):
            raise self.error(f"expected a TIFF file, got one that starts with {head[:4]!r}")
        self.big = version == 43
        if self.big and struct.unpack(self.order + "HH", head[4:8]) != (8, 0):
            raise self.error("expected 8-byte offsets in the BigTIFF header")
        self.start = int(
            struct.unpack(self.order + ("Q" if self.big else "I"), head[8:16] if self.big else head[4:8])[0]
        )
        self.is_ndpi = self._find_ndpi(int(struct.unpack("<Q", head[4:12])[0]))

    def error(self, cause: str) -> ImageError:
        """An `ImageError` about this file."""
        return ImageError(self.file.path, cause)

    def chain(self) -> list[Directory]:
        """The main chain of directories, at least one."""
        found: list[Directory] = []
        seen: set[int] = set()
        offset = self.start
        while offset:
            if offset in seen:
                raise self.error(f"directory {len(found) - 1} leads back to an earlier one: the file is corrupt")
            if len(found) >= MAX_DIRECTORIES:
                raise self.error(f"expected at most {MAX_DIRECTORIES} directories")
            seen.add(offset)
            found.append(self.directory(offset))
            offset = found[-1].following
        if not found:
            raise self.error("no image in the file: it has no directory (was it cut off while being written?)")
        return found

    def directory(self, offset: int) -> Directory:
        """Read and check the directory at `offset`."""
        number_size, entry_size, next_size = (8, 20, 8) if self.big else (2, 12, 4)
        if not 8 <= offset <= self.file.size - number_size:
            raise self.error(f"expected a directory at byte {offset}, the file has {self.file.size}: it is truncated")
        (count,) = struct.unpack(self.order + ("Q" if self.big else "H"), self.file.read(offset, number_size))
        if not 1 <= count <= MAX_ENTRIES:
            raise self.error(f"expected 1 to {MAX_ENTRIES} tags in the directory at byte {offset}, got {count}")
        length = count * entry_size
        if offset + number_size + length > self.file.size:
            raise self.error(f"the directory at byte {offset} goes past the end of the file: it is truncated")
        data = self.file.read(offset + number_size, length)
        found = Directory(offset)
        for at in range(0, length, entry_size):
            self._entry(found, data[at : at + entry_size])
        end = offset + number_size + length
        if end + next_size <= self.file.size:
            (found.following,) = struct.unpack(self.order + ("Q" if self.big else "I"), self.file.read(end, next_size))
        self._check_tiles(found)
        return found

    def _entry(self, found: Directory, entry: bytes) -> None:
        code, kind = struct.unpack_from(self.order + "HH", entry)
        (count,) = struct.unpack_from(self.order + ("Q" if self.big else "I"), entry, 4)
        size = count * _SIZES.get(kind, 1)
        inline = 8 if self.big else 4
        place = 0
        if size > inline:
            (place,) = struct.unpack(self.order + ("Q" if self.big else "I"), entry[-inline:])
            bad = place < 8 or place + size > self.file.size
            if size > MAX_VALUE_BYTES or (bad and code in _STRUCTURE):
                where = f"{size} bytes at {place}, the file has {self.file.size}"
                raise self.error(f"tag {code} has {where}: the file is truncated or corrupt")
            if bad:
                return  # tifffile leaves such a tag out too
        if code in _WANTED and kind in _FORMATS and count:
            data = self.file.read(place, size) if size > inline else entry[-inline:][:size]
            found.values[code] = struct.unpack(f"{self.order}{count}{_FORMATS[kind]}", data)

    def _check_tiles(self, found: Directory) -> None:
        width, height = found.first(322), found.first(323)
        if width * height > self.max_tile_bytes:
            raise self.error(
                f"expected tiles of at most {self.max_tile_bytes} bytes, got {width} x {height} px:"
                " the file is corrupt, or open it with a larger max_tile_bytes"
            )

    def _find_ndpi(self, long_start: int) -> bool:
        """Hamamatsu NDPI: a TIFF with 64-bit offsets in a 32-bit layout, which only openslide reads in full."""
        for start in (self.start, long_start):
            try:
                if not self.big and _NDPI in self.directory(start).values:
                    return True
            except ImageError:
                continue
        return False
