"""GeoTIFF tags for a coordinate reference system and a transform."""

from __future__ import annotations

import io
import struct
from bisect import bisect_right
from collections.abc import Sequence

import tifffile

from gigaxt.errors import ImageError
from gigaxt.image.base import Image
from gigaxt.image.tiff_layout import Tag, ascii_tag, double_tag, rational_tag, short_tag

Transform = tuple[float, float, float, float, float, float]

_KEYS, _DOUBLES, _ASCII = 34735, 34736, 34737
_PROJECTED, _GEOGRAPHIC = 3072, 2048  # key ids that hold an EPSG code


def is_geographic(code: int) -> bool:
    """Whether an EPSG code means latitudes and longitudes rather than a projection, from the table below."""
    i = bisect_right(_GEOGRAPHIC_STARTS, code) - 1
    return i >= 0 and code <= _GEOGRAPHIC_CODES[2 * i + 1]


def geo_tags(image: Image) -> list[Tag]:
    """Tags that give a file the place of `image`: its transform and CRS, or its micrometres per pixel.

    A CRS that is no EPSG code (WKT) goes through rasterio, which knows how to spell it in GeoTIFF keys.

    Raises:
        ImageError: the CRS is WKT and rasterio is not installed, or it cannot be written.
    """
    tags = [] if image.transform is None else _transform_tags(image.transform)
    if image.crs is not None:
        authority, _, code = image.crs.upper().partition(":")
        epsg = int(code) if authority == "EPSG" and code.isdigit() else None
        tags += _epsg_tags(epsg) if epsg is not None and epsg < 32767 else _wkt_tags(image)
    if image.mpp is not None:
        tags += [rational_tag(282, 1e4 / image.mpp[0]), rational_tag(283, 1e4 / image.mpp[1]), short_tag(296, 3)]
    return tags


def _transform_tags(transform: Transform) -> list[Tag]:
    """ModelPixelScale and ModelTiepoint for a north-up grid, which more programs read; else ModelTransformation."""
    a, b, c, d, e, f = transform
    if b == 0 and d == 0 and a > 0 and e < 0:
        return [double_tag(33550, a, -e, 0.0), double_tag(33922, 0.0, 0.0, 0.0, c, f, 0.0)]
    return [double_tag(34264, a, b, 0, c, d, e, 0, f, 0, 0, 0, 0, 0, 0, 0, 1)]


def _epsg_tags(code: int) -> list[Tag]:
    """The three keys that a registered CRS needs: model type, pixels are areas, its code."""
    model, key = (2, _GEOGRAPHIC) if is_geographic(code) else (1, _PROJECTED)
    return [short_tag(_KEYS, 1, 1, 0, 3, 1024, 0, 1, model, 1025, 0, 1, 1, key, 0, 1, code)]


def _wkt_tags(image: Image) -> list[Tag]:
    """The keys that GDAL writes for the CRS, taken from a file of one pixel."""
    try:
        import rasterio
    except ImportError as error:
        cause = "its CRS is no EPSG code, which needs rasterio to be written: pip install 'gigaxt[geo]'"
        raise ImageError(image.name, cause) from error
    try:
        with rasterio.io.MemoryFile() as memory:
            grid = rasterio.Affine(1, 0, 0, 0, -1, 0)
            profile = {"driver": "GTiff", "height": 1, "width": 1, "count": 1, "dtype": "uint8"}
            with memory.open(**profile, crs=image.crs, transform=grid):
                pass
            data = memory.read()
    except rasterio.errors.RasterioError as error:
        raise ImageError(image.name, f"its CRS cannot be written as GeoTIFF keys ({error})") from error
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        found = {
            code: file.pages.first.tags[code].value
            for code in (_KEYS, _DOUBLES, _ASCII)
            if code in file.pages.first.tags
        }
    tags = [short_tag(_KEYS, *found[_KEYS])] if _KEYS in found else []
    if _DOUBLES in found:
        values: Sequence[float] = found[_DOUBLES] if isinstance(found[_DOUBLES], tuple) else (found[_DOUBLES],)
        tags.append(Tag(_DOUBLES, 12, len(values), struct.pack(f"<{len(values)}d", *values)))
    if _ASCII in found:
        tags.append(ascii_tag(_ASCII, found[_ASCII]))
    return tags


