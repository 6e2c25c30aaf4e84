"""The index of a TIFF: where each tile or strip lies and how to decode it. Made once by tifffile, then plain data."""

from __future__ import annotations

import contextlib
import logging
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import tifffile
from numpy.typing import NDArray

from gigaxt.errors import ImageError
from gigaxt.image.files import File
from gigaxt.image.headers import coded_size
from gigaxt.image.tiff_tags import (
    GeoReference,
    OmeImage,
    gdal_band_names,
    georeference,
    micrometres_per_pixel,
    nodata_value,
)
from gigaxt.image.tiff_walk import Directory, Walk

Decode = Callable[..., tuple[NDArray[Any] | None, tuple[int, ...], tuple[int, ...]]]

NONE, JPEG, LERC = 1, 7, 34887
JPEG_END = b"\xff\xd9"
_BOUNDED = frozenset((1, 5, 8, 32946, 32773, 34925, 34926, 50000, 2, 3, 4))
"""None, LZW, deflate, PackBits, LZMA, Zstandard, CCITT: their decoders are told the size of the result."""
_PICTURES = frozenset((JPEG, 34892, 33003, 33004, 33005, 34712, 34933, LERC, 50001))
"""JPEG, JPEG 2000, PNG, LERC, WebP: their decoders believe the stream, so its header is read first."""
_MAX_PAGES = 64  # looked at for overviews and masks
_VENDORS = ("is_scn", "is_bif", "is_philips")  # their levels overlap or are padded: openslide puts them right


