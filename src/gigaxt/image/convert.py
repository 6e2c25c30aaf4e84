"""`convert_image`: any image as a tiled pyramid, in bounded memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from gigaxt.amounts import GIB
from gigaxt.errors import ImageError
from gigaxt.image.base import Image, Pixels
from gigaxt.image.headers import HEAD, kind_of
from gigaxt.image.jpeg_rows import jpeg_rows
from gigaxt.image.open import open_image
from gigaxt.image.png_rows import png_rows
from gigaxt.image.rows import Rows, copying_bytes
from gigaxt.image.tiff_layout import Compression, nodata_in_dtype
from gigaxt.image.writer import TiffWriter

Progress = Callable[[int, int], None]
"""Called with the rows done and the rows in all."""

_MAX_THREADS = 8  # beyond that the decoder of the source, one thread, is what everybody waits for


def convert_image(
    source: str | os.PathLike[str] | Image,
    target: str | os.PathLike[str],
    *,
    tile: int = 512,
    compression: Compression = "deflate",
    nodata: float | None = None,
    categorical: bool | None = None,
    max_memory_gib: float = 1.0,
    progress: Progress | None = None,
) -> None:
    """Write `source` as a tiled, pyramidal TIFF that opens at once and is read region by region.

    Pixels, CRS and transform, micrometres per pixel, nodata, palette, opacity, band names and orientation are kept; ICC
    profiles and other metadata are not. PNGs and JPEGs of any size are decoded from top to bottom, other images are
    read once in bands as high as a tile.

    Args:
        source: a path that `open_image` opens, a PNG or JPEG of any size, or an Image.
        target: the TIFF to make; an older one is replaced when the new one is complete.
        tile: px on a side, a multiple of 16.
        compression: deflate loses nothing and opens everywhere, so it is the default for photographs as well, although
            their files grow about tenfold over JPEG's; jpeg (quality 90) keeps them small but changes pixels once more.
        nodata: the value of pixels that hold nothing, in place of the source's; pixels that its mask hides get it too.
        categorical: values are classes: overviews take the most frequent, not the mean. None: where there is a palette.
        max_memory_gib: refuse rather than use more. About four rows of tiles are needed, and JPEGs are decoded
            more carefully where the whole picture fits.
        progress: called after every band.

    Raises:
        ConfigError: `tile` or `compression` do not fit the image.
        ImageError: the source cannot be read, the target not written, or both take more memory than allowed.
    """
    target = Path(target)
    _check_distinct(source, target)
    rows = _rows_of(source, nodata, tile, int(max_memory_gib * GIB))
    _check_memory(rows, tile, max_memory_gib)
    writer = TiffWriter(
        target,
        rows.height,
        rows.width,
        rows.channels,
        rows.dtype,
        tile=tile,
        compression=compression,
        like=rows.image,
        nodata=rows.nodata if nodata is None else nodata,
        colormap=rows.colormap,
        categorical=categorical,
        alpha=rows.alpha,
        band_names=rows.band_names,
        orientation=rows.orientation,
    )
    threads = min(_MAX_THREADS, os.cpu_count() or 1)
    with writer, ThreadPoolExecutor(threads, "gigaxt-convert") as pool:
        _copy(rows, writer, tile, pool, progress)


def _copy(rows: Rows, writer: TiffWriter, tile: int, pool: ThreadPoolExecutor, progress: Progress | None) -> None:
    """Tiles of one band are compressed by the pool while the next band is decoded here."""
    y, waiting = 0, list[Future[None]]()
    for band in rows.bands(tile):
        _wait(waiting)
        columns = range(0, rows.width, tile)
        waiting = [pool.submit(writer.write, x, y, band[:, x : x + tile]) for x in columns]
        y += len(band)
        if progress is not None:
            progress(y, rows.height)
    _wait(waiting)


def _wait(waiting: list[Future[None]]) -> None:
    for future in waiting:
        future.result()


def _check_distinct(source: str | os.PathLike[str] | Image, target: Path) -> None:
    path = Path(source.name if isinstance(source, Image) else source)
    if path.exists() and target.exists() and path.samefile(target):
        raise ImageError(target, "expected a target that is not the source, got the same file: choose another name")


def _check_memory(rows: Rows, tile: int, max_memory_gib: float) -> None:
    """Also what refuses headers that claim 2^31 px a side."""
    index = 16 * 4 / 3 * -(-rows.width // tile) * -(-rows.height // tile)  # where each tile lies
    needed = (copying_bytes(rows.width, rows.channels, rows.dtype, tile) + index) / GIB
    if needed > max_memory_gib:
        cause = (
            f"{rows.width} x {rows.height} px need about {needed:.1f} GiB to be converted, more than the"
            f" {max_memory_gib:g} GiB allowed: allow more, or use smaller tiles than {tile} px"
        )
        raise ImageError(rows.name, cause)


def _rows_of(source: str | os.PathLike[str] | Image, nodata: float | None, tile: int, budget_bytes: int) -> Rows:
    if isinstance(source, Image):
        return _image_rows(source, nodata)
    path = Path(source)
    try:
        with path.open("rb") as file:
            kind = kind_of(file.read(HEAD))
    except IsADirectoryError:
        kind = None  # OME-Zarr
    except OSError as error:
        raise ImageError(path, f"cannot be opened: {error.strerror}") from error
    if kind == "png":
        return png_rows(path)
    if kind == "jpeg":
        return jpeg_rows(path, tile, budget_bytes)
    return _image_rows(open_image(path), nodata)


def _image_rows(image: Image, nodata: float | None) -> Rows:
    own = None if image.nodata is None else nodata_in_dtype(image.nodata, image.dtype)
    fill = own if nodata is None else nodata_in_dtype(nodata, image.dtype)
    if fill is None and not image.all_valid and image.dtype.kind == "f":
        fill = float("nan")
    named = image.band_names and image.band_names != tuple(str(i + 1) for i in range(image.channels))
    return Rows(
        name=image.name,
        height=image.height,
        width=image.width,
        channels=image.channels,
        dtype=image.dtype,
        bands=lambda n: _image_bands(image, fill, n),
        nodata=fill,
        orientation=image.orientation,
        band_names=image.band_names if named else None,
        image=image,
    )


def _image_bands(image: Image, fill: float | None, n: int) -> Iterator[Pixels]:
    for y in range(0, image.height, n):
        h = min(n, image.height - y)
        if image.all_valid:
            yield image.read(0, y, image.width, h)
            continue
        pixels, mask = image.read_valid(0, y, image.width, h)
        if not mask.all():
            if fill is None:
                cause = "a mask hides pixels and there is no nodata value to write for them: name one (nodata)"
                raise ImageError(image.name, cause, f"rows {y} to {y + h - 1}")
            pixels = np.where(mask[..., None], pixels, np.asarray(fill).astype(pixels.dtype))
        yield pixels
