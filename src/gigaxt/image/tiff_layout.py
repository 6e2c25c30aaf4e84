"""The bytes of a TIFF file that gigaxt writes: encoded tiles, tags, directories. Knows nothing of files or threads.

Always BigTIFF, also for small files: a compressed size is not known before the last tile, GDAL (QGIS), tifffile,
OpenSlide and Bio-Formats (QuPath) have read it for over a decade, and one layout is tested better than two.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, NamedTuple, cast
from xml.sax.saxutils import escape

import imagecodecs
import numpy as np
from numpy.typing import NDArray

from gigaxt.errors import ConfigError
from gigaxt.image.base import Pixels

Compression = Literal["zstd", "deflate", "jpeg"] | None
Colormap = Sequence[tuple[int, int, int]]

DTYPES = ("uint8", "uint16", "int16", "float16", "float32")
HEADER = struct.Struct("<2sHHHQ")
JPEG_QUALITY = 90

_COMPRESSION_TAG: dict[Compression, int] = {None: 1, "jpeg": 7, "deflate": 8, "zstd": 50000}
_SAMPLE_FORMAT = {"u": 1, "i": 2, "f": 3}
# Landsat tile, 512 x 512 x 3 (level: CPU ms, kB): deflate 1: 6, 532; 6: 14, 524. zstd 3: 5, 519; 9: 20, 506.
_DEFLATE_LEVEL, _ZSTD_LEVEL = 1, 3


class Tag(NamedTuple):
    """One directory entry: `data` holds `number` little-endian values of TIFF type `kind`."""

    code: int
    kind: int
    number: int
    data: bytes


def ascii_tag(code: int, text: str) -> Tag:
    """A NUL-terminated string; UTF-8 where the text needs it, as GDAL does."""
    data = text.encode() + b"\0"
    return Tag(code, 2, len(data), data)


def short_tag(code: int, *values: int) -> Tag:
    """Unsigned 16-bit values."""
    return Tag(code, 3, len(values), struct.pack(f"<{len(values)}H", *values))


def long_tag(code: int, *values: int) -> Tag:
    """Unsigned 32-bit values."""
    return Tag(code, 4, len(values), struct.pack(f"<{len(values)}I", *values))


def long8_tag(code: int, values: NDArray[np.uint64]) -> Tag:
    """Unsigned 64-bit values, one a tile."""
    return Tag(code, 16, values.size, values.astype("<u8").tobytes())


def double_tag(code: int, *values: float) -> Tag:
    """64-bit floating-point values."""
    return Tag(code, 12, len(values), struct.pack(f"<{len(values)}d", *values))


def rational_tag(code: int, value: float) -> Tag:
    """One positive fraction of unsigned 32-bit numbers, as exact as these allow."""
    fraction = Fraction(value).limit_denominator(max(1, min(10**6, int((2**32 - 1) / max(value, 1e-9)))))
    return Tag(code, 5, 1, struct.pack("<2I", max(fraction.numerator, 1), fraction.denominator))


def encode_directory(tags: Sequence[Tag], at: int, *, last: bool) -> bytes:
    """A BigTIFF directory for the file offset `at`, its long values behind it, padded to 8 bytes.

    The next directory, unless this is the `last`, is expected right behind the returned bytes.
    """
    ordered = sorted(tags)
    gap = bytes(-20 * len(ordered) % 8)
    fixed = 8 + 20 * len(ordered) + 8 + len(gap)
    entries, values = bytearray(struct.pack("<Q", len(ordered))), bytearray()
    for tag in ordered:
        if len(tag.data) <= 8:
            field = tag.data.ljust(8, b"\0")
        else:
            field = struct.pack("<Q", at + fixed + len(values))
            values += tag.data + bytes(-len(tag.data) % 8)
        entries += struct.pack("<HHQ", tag.code, tag.kind, tag.number) + field
    following = 0 if last else at + fixed + len(values)
    return bytes(entries + struct.pack("<Q", following) + gap + values)


@dataclass(frozen=True, kw_only=True)
class TileFormat:
    """How the tiles of one file are encoded, and the tags that say so.

    Attributes:
        channels: bands, stored interleaved.
        dtype: one of `DTYPES`.
        tile: px on a side.
        compression: of each tile.
        colormap: colours of the classes 0, 1, ..., each 0-255, for one uint8 band; None for measurements.
        categorical: values are classes: no predictor (equal neighbours compress better as they are).
        alpha: the last band is opacity.
    """

    channels: int
    dtype: np.dtype[np.generic]
    tile: int
    compression: Compression
    colormap: Colormap | None
    categorical: bool
    alpha: bool

    def __post_init__(self) -> None:
        if self.dtype.name not in DTYPES:
            raise ConfigError(
                f"expected a dtype of {', '.join(DTYPES)}, got {self.dtype.name}: convert the pixels first"
            )
        if self.channels < 1 or (self.alpha and self.channels < 2):
            raise ConfigError(f"expected at least {2 if self.alpha else 1} channels, got {self.channels}")
        if self.tile < 16 or self.tile % 16:
            raise ConfigError(f"expected a tile size that is a positive multiple of 16 (TIFF's rule), got {self.tile}")
        if self.compression not in _COMPRESSION_TAG:
            raise ConfigError(f"expected compression deflate, zstd, jpeg or None, got {self.compression!r}")
        byte = self.dtype == np.uint8
        if self.compression == "jpeg" and (not byte or self.channels not in (1, 3) or self.categorical):
            kind = "classes" if self.categorical else f"{self.channels} x {self.dtype}"
            raise ConfigError(f"JPEG holds 1 or 3 bands of uint8 measurements, got {kind}: use deflate or zstd")
        if self.colormap is not None and not (byte and self.channels == 1 and 1 <= len(self.colormap) <= 256):
            raise ConfigError(
                f"a colormap needs one uint8 band and 1 to 256 colours,"
                f" got {self.channels} x {self.dtype} and {len(self.colormap)} colours"
            )

    @property
    def predictor(self) -> int:
        """TIFF's predictor: 1 none, 2 differences of neighbours, 3 the same for floating-point bytes."""
        if self.compression in (None, "jpeg") or self.categorical:
            return 1
        return 3 if self.dtype.kind == "f" else 2

    def encode(self, pixels: Pixels) -> bytes:
        """The stored bytes of one tile.

        Args:
            pixels: (h, w, channels) with h and w at most the tile size; a smaller one is continued with its edge
                values, which cost little and, unlike a constant, leave no rim in a JPEG block.
        """
        h, w = pixels.shape[:2]
        if (h, w) != (self.tile, self.tile):
            pixels = np.pad(pixels, ((0, self.tile - h), (0, self.tile - w), (0, 0)), mode="edge")
        pixels = np.ascontiguousarray(pixels)  # (tile, tile, channels)
        if self.compression == "jpeg":
            if self.channels == 1:
                return bytes(imagecodecs.jpeg8_encode(pixels[..., 0], level=JPEG_QUALITY))
            return bytes(imagecodecs.jpeg8_encode(pixels, level=JPEG_QUALITY, subsampling="420"))
        if self.predictor == 2:
            pixels = imagecodecs.delta_encode(pixels, axis=-2)
        elif self.predictor == 3:
            pixels = imagecodecs.floatpred_encode(pixels, axis=-2)
        data = pixels.tobytes()
        if self.compression == "deflate":
            return bytes(imagecodecs.deflate_encode(data, level=_DEFLATE_LEVEL))
        if self.compression == "zstd":
            return bytes(imagecodecs.zstd_encode(data, level=_ZSTD_LEVEL))
        return data

    def tags(self, height: int, width: int) -> list[Tag]:
        """The tags of one level but for its size in the pyramid and its tiles' places."""
        n = self.channels
        tags = [
            long_tag(256, width),
            long_tag(257, height),
            short_tag(258, *[8 * self.dtype.itemsize] * n),
            short_tag(259, _COMPRESSION_TAG[self.compression]),
            short_tag(262, self._photometric),
            short_tag(277, n),
            short_tag(284, 1),
            short_tag(322, self.tile),
            short_tag(323, self.tile),
            short_tag(339, *[_SAMPLE_FORMAT[self.dtype.kind]] * n),
        ]
        extra = n - (3 if self._photometric in (2, 6) else 1)
        if extra:
            tags.append(short_tag(338, *[0] * (extra - 1), 2 if self.alpha else 0))
        if self.predictor != 1:
            tags.append(short_tag(317, self.predictor))
        if self._photometric == 6:
            tags += [short_tag(530, 2, 2)]
        if self.colormap is not None:
            table = np.zeros((3, 256), np.uint16)
            table[:, : len(self.colormap)] = np.asarray(self.colormap, np.uint16).T * 257
            tags.append(short_tag(320, *table.ravel().tolist()))
        return tags

    @property
    def _photometric(self) -> int:
        """0 to 1 gray, 2 RGB, 3 palette, 6 YCbCr. Four bands without alpha are gray: the fourth may be infrared."""
        if self.colormap is not None:
            return 3
        colours = self.channels - self.alpha
        if colours != 3 or self.dtype.name not in ("uint8", "uint16"):
            return 1
        return 6 if self.compression == "jpeg" else 2


