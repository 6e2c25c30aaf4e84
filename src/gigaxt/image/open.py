"""`open_image`: any file, array or tensor as an `Image`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from gigaxt.errors import ImageError
from gigaxt.image import headers, raster
from gigaxt.image.base import Image
from gigaxt.image.files import File
from gigaxt.image.memory import ArrayImage, image_from_tensor, is_tensor
from gigaxt.image.tiff import TiffImage
from gigaxt.image.views import resample

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
"""How the names of files usually end that `open_image` can make RGB of."""

_PICTURES = ("png", "jpeg", "bmp", "webp")
_SLIDES = ("dicom", "czi", "sqlite", "vms")
_SAME = 1e-3  # pixel sizes closer than this, relative, are one


def open_image(
    source: Any,
    *,
    mpp: float | None = None,
    gsd_m: float | None = None,
    nodata: float | None = None,
    max_pixels: int = 2**34,
    max_tile_bytes: int = 64 << 20,
    rgb: bool = False,
    cached: bool = True,
) -> Image:
    """Open a file, an array or a tensor as an `Image`, without reading its pixels.

    A file's kind is decided by its first bytes, never by its name: TIFF of every kind, PNG, JPEG, BMP, WebP, OME-Zarr
    folders; vendor slides with the extra `wsi`, JPEG 2000, NITF and others of GDAL with the extra `geo`.

    Args:
        source: a path, an array (h, w) or (h, w, channels), a tensor (channels, h, w) or (h, w), or an `Image`.
        mpp: resample to this many micrometres per pixel.
        gsd_m: resample to this ground sample distance in metres.
        nodata: value of pixels that hold nothing, for arrays and tensors; files say it themselves.
        max_pixels: refuse a larger width x height.
        max_tile_bytes: refuse tiles, strips or chunks that decode to more.
        rgb: make red, green and blue of 8 bit PNG, JPEG, BMP and WebP pictures that are grey, CMYK, with alpha or a
            palette; other formats are taken as they are.
        cached: read through the cache of files where there is one (`gigaxt.cache_files`); False for files that are
            read once.

    Raises:
        ImageError: the source cannot be opened as an image, or has no pixel size to resample by.
    """
    image = _open(source, nodata, max_pixels, max_tile_bytes, rgb, cached)
    if mpp is None and gsd_m is None:
        return image
    if mpp is not None and gsd_m is not None:
        raise ImageError(image.name, "expected mpp= or gsd_m=, got both")
    wanted, own, name = (mpp, image.mpp, "mpp") if mpp is not None else (gsd_m, image.gsd_m, "gsd_m")
    assert wanted is not None
    if own is None:
        raise ImageError(image.name, f"cannot be resampled to {name}={wanted:g}: it does not say its own {name}")
    scales = [wanted / size for size in own]
    return resample(image, *(1.0 if abs(scale - 1) < _SAME else scale for scale in scales))


def _open(source: Any, nodata: float | None, max_pixels: int, max_tile_bytes: int, rgb: bool, cached: bool) -> Image:
    in_memory = isinstance(source, np.ndarray) or is_tensor(source)
    if nodata is not None and not in_memory:
        raise ImageError(source, "nodata= is for arrays and tensors: a file says it itself")
    if isinstance(source, Image):
        return source
    if isinstance(source, np.ndarray):
        return ArrayImage(source, nodata=nodata)
    if in_memory:
        return image_from_tensor(source, nodata=nodata)
    if not isinstance(source, str | Path):
        raise ImageError(type(source).__name__, "expected a path, an array, a tensor or an Image")
    path = Path(source)
    try:
        if path.is_dir():
            return _open_folder(path, max_pixels, max_tile_bytes)
        return _open_file(path, max_pixels, max_tile_bytes, rgb, cached)
    except OSError as error:  # such as a folder that may not be read
        raise ImageError(path, f"cannot be opened: {error.strerror or error}") from error


def _open_folder(path: Path, max_pixels: int, max_tile_bytes: int) -> Image:
    from gigaxt.image.xview3 import Xview3Scene, is_scene
    from gigaxt.image.zarr import MARKERS, ZarrImage  # zarr takes 0.3 s to import

    if is_scene(path):
        return Xview3Scene(path, max_pixels=max_pixels, max_tile_bytes=max_tile_bytes)
    if not any((path / marker).is_file() for marker in MARKERS):
        raise ImageError(
            path,
            "expected an image, got a folder that is no OME-Zarr (no .zattrs, .zgroup or zarr.json) nor xView3 scene",
        )
    return ZarrImage(path, max_pixels=max_pixels, max_tile_bytes=max_tile_bytes)


def _open_file(path: Path, max_pixels: int, max_tile_bytes: int, rgb: bool, cached: bool) -> Image:
    file = File(path, cached=cached)
    if not file.size:
        raise ImageError(path, "expected an image, got an empty file")
    head = file.read(0, min(headers.HEAD, file.size))
    kind = headers.kind_of(head)
    limits = {"max_pixels": max_pixels, "max_tile_bytes": max_tile_bytes}
    if kind == "tiff":
        image = TiffImage(path, **limits, cached=cached)
        return _slide(path, limits) if image.vendor_slide else image
    if kind in _SLIDES or (kind == "jpeg" and (path.with_suffix("") / "Slidedat.ini").is_file()):  # the latter is MRXS
        return _slide(path, limits)
    if kind in _PICTURES:
        from gigaxt.image.pillow import PillowImage

        return PillowImage(path, max_pixels=max_pixels, rgb=rgb, cached=cached)
    if kind in raster.DRIVERS:
        return raster.RasterImage(path, kind, **limits)
    what = kind or ("text" if _is_text(head) else f"a file that starts with {head[:8]!r}")
    raise ImageError(path, f"expected an image (TIFF, PNG, JPEG, OME-Zarr, a slide, JPEG 2000, ...), got {what}")


def _slide(path: Path, limits: dict[str, int]) -> Image:
    from gigaxt.image.slide import SlideImage

    return SlideImage(path, **limits)


def _is_text(head: bytes) -> bool:
    return head.isascii() and all(byte >= 32 or byte in b"\t\n\r\f" for byte in head)
