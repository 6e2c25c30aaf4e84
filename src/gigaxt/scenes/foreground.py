"""Which regions are worth encoding: tissue, a raster, or polygons. Regions without foreground are left out."""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gigaxt.augment import Edges, below_turns, turn
from gigaxt.errors import ConfigError, DataError
from gigaxt.image import open_image
from gigaxt.image.base import Image, Mask
from gigaxt.image.views import Cropped, Resampled, Select
from gigaxt.regions import READ_BYTES, core_px, lattice_edges
from gigaxt.shapes.polygons import Polygon, epsg_code, polygon_from_array, rasterised_area, read_geojson
from gigaxt.shapes.projection import geojson_to_px

Spec = str | os.PathLike[str] | Image | Sequence[ArrayLike]
"""What `Foreground.from_spec` takes."""

TINY = 1e-9
"""Fractions below this are rounding: one pixel of a core of 4,096 px is 6e-8."""
THUMBNAIL_PX = 2048
"""Longer side at which tissue is looked for: 8 micrometres a pixel on a large slide, a few cells."""

_TISSUE: WeakKeyDictionary[Image, Mask] = WeakKeyDictionary()
"""The tissue mask of each image, for as long as the image exists."""


class Foreground(ABC):
    """Finds the regions of an image that hold foreground. Plain data: picklable, made once for many images.

    Attributes:
        name: what messages call it.
        min_fraction: share of a region's core that must be foreground; 0: any.

    Raises:
        ConfigError: `min_fraction` is not 0 to 1.
    """

    def __init__(self, name: str, min_fraction: float = 0.0) -> None:
        if not 0 <= min_fraction <= 1:
            raise ConfigError(f"min_fraction: expected 0 to 1, got {min_fraction}")
        self.name, self.min_fraction = name, min_fraction

    @staticmethod
    def from_spec(spec: Spec, *, min_fraction: float = 0.0) -> Foreground:
        """Make the kind of foreground that `spec` asks for.

        Args:
            spec: `"tissue"`: Otsu's threshold on saturation at a low level; the path of a raster (or an Image): what is
                not 0 is foreground; the path of a `.geojson` or `.json` file, or a list of arrays (N, 2) of (x, y) in
                level-0 px: what lies inside of a polygon is foreground.
            min_fraction: share of a region's core that must be foreground to keep the region; 0: any.

        Raises:
            ConfigError: `min_fraction` out of range.
            DataError: no such file, or no polygons in it.
            ImageError: the raster cannot be opened.
        """
        if isinstance(spec, Image):
            return RasterForeground(spec, min_fraction)
        if not isinstance(spec, str | os.PathLike):
            return PolygonForeground([polygon_from_array(ring) for ring in spec], min_fraction)
        if spec == "tissue":
            return Tissue(min_fraction)
        path = Path(spec)
        if not path.exists():
            raise DataError(f'foreground: expected "tissue", a raster, a GeoJSON file or polygons, got no file {path}')
        if path.suffix.lower() in (".geojson", ".json"):
            polygons, crs = read_geojson(path)
            return PolygonForeground(polygons, min_fraction, name=str(path), geojson=True, crs=crs)
        return RasterForeground(open_image(path), min_fraction)

    def keep(self, image: Image, region: int, halo: int = 0) -> Mask:
        """Which regions hold enough foreground in their core: (rows, cols).

        Args:
            image: the scene; views of `gigaxt.augment` are looked through.
            region: px on a side.
            halo: px; see `RegionGrid`.

        Raises:
            DataError: none does, or the foreground does not fit the image.
        """
        core = core_px(region, halo)
        keep = self._enough(image, lattice_edges(image.height, core), lattice_edges(image.width, core))
        if not keep.any():
            raise DataError(
                f"{image.name}: no region has enough foreground by {self.name}; look at it with `gigaxt check`, "
                "lower `min_fraction`, or set another `foreground` (none: every region is kept)"
            )
        return keep

    def mask(self, image: Image, max_side_px: int = 1024) -> Mask:
        """The foreground at low resolution, to be drawn: (h, w), the longer side at most `max_side_px`.

        A pixel is True where `keep` would keep a region of its size.
        """
        scale = min(1.0, max_side_px / max(image.height, image.width))
        row_edges, col_edges = (
            np.rint(np.linspace(0, size, max(1, round(size * scale)) + 1)).astype(np.int64)
            for size in (image.height, image.width)
        )
        return self._enough(image, row_edges, col_edges)

    def _enough(self, image: Image, row_edges: Edges, col_edges: Edges) -> Mask:
        below, row_edges, col_edges, k = below_turns(image, row_edges, col_edges)
        if isinstance(below, Cropped):  # foreground is found in the whole image
            found = self._enough(
                below.base, *(_shifted(edges, by) for edges, by in ((row_edges, below.y), (col_edges, below.x)))
            )
            found = found[int(below.y > 0) :, int(below.x > 0) :]
            return np.ascontiguousarray(turn(found, k))
        covered = self._covered_px(below, row_edges, col_edges)
        fraction = covered / np.outer(np.diff(row_edges), np.diff(col_edges))
        return np.ascontiguousarray(turn(fraction >= max(self.min_fraction - TINY, TINY), k))

    @abstractmethod
    def _covered_px(self, image: Image, row_edges: Edges, col_edges: Edges) -> NDArray[np.float64]:
        """Foreground in each cell between the lines, in level-0 px: (len(row_edges) - 1, len(col_edges) - 1)."""


