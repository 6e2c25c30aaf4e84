"""What a TIFF's tags say about its pixels: size on the ground or the slide, coordinate system, nodata, band names."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import tifffile

Transform = tuple[float, float, float, float, float, float]

_UM = {
    "m": 1e6,
    "cm": 1e4,
    "mm": 1e3,
    "µm": 1.0,
    "μm": 1.0,
    "um": 1.0,
    "micron": 1.0,
    "nm": 1e-3,
    "Å": 1e-4,
    "pm": 1e-6,
}
_METRES = {9001: 1.0, 9002: 0.3048, 9003: 1200 / 3937, 9036: 1000.0}  # EPSG codes: metre, foot, US survey foot, km
_PRINT_DPI = 1200


class GeoReference(NamedTuple):
    """Place on the Earth: `Image.crs`, `Image.crs_unit_m` and `Image.transform`."""

    crs: str | None
    crs_unit_m: float | None
    transform: Transform | None


def georeference(page: tifffile.TiffPage) -> GeoReference:
    """CRS and transform from GeoTIFF keys; the transform is that of pixel corners (pixel-is-point is shifted)."""
    keys = dict(_geo_keys(page))
    crs, unit = None, None
    for code in (3072, 2048):  # projected, then geographic
        value = keys.get(code)
        if crs is None and isinstance(value, int) and 1024 <= value < 32767:
            crs = f"EPSG:{value}"
            unit = _METRES.get(_integer(keys.get(3076))) if code == 3072 else None
    if crs is None:
        for value in keys.values():
            if isinstance(value, str) and "ESRI PE String = " in value:
                crs = value.split("ESRI PE String = ")[1].strip("| \x00")
                unit = _METRES.get(_integer(keys.get(3076)))
                break
    transform = _transform(page)
    if transform is not None and keys.get(1025) == 2:  # the tie point is a pixel's centre
        a, b, c, d, e, f = transform
        transform = (a, b, c - (a + b) / 2, d, e, f - (d + e) / 2)
    return GeoReference(crs, unit, transform)


def _integer(value: int | float | str | None) -> int:
    return value if isinstance(value, int) else 0


def _geo_keys(page: tifffile.TiffPage) -> Iterator[tuple[int, int | float | str]]:
    """Pairs of key and value from the three GeoTIFF key tags; broken entries are left out."""
    directory = page.tags.valueof(34735)
    doubles, text = page.tags.valueof(34736, default=()), page.tags.valueof(34737, default="")
    if not isinstance(directory, tuple) or len(directory) < 4:
        return
    doubles = doubles if isinstance(doubles, tuple) else (doubles,)
    text = text if isinstance(text, str) else ""
    for at in range(4, min(4 + 4 * int(directory[3]), len(directory) - 3), 4):
        key, location, count, value = (int(number) for number in directory[at : at + 4])
        if location == 0:
            yield key, value
        elif location == 34736 and value < len(doubles):
            yield key, float(doubles[value])
        elif location == 34737:
            yield key, text[value : value + count].rstrip("|\x00")


def _transform(page: tifffile.TiffPage) -> Transform | None:
    matrix = _numbers(page, 34264, 16)
    scale, tie = _numbers(page, 33550, 2), _numbers(page, 33922, 6)
    if matrix:
        found = (matrix[0], matrix[1], matrix[3], matrix[4], matrix[5], matrix[7])
    elif scale and tie:
        a, e = scale[0], -scale[1]
        found = (a, 0.0, tie[3] - tie[0] * a, 0.0, e, tie[4] - tie[1] * e)
    else:
        return None
    usable = bool(np.isfinite(found).all()) and found[0] * found[4] != found[1] * found[3]
    return found if usable else None


def _numbers(page: tifffile.TiffPage, code: int, at_least: int) -> tuple[float, ...] | None:
    value = page.tags.valueof(code)
    if not isinstance(value, tuple) or len(value) < at_least:
        return None
    return tuple(float(number) for number in value)


def nodata_value(text: object, dtype: np.dtype[Any]) -> float | None:
    """GDAL's nodata text as a number that a pixel of `dtype` can have; None where no pixel can equal it."""
    try:
        value = float(str(text).strip(" \x00").replace(",", "."))
    except ValueError:
        return None
    return representable(value, dtype)


def representable(value: float | None, dtype: np.dtype[Any]) -> float | None:
    """`value` if a pixel of `dtype` can have it, else None."""
    if value is None:
        return None
    if dtype.kind == "f":
        if abs(value) == np.inf or np.isnan(value) or abs(value) <= float(np.finfo(dtype).max) * (1 + 1e-6):
            return value
        return None
    limits = np.iinfo(dtype)
    return value if value == value // 1 and limits.min <= value <= limits.max else None


def micrometres_per_pixel(page: tifffile.TiffPage) -> tuple[float, float] | None:
    """Pixel size from the Aperio or ImageJ description or the resolution tags; OME-XML is read by `OmeImage`.

    Resolutions per inch of at most 1,200 dpi are what printers and cameras fill in, not optics: None.
    """
    description = page.description
    if description.startswith("Aperio"):
        match = re.search(r"\|\s*MPP\s*=\s*([0-9.]+)", description)
        if match and _positive(float(match[1])):
            return float(match[1]), float(match[1])
    across, down = _ratio(page.tags.valueof(282)), _ratio(page.tags.valueof(283))
    if not (across and down):
        return None
    unit = int(page.tags.valueof(296, default=2))
    if unit == 3:
        um = 1e4
    elif unit == 2 and max(across, down) > _PRINT_DPI:
        um = 25400.0
    elif unit == 1 and description.startswith("ImageJ=") and (match := re.search(r"^unit=(\S+)", description, re.M)):
        um = _UM.get(match[1].replace("\\u00B5", "µ"), 0.0)
    else:
        um = 0.0
    return (um / across, um / down) if um else None