# First and last code of each run of geographic CRSs among EPSG's geographic, projected and compound ones (PROJ 9.7).
# GeoTIFF wants the model type and the key to fit the code; rasterio, which would know, is optional.
# fmt: off
_GEOGRAPHIC_CODES = (
    3819, 3824, 3888, 3889, 3906, 3906, 4001, 4025, 4027, 4036, 4040, 4047, 4052, 4055, 4074, 4081, 4120, 4216,
    4218, 4388, 4463, 4466, 4469, 4470, 4472, 4472, 4475, 4483, 4490, 4490, 4555, 4558, 4600, 4646, 4657, 4765,
    4801, 4811, 4813, 4821, 4823, 4824, 4883, 5013, 5132, 5132, 5228, 5233, 5245, 5246, 5251, 5252, 5263, 5264,
    5323, 5324, 5340, 5342, 5353, 5354, 5359, 5360, 5364, 5365, 5370, 5381, 5392, 5393, 5451, 5451, 5464, 5464,
    5467, 5467, 5488, 5489, 5524, 5527, 5545, 5546, 5560, 5561, 5592, 5593, 5681, 5681, 5830, 5830, 5885, 5886,
    6134, 6135, 6207, 6207, 6310, 6311, 6318, 6325, 6364, 6365, 6667, 6668, 6705, 6706, 6782, 6783, 6881, 6883,
    6892, 6892, 6894, 6894, 6979, 6983, 6986, 6990, 7034, 7042, 7072, 7073, 7084, 7088, 7133, 7139, 7372, 7373,
    7657, 7686, 7797, 7798, 7816, 7816, 7843, 7844, 7880, 7881, 7885, 7886, 7900, 7931, 8042, 8043, 8085, 8086,
    8231, 8255, 8351, 8351, 8399, 8431, 8449, 8449, 8542, 8545, 8684, 8685, 8694, 8699, 8817, 8818, 8860, 8902,
    8906, 8907, 8916, 8949, 8972, 9019, 9053, 9140, 9147, 9148, 9152, 9153, 9183, 9184, 9248, 9248, 9251, 9251,
    9253, 9253, 9267, 9267, 9293, 9294, 9299, 9299, 9308, 9309, 9332, 9333, 9364, 9364, 9372, 9372, 9379, 9384,
    9403, 9403, 9453, 9453, 9469, 9470, 9474, 9475, 9546, 9547, 9695, 9696, 9701, 9702, 9739, 9739, 9754, 9758,
    9763, 9763, 9776, 9784, 9866, 9866, 9871, 9871, 9893, 9893, 9939, 9939, 9964, 9964, 9969, 9969, 9974, 9974,
    9989, 9990, 10158, 10158, 10175, 10178, 10185, 10185, 10191, 10191, 10196, 10196, 10204, 10204, 10209, 10209,
    10214, 10214, 10219, 10219, 10224, 10224, 10229, 10229, 10237, 10237, 10249, 10249, 10252, 10252, 10256, 10256,
    10260, 10260, 10265, 10265, 10268, 10268, 10272, 10272, 10277, 10277, 10283, 10284, 10298, 10305, 10307, 10312,
    10327, 10328, 10345, 10346, 10413, 10414, 10468, 10468, 10474, 10475, 10570, 10571, 10605, 10606, 10623, 10623,
    10628, 10628, 10635, 10639, 10670, 10673, 10689, 10690, 10724, 10725, 10735, 10739, 10758, 10758, 10761, 10762,
    10780, 10785, 10790, 10791, 10799, 10800, 10806, 10807, 10830, 10831, 10849, 10849, 10860, 10860, 10874, 10898,
    10909, 10910, 10940, 10941, 10951, 10968, 11042, 11043, 20033, 20033, 20040, 20041, 20045, 20046,
)
# fmt: on
_GEOGRAPHIC_STARTS = _GEOGRAPHIC_CODES[::2]