class PolygonForeground(Foreground):
    """What lies inside of polygons: pixels whose centre does.

    Coordinates. A list of arrays: always level-0 px of the file, x to the right, y down, also where the image is a
    resampled view of it. GeoJSON: as of masks (`gigaxt.shapes.projection.geojson_to_px`): longitude and latitude, or
    what its `crs` member names, brought to the CRS of the image; px as above where neither has one.
    """

    def __init__(
        self,
        polygons: list[Polygon],
        min_fraction: float = 0.0,
        *,
        name: str = "polygons",
        geojson: bool = False,
        crs: str | None = None,
    ) -> None:
        super().__init__(name, min_fraction)
        if not polygons:
            raise DataError(f"{name}: expected at least one polygon, got none")
        self.polygons, self.geojson, self.crs = polygons, geojson, crs

    def _covered_px(self, image: Image, row_edges: Edges, col_edges: Edges) -> NDArray[np.float64]:
        polygons = self._in_px(image)
        corners = np.concatenate([ring for polygon in polygons for ring in polygon])
        (left, top), (right, bottom) = corners.min(axis=0), corners.max(axis=0)
        if right <= 0 or bottom <= 0 or left >= image.width or top >= image.height:
            raise DataError(
                f"{self.name}: expected polygons on {image.name} ({image.width} x {image.height} px), got x {left:.6g} "
                f"to {right:.6g}, y {top:.6g} to {bottom:.6g} px; check that they belong together, and their CRS"
            )
        return rasterised_area(polygons, row_edges, col_edges)

    def _in_px(self, image: Image) -> list[Polygon]:
        """The polygons in level-0 px of an image."""
        placed = image.crs is not None and image.transform is not None
        if self.geojson and (placed or self.crs is not None):
            rings = [ring for polygon in self.polygons for ring in polygon]
            change = geojson_to_px(self.crs, np.concatenate(rings), image, self.name)
            return [[change(ring) for ring in polygon] for polygon in self.polygons]
        below = image
        while isinstance(below, Select | Resampled):
            below = below.base
        scale = np.array([image.width / below.width, image.height / below.height])
        return [[ring * scale for ring in polygon] for polygon in self.polygons]