def nodata_in_dtype(nodata: float, dtype: np.dtype[np.generic]) -> float | None:
    """`nodata` as the nearest number that pixels of `dtype` can hold; None where they cannot."""
    if dtype.kind == "f":
        with np.errstate(over="ignore"):
            value = float(np.asarray(nodata).astype(dtype))
        return value if np.isfinite(value) or not np.isfinite(nodata) else None
    info = np.iinfo(cast("np.dtype[np.integer]", dtype))
    return float(nodata) if np.isfinite(nodata) and info.min <= nodata <= info.max and nodata == int(nodata) else None


def nodata_tag(nodata: float) -> Tag:
    """GDAL_NODATA: the number as text."""
    return ascii_tag(42113, repr(int(nodata)) if nodata.is_integer() else repr(nodata))


def bands_tag(channels: int, names: Sequence[str] | None, scale: float | None) -> Tag:
    """GDAL_METADATA: a name for each band, as QGIS shows them, and what stored values are multiplied by.

    GDAL unescapes twice.
    """
    items = [
        f'  <Item name="DESCRIPTION" sample="{i}" role="description">{escape(escape(name))}</Item>'
        for i, name in enumerate(names or ())
    ]
    if scale is not None:
        items += [f'  <Item name="SCALE" sample="{i}" role="scale">{scale!r}</Item>' for i in range(channels)]
    return ascii_tag(42112, "\n".join(["<GDALMetadata>", *items, "</GDALMetadata>"]))
