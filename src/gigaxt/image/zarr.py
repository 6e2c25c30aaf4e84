"""OME-Zarr: image pyramids in a folder of chunks, formats 2 and 3 of Zarr."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.abc.store import ByteRequest
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import LocalStore

from gigaxt.errors import ImageError
from gigaxt.image.base import Image, Level, Pixels
from gigaxt.image.process import PerProcess

MARKERS = (".zattrs", ".zgroup", "zarr.json")
"""A folder that holds one of these is an OME-Zarr image."""

_METRIC = {"meter": 1e6, "centimeter": 1e4, "millimeter": 1e3, "micrometer": 1.0, "nanometer": 1e-3, "angstrom": 1e-4}


class _Store(LocalStore):
    """A folder whose Blosc chunks are checked: numcodecs reads beyond the end of one that was cut short."""

    def __init__(self, path: str) -> None:
        super().__init__(path, read_only=True)
        self.blosc_arrays: set[str] = set()

    async def get(
        self, key: str, prototype: BufferPrototype | None = None, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        value = await super().get(key, prototype, byte_range)
        name = key.rpartition("/")[2]
        if value is None or name in (".zarray", ".zattrs", "zarr.json") or byte_range is not None:
            return value
        if any(key.startswith(f"{array}/") for array in self.blosc_arrays):
            promised = int.from_bytes(value.as_numpy_array()[12:16].tobytes(), "little")
            if len(value) < 16 or promised != len(value):
                raise ValueError(f"chunk {key} has {len(value)} bytes, expected {promised}: it is truncated or corrupt")
        return value


class ZarrImage(Image):
    """An OME-Zarr image, versions 0.1 to 0.5, with any of the axes t, c, z, y, x; of t and z the first is read.

    Chunks that are not on disk read as the array's fill value. That is how Zarr stores an empty chunk, so a chunk that
    was lost cannot be distinguished from it.

    Args:
        path: the folder.
        max_pixels: a larger width x height is refused.
        max_tile_bytes: a larger decoded chunk is refused.

    Raises:
        ImageError: no OME-Zarr image, broken metadata, or pixels that are not read.
    """

    def __init__(self, path: str | Path, *, max_pixels: int = 2**34, max_tile_bytes: int = 64 << 20) -> None:
        self.name = str(path)
        self._options: dict[str, Any] = {"max_pixels": max_pixels, "max_tile_bytes": max_tile_bytes}
        self._arrays = PerProcess(self._open)
        try:
            self._group, metadata = _find_image(self.name)
            self._read_metadata(metadata)
            arrays = self._arrays.get()
            self._describe(arrays, max_pixels, max_tile_bytes)
        except ImageError:
            raise
        except Exception as error:  # zarr raises KeyError, ValueError, JSONDecodeError, ...
            raise ImageError(self.name, f"cannot be opened as OME-Zarr: {type(error).__name__}: {error}") from error

    def __reduce__(self) -> tuple[Callable[..., ZarrImage], tuple[str]]:
        return functools.partial(ZarrImage, **self._options), (self.name,)

    def _open(self) -> list[zarr.Array[Any]]:
        store = _Store(self.name)
        group = zarr.open_group(store, mode="r", path=self._group, use_consolidated=False)
        arrays: list[zarr.Array[Any]] = []
        for path in self._paths:
            array = group[path]
            if not isinstance(array, zarr.Array):
                raise ImageError(self.name, f"expected an array at {path!r}, got a group")
            if any(type(codec).__name__.startswith("Blosc") for codec in array.compressors):
                store.blosc_arrays.add(array.path)
            arrays.append(array)
        return arrays

    def _read_metadata(self, metadata: Mapping[str, Any]) -> None:
        image = metadata["multiscales"][0]
        self._paths = [str(item["path"]) for item in image["datasets"]]
        axes = image.get("axes")
        self._axes = [axis if isinstance(axis, str) else str(axis["name"]) for axis in axes] if axes else None
        units = {axis["name"]: axis.get("unit") for axis in axes or () if isinstance(axis, dict)}
        scales = [_scale(item) for item in (image, image["datasets"][0])]
        self._um = {}
        for axis in "xy":
            at = self._axes.index(axis) if self._axes and axis in self._axes else -1
            size = math.prod(scale[at] for scale in scales if scale and at >= 0)
            self._um[axis] = size * _METRIC.get(str(units.get(axis)), 0.0) if any(scales) else 0.0
        channels = (metadata.get("omero") or {}).get("channels") or ()
        self._labels = tuple(str(channel.get("label") or "") for channel in channels)

    def _describe(self, arrays: list[zarr.Array[Any]], max_pixels: int, max_tile_bytes: int) -> None:
        first = arrays[0]
        axes = self._axes or list("tczyx")[-first.ndim :]
        if len(axes) != first.ndim or len(set(axes)) != len(axes) or not {"y", "x"} <= set(axes) <= set("tczyx"):
            raise ImageError(self.name, f"expected axes out of t c z y x, got {axes} for shape {first.shape}")
        self._axes = axes
        if first.dtype.kind not in "buif":
            raise ImageError(self.name, f"expected integer or float pixels, got {first.dtype}")
        sizes = [dict(zip(axes, array.shape, strict=True)) for array in arrays]
        self.width, self.height, self.channels = sizes[0]["x"], sizes[0]["y"], sizes[0].get("c", 1)
        if min(first.shape) < 1 or self.width * self.height > max_pixels:
            raise ImageError(self.name, f"expected 1 to {max_pixels} px, got shape {first.shape}")
        for array in arrays:
            if array.dtype != first.dtype or array.ndim != first.ndim:
                raise ImageError(
                    self.name, f"its levels differ: {first.shape} {first.dtype}, {array.shape} {array.dtype}"
                )
            chunk = math.prod(min(c, s) for c, s in zip(array.chunks, array.shape, strict=True)) * array.dtype.itemsize
            if chunk > max_tile_bytes:
                raise ImageError(self.name, f"expected chunks of at most {max_tile_bytes} bytes, got {chunk}")
        self.dtype = np.dtype(np.uint8) if first.dtype.kind == "b" else first.dtype.newbyteorder("=")
        self.levels = tuple(
            Level(size["x"], size["y"], self.width / size["x"], self.height / size["y"]) for size in sizes
        )
        self.mpp = (self._um["x"], self._um["y"]) if self._um["x"] > 0 and self._um["y"] > 0 else None
        named = len(self._labels) == self.channels and all(self._labels) and len(set(self._labels)) == self.channels
        self.band_names = self._labels if named else tuple(str(band + 1) for band in range(self.channels))

    def _read_inside(self, x: int, y: int, w: int, h: int, level: int) -> Pixels:
        return self._read(slice(None), x, y, w, h, level)

    def _read_bands(self, bands: tuple[int, ...], x: int, y: int, w: int, h: int, level: int) -> Pixels:
        first = min(bands)
        return self._read(slice(first, max(bands) + 1), x, y, w, h, level)[..., [band - first for band in bands]]

    def _read(self, bands: slice, x: int, y: int, w: int, h: int, level: int) -> Pixels:
        assert self._axes is not None
        where: dict[str, Any] = {"t": 0, "z": 0, "c": bands, "y": slice(y, y + h), "x": slice(x, x + w)}
        try:
            pixels = np.asarray(self._arrays.get()[level][tuple(where[axis] for axis in self._axes)])
        except Exception as error:  # codecs and stores raise whatever they like
            place = f"level {level}, x {x}, y {y}, {w} x {h} px"
            raise ImageError(self.name, f"a chunk cannot be read: {type(error).__name__}: {error}", place) from error
        left = [axis for axis in self._axes if axis in "cyx"]
        if "c" not in left:
            pixels, left = pixels[..., None], [*left, "c"]
        # (any order of c, y, x) -> (h, w, channels)
        return np.ascontiguousarray(pixels.transpose([left.index(axis) for axis in "yxc"])).astype(
            self.dtype, copy=False
        )


def _find_image(path: str) -> tuple[str, Mapping[str, Any]]:
    """The group that holds the first image and its OME metadata: the folder, or "0" in bioformats2raw's layout."""
    for group in ("", "0"):
        try:
            attributes = zarr.open_group(path, mode="r", path=group or None, use_consolidated=False).attrs.asdict()
        except (FileNotFoundError, KeyError):
            if not group:
                raise
            continue
        metadata = attributes.get("ome", attributes)
        if isinstance(metadata, Mapping) and metadata.get("multiscales"):
            return group, metadata
    raise ImageError(
        path, "expected OME-Zarr metadata (multiscales) in the folder: it is a Zarr store of something else"
    )


def _scale(item: Mapping[str, Any]) -> list[float]:
    for transformation in item.get("coordinateTransformations") or ():
        if transformation.get("type") == "scale" and "scale" in transformation:
            return [float(value) for value in transformation["scale"]]
    return []