class RasterForeground(Foreground):
    """What is not 0 (nor nodata) in a raster of any size, in any of its bands but alpha.

    Where image and raster have a CRS, it must be the same, and the transforms place the raster; what it does not cover
    is background. Otherwise it is stretched over the image, whose proportions it must have.
    """

    def __init__(self, raster: Image, min_fraction: float = 0.0) -> None:
        super().__init__(raster.name, min_fraction)
        self.raster = raster

    def _covered_px(self, image: Image, row_edges: Edges, col_edges: Edges) -> NDArray[np.float64]:
        rows, cols = self._lines_on_raster(image, row_edges, col_edges)
        upside_down, mirrored = rows[-1] < rows[0], cols[-1] < cols[0]
        rows, cols = np.sort(rows), np.sort(cols)
        scale = row_edges[-1] * col_edges[-1] / ((rows[-1] - rows[0]) * (cols[-1] - cols[0]))
        area = self._area(rows, cols)[:: -1 if upside_down else 1, :: -1 if mirrored else 1]
        return np.asarray(area * scale)

    def _area(self, rows: NDArray[np.float64], cols: NDArray[np.float64]) -> NDArray[np.float64]:
        """Foreground between lines on the raster, in px of the raster. Reads full resolution once, band by band."""
        raster = self.raster
        area = np.zeros((len(rows) - 1, len(cols) - 1))
        colours = raster.channels - (raster.channels in (2, 4))
        left, right = max(0, math.floor(cols[0])), min(raster.width, math.ceil(cols[-1]))
        top, bottom = max(0, math.floor(rows[0])), min(raster.height, math.ceil(rows[-1]))
        if left >= right:
            return area
        # 5: a flag and a count in four bytes for each pixel of the band
        high = max(1, READ_BYTES // ((right - left) * (raster.channels * raster.dtype.itemsize + 5)))
        for y in range(top, bottom, high):
            pixels, valid = raster.read_valid(left, y, right - left, min(high, bottom - y))
            foreground = (pixels[..., :colours] != 0) & ~np.isnan(pixels[..., :colours])
            area += area_between(foreground.any(axis=2) & valid, rows - y, cols - left)
        return area

    def _lines_on_raster(
        self, image: Image, row_edges: Edges, col_edges: Edges
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        raster = self.raster
        if not (image.crs and raster.crs and image.transform and raster.transform):
            self._check_proportions(image)
            return row_edges * raster.height / image.height, col_edges * raster.width / image.width
        if (epsg_code(image.crs) or image.crs) != (epsg_code(raster.crs) or raster.crs):
            cause = f"expected the CRS {image.crs} of {image.name}, got {raster.crs}"
            raise DataError(f"{raster.name}: {cause}; use gdalwarp -t_srs")
        from_image, to_crs = (np.array([*t, 0, 0, 1]).reshape(3, 3) for t in (image.transform, raster.transform))
        m = np.linalg.inv(to_crs) @ from_image  # (col, row, 1) of the image -> of the raster
        if abs(m[0, 1]) * image.height > 0.5 or abs(m[1, 0]) * image.width > 0.5:
            raise DataError(f"{raster.name}: expected the axes of {image.name}, got a turned raster; use gdalwarp")
        # Rounding, since 255.9999999 would touch the region before the one that begins at 256.
        return np.round(m[1, 1] * row_edges + m[1, 2], 6), np.round(m[0, 0] * col_edges + m[0, 2], 6)

    def _check_proportions(self, image: Image) -> None:
        raster = self.raster
        h, w = raster.width * image.height / image.width, raster.height * image.width / image.height
        if abs(raster.height - h) > 1 + 0.01 * h and abs(raster.width - w) > 1 + 0.01 * w:
            raise DataError(
                f"{raster.name}: expected the proportions of {image.name} ({image.width} x {image.height} px), "
                f"got {raster.width} x {raster.height} px"
            )


class Tissue(Foreground):
    """Stained tissue on bright glass, by colour saturation. Looks at the first three bands as red, green and blue."""

    def __init__(self, min_fraction: float = 0.0) -> None:
        super().__init__("tissue", min_fraction)

    def _covered_px(self, image: Image, row_edges: Edges, col_edges: Edges) -> NDArray[np.float64]:
        mask = _tissue_of(image)
        h, w = mask.shape
        area = area_between(mask, row_edges * h / image.height, col_edges * w / image.width)
        return np.asarray(area * (image.height / h * image.width / w))


def _shifted(edges: Edges, by: int) -> Edges:
    """Lines of a window as lines of the whole image, the first 0."""
    return np.concatenate([np.zeros(int(by > 0), dtype=np.int64), edges + by])


def area_between(mask: Mask, rows: NDArray[np.float64], cols: NDArray[np.float64]) -> NDArray[np.float64]:
    """True area of `mask` (h, w) in each cell between ascending lines, exact for lines that cut pixels.

    Lines may lie outside of the mask, where nothing is True.

    Returns:
        (len(rows) - 1, len(cols) - 1), in px of the mask.
    """

    def at(sums: NDArray[Any], lines: NDArray[np.float64]) -> NDArray[np.float64]:
        """Sums (n, ...) of what lies before each pixel, at lines between pixels too."""
        lines = np.clip(lines, 0, len(sums))
        whole = np.minimum(lines.astype(np.int64), len(sums) - 1)
        part = (lines - whole).reshape(-1, *[1] * (sums.ndim - 1))
        before = np.where((whole > 0).reshape(part.shape), sums[whole - 1], 0)  # (lines, 1, ...) against (lines, ...)
        return np.asarray(before + part * (sums[whole] - before))

    left_of = at(np.cumsum(mask, axis=1, dtype=np.int32).T, cols)  # (h, w) -> (lines, h)
    above = at(np.cumsum(np.diff(left_of, axis=0).T, axis=0), rows)  # (cells, h) -> (lines, cells)
    return np.asarray(np.diff(above, axis=0))


def _tissue_of(image: Image) -> Mask:
    """Kept for windows of the same image, of which there are many."""
    mask = _TISSUE.get(image)
    if mask is None:
        mask = _TISSUE[image] = tissue_mask(image)
    return mask


def tissue_mask(image: Image) -> Mask:
    """Where tissue is, at about 2,048 px: (h, w) over the whole image. All False where nothing stands out.

    Raises:
        DataError: fewer than three bands.
    """
    if image.channels < 3:
        raise DataError(
            f"{image.name}: foreground `tissue` expects three bands (red, green, blue), got {image.channels}; "
            "use a raster or polygons"
        )
    rgb, valid = _thumbnail(image)
    brightest, darkest = rgb.max(axis=2), rgb.min(axis=2)
    if not valid.any():
        return valid
    # Near black a grey level of noise is full saturation; black is scanner background or pen, not tissue.
    bright = brightest > 0.05 * max(float(brightest[valid].max()), 0.0)
    saturation = np.where(bright, (brightest - darkest) / np.where(bright, brightest, 1), 0).clip(0, 1)
    h, w = saturation.shape
    around = np.pad(saturation, 1, mode="edge")
    smooth = np.asarray(sum(around[i : i + h, j : j + w] for i in range(3) for j in range(3)) / 9)
    return valid & (smooth > tissue_threshold(smooth[valid]))


def tissue_threshold(saturation: NDArray[np.floating]) -> float:
    """The saturation, 0 to 1, above which a pixel is tissue.

    Otsu's threshold, with two guards. Where its classes differ by less than 0.05 there is one class only: all tissue
    from a mean of 0.15, none (a threshold of 1) below. And it is 0.2 at most: in an image full of tissue Otsu would
    part dark from pale tissue.
    """
    threshold = otsu(saturation)
    low, high = saturation[saturation <= threshold], saturation[saturation > threshold]
    if not len(low) or not len(high) or high.mean() - low.mean() < 0.05:
        return 0.0 if saturation.mean() >= 0.15 else 1.0
    return min(threshold, 0.2)


def otsu(values: NDArray[np.floating], bins: int = 256) -> float:
    """Otsu's threshold of values from 0 to 1: the greatest variance between the two classes.

    Where several bins do equally well (the gap between two separate classes), the middle of them.
    """
    histogram, _ = np.histogram(values, bins=bins, range=(0, 1))
    share = histogram / max(1, histogram.sum())
    below = np.cumsum(share)[:-1]  # of the classes split after each bin but the last
    moment = np.cumsum(share * np.arange(bins))
    weight = below * (1 - below)
    between = (moment[-1] * below - moment[:-1]) ** 2 / np.where(weight > 1e-12, weight, np.inf)
    best = np.flatnonzero(between >= between.max() * (1 - 1e-9))
    return float((best[0] + best[-1]) / 2 + 1) / bins


def _thumbnail(image: Image) -> tuple[NDArray[np.float32], Mask]:
    """First three bands at the level nearest to 2,048 px, averaged down where that is far: (h, w, 3), (h, w)."""
    sides = [max(size.width, size.height) for size in image.levels]
    level = min(range(len(sides)), key=lambda n: abs(math.log(sides[n] / THUMBNAIL_PX)))
    size, factor = image.levels[level], max(1, round(sides[level] / THUMBNAIL_PX))
    h, w = -(-size.height // factor), -(-size.width // factor)
    rgb, valid = np.zeros((h, w, 3), dtype=np.float32), np.zeros((h, w), dtype=np.bool_)
    # 32: three bands in float32 twice and the flags, for each pixel
    high = max(1, READ_BYTES // (factor * factor * w * (image.channels * image.dtype.itemsize + 32)))
    for top in range(0, h, high):
        n = min(high, h - top)
        pixels, real = image.read_valid(0, top * factor, w * factor, n * factor, level)
        pixels = np.where(real[..., None], pixels[..., :3], 0).astype(np.float32)
        # (n * factor, w * factor, 3) -> (n, w, 3), the mean of valid pixels
        count = real.reshape(n, factor, w, factor).sum(axis=(1, 3), dtype=np.int64)
        sums = pixels.reshape(n, factor, w, factor, 3).sum(axis=(1, 3))
        rgb[top : top + n] = sums / np.maximum(count, 1)[..., None]
        valid[top : top + n] = count > 0
    return rgb, valid
