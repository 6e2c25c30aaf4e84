"""JPEG 2000, NITF and other formats of GDAL through rasterio, the extra `geo`."""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from gigaxt.errors import ImageError
from gigaxt.image.base import Image, Level, Mask, Pixels
from gigaxt.image.process import PerProcess
from gigaxt.image.tiff_tags import representable

DRIVERS = {"jp2": "JP2OpenJPEG", "nitf": "NITF", "hfa": "HFA", "pcidsk": "PCIDSK"}
"""GDAL's driver by kind of file. Pinned: GDAL must not guess from names or open what the magic bytes deny."""

# TRUE: sidecars (.aux.xml, .ovr), which may hold the georeference, are asked for by name instead of listing the folder.
_GDAL = {"GDAL_CACHEMAX": 64, "GDAL_NUM_THREADS": 1, "GDAL_DISABLE_READDIR_ON_OPEN": "TRUE"}
_OPENING = PerProcess(threading.Lock)  # a warning is silenced while opening, which is not safe in several threads


class RasterImage(Image):
    """A raster that GDAL reads. Every thread of every process has its own handle: GDAL's cannot be shared or forked.

    Args:
        path: the file.
        kind: a key of `DRIVERS`.
        max_pixels: a larger width x height is refused.
        max_tile_bytes: a larger decoded block is refused.

    Raises:
        ImageError: rasterio is not installed, or the file cannot be opened.
    """

    def __init__(self, path: str | Path, kind: str, *, max_pixels: int = 2**34, max_tile_bytes: int = 64 << 20) -> None:
        self.name, self._kind = str(path), kind
        self._options: dict[str, Any] = {"kind": kind, "max_pixels": max_pixels, "max_tile_bytes": max_tile_bytes}
        self._handles = PerProcess(threading.local)
        dataset = self._dataset(0)
        self.width, self.height, self.channels = dataset.width, dataset.height, dataset.count
        self.dtype = np.dtype(dataset.dtypes[0])
        if self.dtype.kind not in "uif" or len(set(dataset.dtypes)) != 1:
            raise ImageError(self.name, f"expected integer or float bands of one dtype, got {set(dataset.dtypes)}")
        block = max(h * w for h, w in dataset.block_shapes) * self.dtype.itemsize
        if self.width * self.height > max_pixels or block > max_tile_bytes:
            raise ImageError(
                self.name,
                f"expected at most {max_pixels} px in blocks of at most {max_tile_bytes} bytes,"
                f" got {self.width} x {self.height} in blocks of {block}",
            )
        self._describe(dataset)

    def __reduce__(self) -> tuple[Callable[..., RasterImage], tuple[str]]:
        return functools.partial(RasterImage, **self._options), (self.name,)

    @property
    def all_valid(self) -> bool:
        """See `Image.all_valid`."""
        return self.nodata is None and not self._masked

    def _describe(self, dataset: Any) -> None:
        self.nodata = representable(dataset.nodata, self.dtype)
        self.crs, self.crs_unit_m = None, None
        if dataset.crs:
            code = dataset.crs.to_epsg()
            self.crs = f"EPSG:{code}" if code else str(dataset.crs.to_wkt())
            if dataset.crs.is_projected:
                self.crs_unit_m = float(dataset.crs.linear_units_factor[1])
        if not dataset.transform.is_identity:
            a, b, c, d, e, f = tuple(dataset.transform)[:6]
            self.transform = (a, b, c, d, e, f)
        names = tuple(name or "" for name in dataset.descriptions)
        unique = all(names) and len(set(names)) == len(names)
        self.band_names = names if unique else tuple(str(band + 1) for band in range(self.channels))
        flags = {flag.name for flag in dataset.mask_flag_enums[0]}
        self._masked = "per_dataset" in flags and "alpha" not in flags
        levels = [Level(self.width, self.height, 1.0, 1.0)]
        for number in range(len(dataset.overviews(1))):
            lower = self._dataset(number + 1)
            levels.append(Level(lower.width, lower.height, self.width / lower.width, self.height / lower.height))
        self.levels = tuple(levels)

    def _dataset(self, level: int) -> Any:
        """This thread's handle of a level; GDAL's overview n - 1 is level n."""
        try:
            import rasterio
            from rasterio.errors import NotGeoreferencedWarning
        except ImportError as error:
            raise ImageError(self.name, "files of this kind need rasterio: pip install 'gigaxt[geo]'") from error

        handles: dict[int, Any] = self._handles.get().__dict__.setdefault("levels", {})
        if level not in handles:
            options = {} if level == 0 else {"overview_level": level - 1}
            try:
                with _OPENING.get(), rasterio.Env(**_GDAL), warnings.catch_warnings():
                    warnings.simplefilter("ignore", NotGeoreferencedWarning)
                    handles[level] = rasterio.open(self.name, driver=DRIVERS[self._kind], sharing=False, **options)
            except Exception as error:
                raise ImageError(self.name, f"GDAL cannot open it: {type(error).__name__}: {error}") from error
        return handles[level]

    def _read_inside(self, x: int, y: int, w: int, h: int, level: int) -> Pixels:
        return self._read_bands(tuple(range(self.channels)), x, y, w, h, level)

    def _read_bands(self, bands: tuple[int, ...], x: int, y: int, w: int, h: int, level: int) -> Pixels:
        indexes = [band + 1 for band in bands]
        pixels = self._call(lambda dataset, window: dataset.read(indexes, window=window), x, y, w, h, level)
        return np.ascontiguousarray(pixels.transpose(1, 2, 0))  # (bands, h, w) -> (h, w, bands)

    def _valid_inside(self, x: int, y: int, w: int, h: int, level: int) -> Mask | None:
        if not self._masked:
            return None
        mask = self._call(lambda dataset, window: dataset.dataset_mask(window=window), x, y, w, h, level)
        valid: Mask = np.not_equal(mask, 0)
        return valid

    def _call(self, read: Callable[[Any, Any], Any], x: int, y: int, w: int, h: int, level: int) -> Any:
        dataset = self._dataset(level)
        import rasterio
        from rasterio.windows import Window

        try:
            with rasterio.Env(**_GDAL):
                return read(dataset, Window(x, y, w, h))
        except Exception as error:
            place = f"level {level}, x {x}, y {y}, {w} x {h} px"
            raise ImageError(self.name, f"GDAL cannot read it: {type(error).__name__}: {error}", place) from error