def _ratio(value: object) -> float | None:
    if isinstance(value, tuple) and len(value) == 2 and value[1]:
        return float(value[0]) / float(value[1]) if value[0] else None
    return None


def _positive(value: float) -> bool:
    return bool(np.isfinite(value)) and value > 0


def gdal_band_names(page: tifffile.TiffPage, channels: int) -> tuple[str, ...]:
    """Band descriptions of GDAL's metadata tag; empty where any is missing or two are equal."""
    text = page.tags.valueof(42112)
    if not isinstance(text, str):
        return ()
    try:
        root = ElementTree.fromstring(text.rstrip("\x00"))
    except ElementTree.ParseError:
        return ()
    names = {item.get("sample"): item.text for item in root if item.get("role") == "description"}
    found = tuple(names.get(str(band)) or "" for band in range(channels))
    return found if all(found) and len(set(found)) == channels else ()


class OmeImage:
    """The first image of an OME-XML description: which directory holds which band of its first plane.

    Args:
        text: the OME-XML.

    Raises:
        ValueError: not OME-XML, or one without an image.
    """

    def __init__(self, text: str) -> None:
        try:
            root = ElementTree.fromstring(text)
        except ElementTree.ParseError as error:
            raise ValueError(f"its OME-XML is broken: {error}") from None
        pixels = next((item for item in root.iter() if item.tag.endswith("}Pixels") or item.tag == "Pixels"), None)
        if pixels is None:
            raise ValueError("its OME-XML describes no image")
        self._pixels = pixels
        self.sizes = {axis: max(1, int(pixels.get(f"Size{axis}", 1))) for axis in "XYZCT"}
        self.mpp = self._mpp()

    def _children(self, tag: str) -> list[ElementTree.Element]:
        return [item for item in self._pixels if item.tag.rpartition("}")[2] == tag]

    def _mpp(self) -> tuple[float, float] | None:
        sizes = []
        for axis in "XY":
            text = self._pixels.get(f"PhysicalSize{axis}")
            unit = _UM.get(self._pixels.get(f"PhysicalSize{axis}Unit", "µm"), 0.0)
            sizes.append(float(text) * unit if text else 0.0)
        return (sizes[0], sizes[1]) if all(_positive(size) for size in sizes) else None

    def band_names(self, channels: int) -> tuple[str, ...]:
        """The channels' names; empty where any is missing or two are equal."""
        names = tuple(item.get("Name") or "" for item in self._children("Channel"))
        return names if len(names) == channels and all(names) and len(set(names)) == channels else ()

    def directories(self, samples: int, count: int, file_name: str) -> list[int]:
        """Indexes of the directories that hold the bands at the first z and t, in band order.

        Args:
            samples: bands in one directory.
            count: directories in the file.
            file_name: the file's own name; sets of several files name each.

        Raises:
            ValueError: a band is in another file or nowhere.
        """
        planes = max(1, self.sizes["C"] // max(1, samples))
        if planes > count:
            raise ValueError(f"its OME-XML promises {planes} bands, this file holds {count} (a set of several files?)")
        lengths = {"C": planes, "Z": self.sizes["Z"], "T": self.sizes["T"]}
        order = [axis for axis in self._pixels.get("DimensionOrder", "XYZCT") if axis in lengths]
        if sorted(order) != ["C", "T", "Z"]:
            raise ValueError(f"its OME-XML has the dimension order {self._pixels.get('DimensionOrder')!r}")
        found: dict[int, int] = {}
        for step, (place, directory) in enumerate(self._planes(order, lengths, count, file_name)):
            where = dict(zip(order, place, strict=True))
            if where["Z"] == where["T"] == 0:
                found.setdefault(where["C"], directory)
            if len(found) == planes or step > count:  # every directory holds one plane at most
                break
        missing = [band for band in range(planes) if not 0 <= found.get(band, -1) < count]
        if missing:
            raise ValueError(f"band {missing[0]} of its OME-XML is not in this file (a set of several files?)")
        return [found[band] for band in range(planes)]

    def _planes(
        self, order: list[str], lengths: dict[str, int], count: int, file_name: str
    ) -> Iterator[tuple[list[int], int]]:
        """Each plane's place along `order` and its directory; -1 for one in another file."""
        blocks = self._children("TiffData") or [ElementTree.Element("TiffData")]
        names = [next((item.get("FileName", "") for item in block), "") for block in blocks]
        several = len(set(names)) > 1
        for block, name in zip(blocks, names, strict=True):
            stride, first = 1, 0
            for axis in order:
                first += int(block.get(f"First{axis}", 0)) * stride
                stride *= lengths[axis]
            start = int(block.get("IFD", 0))
            number = int(block.get("PlaneCount", 1 if block.get("IFD") is not None else stride))
            for step in range(max(1, min(number, stride - first, count))):
                place = _unravel(first + step, [lengths[axis] for axis in order])
                yield place, -1 if several and name != file_name else start + step


def _unravel(index: int, lengths: list[int]) -> list[int]:
    """Place along each axis, the first axis running fastest."""
    place = []
    for length in lengths:
        place.append(index % length)
        index //= length
    return place