@dataclass(frozen=True)
class Plane:
    """One directory of a file: a raster of `samples` bands, cut into tiles or strips ("segments")."""

    width: int
    height: int
    samples: int
    dtype: np.dtype[Any]
    planar: bool
    """Each band has its own segments."""
    segment_width: int
    segment_height: int
    offsets: NDArray[np.int64]
    counts: NDArray[np.int64]
    """0 for a segment that is not in the file."""
    compression: int
    stored: np.dtype[Any] | None
    """The dtype in the file's byte order where rows can be read without decoding, else None."""
    tables: bytes | None
    lerc_outer: int
    """LERC only: 1 deflate, 2 Zstandard around it."""
    unpack: Decode

    @property
    def across(self) -> int:
        """Segments in a row."""
        return -(-self.width // self.segment_width)

    @property
    def down(self) -> int:
        """Segments in a column."""
        return -(-self.height // self.segment_height)

    @property
    def together(self) -> int:
        """Bands in one segment."""
        return 1 if self.planar else self.samples

    @property
    def segment_bytes(self) -> int:
        """Bytes of a whole decoded segment."""
        return self.segment_width * self.segment_height * self.together * self.dtype.itemsize

    def decode(self, data: bytes, index: int) -> NDArray[Any]:
        """Decode segment `index` to (rows, columns, bands in it); border segments may come cut to the image.

        Raises:
            Exception: whatever the codec raises; `ValueError` if the stream is of another size.
        """
        if self.compression in _PICTURES:
            if self.lerc_outer:
                unwrap = imagecodecs.zstd_decode if self.lerc_outer == 2 else imagecodecs.zlib_decode
                data = bytes(unwrap(data, out=4 * self.segment_bytes + 4096))
            size = coded_size(data)
            if size is not None and (
                size.width > self.segment_width or size.height > self.segment_height or size.samples > self.together + 3
            ):
                raise ValueError(f"expected at most {self._shape_text}, its stream says {' x '.join(map(str, size))}")
        if self.compression == JPEG and data.rfind(JPEG_END) < 0:  # libjpeg would fill up what is missing
            raise ValueError(f"its JPEG stream of {len(data)} bytes is cut short: it has no end")
        segment, _, _ = self.unpack(data, index, jpegtables=self.tables)
        if segment is None or segment.ndim != 4 or segment.shape[3] != self.together:
            got = None if segment is None else segment.shape
            raise ValueError(f"expected {self._shape_text}, the stream decodes to {got}")
        if segment.dtype != self.dtype:
            if segment.dtype.kind != "b":
                raise ValueError(f"expected {self.dtype} pixels, the stream decodes to {segment.dtype}")
            segment = segment.astype(self.dtype)
        flat: NDArray[Any] = segment[0]
        return flat

    @property
    def _shape_text(self) -> str:
        return f"{self.segment_width} x {self.segment_height} x {self.together}"


@dataclass(frozen=True)
class TiffIndex:
    """What `TiffImage` needs to know of a file."""

    levels: tuple[tuple[Plane, ...], ...]
    """Per level the planes whose bands make up the image, in band order."""
    masks: tuple[Plane | None, ...]
    """Per level the internal mask."""
    nodata: float | None
    mpp: tuple[float, float] | None
    geo: GeoReference
    band_names: tuple[str, ...]
    orientation: int
    vendor: bool
    """A slide that only openslide reads right."""
    pages: tuple[int, int]
    """Directories whose bands are read, and those of their size but overviews and masks: `Image.pages`."""


def compression_name(code: int) -> str:
    """What a TIFF's compression number is called, in lower case: "deflate", "jpeg", "uncompressed"."""
    if code == NONE:
        return "uncompressed"
    try:
        name = tifffile.COMPRESSION(code).name.lower()
    except ValueError:
        return f"compression {code}"
    return {"adobe_deflate": "deflate"}.get(name, name)


def build_index(file: File, max_pixels: int, max_tile_bytes: int) -> TiffIndex:
    """Parse a TIFF's directories.

    Raises:
        ImageError: no TIFF, truncated, or of a kind that is not read; the cause says which.
    """
    walk = Walk(file, max_tile_bytes)
    if walk.is_ndpi:
        return TiffIndex((), (), None, None, GeoReference(None, None, None), (), 1, True, (0, 0))
    chain = walk.chain()
    try:
        flags: Any = {"is_ndpi": False, "is_lsm": False, "is_scanimage": False}
        with _quiet(), tifffile.TiffFile(file.stream(), name=file.path, **flags) as tiff:
            return _Builder(walk, tiff, chain, max_pixels, max_tile_bytes).index()
    except ImageError:
        raise
    except Exception as error:
        raise ImageError(file.path, f"its TIFF structure cannot be read: {type(error).__name__}: {error}") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep what tifffile logs about this thread's broken file off the terminal: the `ImageError` says it."""
    thread = threading.get_ident()

    def others(record: logging.LogRecord) -> bool:
        return record.thread != thread

    logger = logging.getLogger("tifffile")
    logger.addFilter(others)
    try:
        yield
    finally:
        logger.removeFilter(others)


class _Builder:
    def __init__(
        self, walk: Walk, tiff: tifffile.TiffFile, chain: list[Directory], max_pixels: int, max_tile_bytes: int
    ) -> None:
        self.walk, self.tiff, self.chain = walk, tiff, chain
        self.max_pixels, self.max_tile_bytes = max_pixels, max_tile_bytes

    def index(self) -> TiffIndex:
        first = self._page(self.chain[0])
        vendor = any(getattr(first, flag) for flag in _VENDORS)
        ome, indexes = self._ome(first) if first.is_ome else (None, [0])
        first = first if indexes[0] == 0 else self._page(self.chain[indexes[0]])
        mains = [first, *(self._page(self.chain[index]) for index in indexes[1:])]
        full = tuple(self._plane(page) for page in mains)
        if any((p.width, p.height, p.dtype) != (full[0].width, full[0].height, full[0].dtype) for p in full):
            raise self.walk.error("its OME-TIFF bands differ in size or dtype: open them with open_bands")
        levels: list[tuple[Plane, ...]] = [full]
        masks: list[Plane] = []
        candidates = self._sub_levels(indexes, full) if self.chain[indexes[0]].subdirectories else []
        if len(mains) == 1 and not candidates:
            candidates, masks = self._page_levels(first, full[0])
        for planes in sorted(candidates, key=lambda planes: -planes[0].width * planes[0].height):
            if _is_overview(planes[0], full[0], levels[-1][0]):
                levels.append(planes)
        by_size = {(mask.width, mask.height): mask for mask in masks}
        level_masks = [by_size.get((planes[0].width, planes[0].height)) for planes in levels]
        if level_masks[0] is not None:  # a level without its mask could not say which pixels are real
            levels = [planes for planes, mask in zip(levels, level_masks, strict=True) if mask is not None]
            level_masks = [mask for mask in level_masks if mask is not None]
        channels = sum(plane.samples for plane in full)
        geo, orientation = georeference(first), first.tags.valueof(274, default=1)
        mpp = ome.mpp if ome is not None else None
        if mpp is None and geo.transform is None:
            mpp = micrometres_per_pixel(first)
        return TiffIndex(
            levels=tuple(levels),
            masks=tuple(level_masks),
            nodata=nodata_value(first.tags.valueof(42113), full[0].dtype),
            mpp=mpp,
            geo=geo,
            band_names=(ome.band_names(channels) if ome is not None else ()) or gdal_band_names(first, channels),
            orientation=orientation if orientation in range(1, 9) else 1,
            vendor=vendor,
            pages=(len(indexes), sum(_is_page_of(directory, full[0]) for directory in self.chain)),
        )

    def _ome(self, first: tifffile.TiffPage) -> tuple[OmeImage, list[int]]:
        """The OME-XML, and which directories hold the bands."""
        try:
            ome = OmeImage(first.description)
            name = Path(self.walk.file.path).name
            return ome, ome.directories(first.samplesperpixel, len(self.chain), name)
        except ValueError as error:
            raise self.walk.error(str(error)) from error

    def _page(self, directory: Directory) -> tifffile.TiffPage:
        self.tiff.filehandle.seek(directory.offset)
        return tifffile.TiffPage(self.tiff, index=self.chain.index(directory) if directory in self.chain else 0)

    def _sub_levels(self, indexes: Sequence[int], full: tuple[Plane, ...]) -> list[tuple[Plane, ...]]:
        """Lower levels in SubIFDs: the n-th one of every band's directory makes the n-th level."""
        offsets = [self.chain[index].subdirectories for index in indexes]
        levels = []
        for below in range(min(32, *(len(found) for found in offsets), 32)):
            pages = [self._page(self.walk.directory(found[below])) for found in offsets]
            if all(_same_kind(page, plane) for page, plane in zip(pages, full, strict=True)):
                levels.append(tuple(self._plane(page) for page in pages))
        return levels

    def _page_levels(self, first: tifffile.TiffPage, full: Plane) -> tuple[list[tuple[Plane, ...]], list[Plane]]:
        """Overviews and masks among the further pages: marked as such, or Aperio's tiled pages."""
        levels: list[tuple[Plane, ...]] = []
        masks: list[Plane] = []
        for directory in self.chain[1:_MAX_PAGES]:
            page = self._page(directory)
            if page.subfiletype & 4:
                if page.samplesperpixel == 1:
                    masks.append(self._plane(page))
                continue
            reduced = page.is_tiled and not page.subfiletype if first.is_svs else page.subfiletype & 1
            if reduced and _same_kind(page, full):
                levels.append((self._plane(page),))
        return levels, masks

    def _plane(self, page: tifffile.TiffPage) -> Plane:
        dtype, stored = self._dtype(page)
        width, height, samples = page.imagewidth, page.imagelength, page.samplesperpixel
        if width < 1 or height < 1 or samples < 1 or page.imagedepth != 1 or page.tiledepth > 1:
            raise self.walk.error(f"expected a flat image, got {width} x {height} x {page.imagedepth} px")
        if width * height > self.max_pixels or samples > 4096:
            raise self.walk.error(
                f"expected at most {self.max_pixels} px, got {width} x {height} x {samples}: the file is corrupt,"
                " or open it with a larger max_pixels"
            )
        planar = page.planarconfig == 2 and samples > 1
        if planar and int(page.compression) == JPEG and page.photometric == tifffile.PHOTOMETRIC.RGB:
            page.photometric = tifffile.PHOTOMETRIC.MINISBLACK  # of each band's picture, which `page.decode` looks at
        plane = Plane(
            width=width,
            height=height,
            samples=samples,
            dtype=dtype,
            planar=planar,
            segment_width=page.tilewidth if page.is_tiled else width,
            segment_height=page.tilelength if page.is_tiled else page.rowsperstrip,
            offsets=_table(page.dataoffsets),
            counts=_table(page.databytecounts),
            compression=int(page.compression),
            stored=None if page.is_tiled else stored,
            tables=page.jpegtables,
            lerc_outer=_lerc_outer(page),
            unpack=page.decode,
        )
        self._check_segments(plane)
        # The decoder holds the page; its tables are kept above, at a fifth of the size.
        page.dataoffsets = page.databytecounts = ()
        for code in (273, 279, 324, 325):
            if code in page.tags:
                del page.tags[code]
        return plane

    def _dtype(self, page: tifffile.TiffPage) -> tuple[np.dtype[Any], np.dtype[Any] | None]:
        """The pixels' dtype, and the one in the file where bytes are pixels."""
        compression, bits = int(page.compression), page.bitspersample
        if compression not in _BOUNDED | _PICTURES:
            raise self.walk.error(f"compression {compression} is not read: expected one of TIFF's common ones")
        if page.dtype is None or page.dtype.kind not in "buif" or not isinstance(bits, int):
            kind = page.dtype or f"{bits} bits of sample format {page.sampleformat}"
            raise self.walk.error(
                f"expected integer or float pixels, got {kind}: convert it first (complex: to amplitude)"
            )
        dtype = np.dtype(np.uint8) if page.dtype.kind == "b" else page.dtype.newbyteorder("=")
        plain = compression == NONE and page.predictor == 1 and page.fillorder == 1 and not page.is_subsampled
        if not plain or bits != 8 * dtype.itemsize:
            return dtype, None
        return dtype, dtype.newbyteorder(self.tiff.byteorder)

    def _check_segments(self, plane: Plane) -> None:
        error, size = self.walk.error, self.walk.file.size
        if plane.segment_width < 1 or plane.segment_height < 1:
            raise error(f"expected tiles or strips of 1 px or more, got {plane.segment_width} x {plane.segment_height}")
        expected = plane.across * plane.down * (plane.samples if plane.planar else 1)
        if min(len(plane.offsets), len(plane.counts)) < expected:
            raise error(f"expected {expected} tiles or strips, its table has {len(plane.offsets)}: the file is corrupt")
        if plane.segment_bytes > self.max_tile_bytes and plane.stored is None:
            kind = "strips" if plane.segment_width == plane.width else "tiles"
            raise error(
                f"expected {kind} of at most {self.max_tile_bytes} bytes decoded, got {plane.segment_bytes}:"
                " rewrite it in tiles (e.g. gdal_translate -co TILED=YES), or open it with a larger max_tile_bytes"
            )
        present = (plane.offsets > 0) & (plane.counts > 0)
        if plane.stored is not None:  # rows are read by place: byte counts, often wrong here, are not needed
            rows = np.minimum(plane.segment_height, plane.height - np.arange(plane.down) * plane.segment_height)
            needed = np.tile(rows * (plane.width * plane.together * plane.dtype.itemsize), expected // plane.down)
        else:
            needed = plane.counts[:expected]
            most = max(4 * plane.segment_bytes, 1 << 20)
            if int(needed.max(initial=0)) > most:
                raise error(
                    f"a tile or strip of {int(needed.max())} bytes for {plane.segment_bytes}: the file is corrupt"
                )
        outside = present[:expected] & (plane.offsets[:expected] + needed > size)
        if outside.any():
            place = int(outside.argmax())
            raise error(
                f"tile or strip {place} of {expected} ends at byte {int(plane.offsets[place] + needed[place])},"
                f" the file has {size}: it is truncated"
            )


def _table(values: Sequence[int]) -> NDArray[np.int64]:
    table = np.asarray(values, dtype=np.uint64)
    return np.minimum(table, np.uint64(1 << 62)).astype(np.int64)


def _lerc_outer(page: tifffile.TiffPage) -> int:
    parameters = page.tags.valueof(50674)
    if int(page.compression) != LERC or not isinstance(parameters, tuple) or len(parameters) < 2:
        return 0
    return int(parameters[1])


def _is_page_of(directory: Directory, plane: Plane) -> bool:
    return (directory.first(256), directory.first(257), directory.first(254) & 5) == (plane.width, plane.height, 0)


def _same_kind(page: tifffile.TiffPage, plane: Plane) -> bool:
    dtype = page.dtype is not None and np.dtype(np.uint8 if page.dtype.kind == "b" else page.dtype)
    return page.samplesperpixel == plane.samples and dtype == plane.dtype


def _is_overview(plane: Plane, full: Plane, above: Plane) -> bool:
    """Smaller than the level above and of the image's proportions, to the pixel."""
    if (
        plane.width > above.width
        or plane.height > above.height
        or plane.width * plane.height >= above.width * above.height
    ):
        return False
    factor = full.width / plane.width if full.width >= full.height else full.height / plane.height
    return math.isclose(plane.width, full.width / factor, abs_tol=1.01) and math.isclose(
        plane.height, full.height / factor, abs_tol=1.01
    )
