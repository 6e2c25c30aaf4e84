"""`open_mask`: what is to be learnt of an image's pixels, a raster or a vector file, on the grid of the image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from gigaxt.config import nearest
from gigaxt.errors import ConfigError, DataError
from gigaxt.image.base import Image, Level, Mask, Pixels
from gigaxt.image.open import open_image
from gigaxt.image.views import copy_description
from gigaxt.nn.heads.segment_config import SegmentConfig
from gigaxt.shapes.polygons import epsg_code
from gigaxt.targets.vector_mask import VectorMask, Within
from gigaxt.targets.vectors import in_pixels, is_vector, read_features

SAME_PLACE_PX = 0.01
"""Grids whose corners are nearer than this are one."""
_EXACT = 1e-6  # px; centres that fall between two mask pixels belong to the later one, whatever the rounding


def open_mask(source: str | Path | Image, image: Image, head: SegmentConfig, *, aoi: str | Path | None = None) -> Image:
    """A mask, labels or numbers on the grid of an image.

    A raster with CRS and transform is brought there by them, its nearest pixel for each pixel of the image; it may have
    other pixels and lie elsewhere, and is not known beyond its border. One without must have the image's size. A vector
    file (GeoJSON, GeoPackage, Shapefile) is drawn; see `gigaxt.targets.vectors.in_pixels` for its coordinates.

    Args:
        source: the file, or an Image.
        image: as opened, at its own pixel size.
        head: what the mask is for; `class_field`, `class_names` and `unlabelled` say how polygons become classes.
        aoi: a vector file; only what lies inside of its polygons is known.

    Raises:
        DataError: it does not fit the image, or does not overlap it. ImageError: it cannot be read.
    """
    path = None if isinstance(source, Image) else Path(source)
    mask = _drawn(path, image, head) if path is not None and is_vector(path) else on_grid(open_image(source), image)
    if aoi is None:
        return mask
    limits = Path(aoi)
    if not is_vector(limits):
        raise DataError(f"{limits}: expected the aoi as GeoJSON, GeoPackage or Shapefile, got something else")
    return Within(mask, in_pixels(read_features(limits, near=image), image))


def on_grid(mask: Image, image: Image) -> Image:
    """A raster on the grid of an image: itself where it lies there, else a view of its nearest pixels.

    Raises:
        DataError: another CRS, no place of its own and another size, or no overlap.
    """
    if mask.crs is None or mask.transform is None or image.crs is None or image.transform is None:
        if (mask.height, mask.width) != (image.height, image.width):
            without = mask if mask.crs is None or mask.transform is None else image
            raise DataError(
                f"{mask.name}: the mask has {mask.width} x {mask.height} px, its image {image.name} has {image.width} "
                f"x {image.height}, and {'the mask' if without is mask else 'the image'} has no CRS and transform to "
                "place one on the other: make them of one size"
            )
        return mask
    if (epsg_code(mask.crs) or mask.crs) != (epsg_code(image.crs) or image.crs):
        raise DataError(
            f"{mask.name}: the mask is in {_shown(mask.crs)}, its image {image.name} in {_shown(image.crs)}; "
            f"use gdalwarp -r near -t_srs {_shown(image.crs)} {Path(mask.name).name} new.tif"
        )
    from_image = np.linalg.inv(_matrix(mask)) @ _matrix(image)  # (col, row, 1) of the image -> of the mask
    corners = np.array([[0, 0, 1], [image.width, 0, 1], [0, image.height, 1], [image.width, image.height, 1]]).T
    placed = (from_image @ corners)[:2]
    same_size = (mask.height, mask.width) == (image.height, image.width)
    if same_size and np.abs(placed - corners[:2]).max() < SAME_PLACE_PX:
        return mask
    (left, top), (right, bottom) = placed.min(axis=1), placed.max(axis=1)
    if right <= 0 or bottom <= 0 or left >= mask.width or top >= mask.height:
        raise DataError(
            f"{mask.name}: the mask does not overlap its image {image.name}, which lies at x {left:.6g} to "
            f"{right:.6g}, y {top:.6g} to {bottom:.6g} of its {mask.width} x {mask.height} px; do they belong together?"
        )
    return OnGrid(mask, image, from_image)


class OnGrid(Image):
    """The pixels of a mask below the centres of an image's pixels; beyond the mask's border they are not valid.

    Args:
        mask: of the same CRS.
        image: whose grid it gets.
        from_image: (3, 3), from (col, row, 1) of the image, in px, to those of the mask.
    """

    def __init__(self, mask: Image, image: Image, from_image: Any) -> None:
        copy_description(self, mask)
        self.height, self.width, self.levels = image.height, image.width, (Level(image.width, image.height, 1.0, 1.0),)
        self.transform, self.mpp = image.transform, image.mpp
        self._mask, self._from_image = mask, from_image

    @property
    def all_valid(self) -> bool:
        """See `Image.all_valid`."""
        return False

    def _read_inside(self, x: int, y: int, w: int, h: int, level: int) -> Pixels:
        return self._read_valid_inside(x, y, w, h, level)[0]

    def _read_valid_inside(
        self, x: int, y: int, w: int, h: int, level: int, bands: tuple[int, ...] | None = None
    ) -> tuple[Pixels, Mask]:
        m = self._from_image
        across, down = np.arange(x, x + w) + 0.5, (np.arange(y, y + h) + 0.5)[:, None]
        cols, rows = (
            np.floor(m[i, 0] * across + m[i, 1] * down + m[i, 2] + _EXACT).astype(np.int64) for i in (0, 1)
        )  # (h, w) each
        inside = (cols >= 0) & (cols < self._mask.width) & (rows >= 0) & (rows < self._mask.height)
        source = self._mask if bands is None else self._mask.select(bands)
        if not inside.any():
            fill = 0 if self.nodata is None else self.nodata
            return np.full((h, w, source.channels), fill, dtype=self.dtype), inside
        cols, rows = cols.clip(0, self._mask.width - 1), rows.clip(0, self._mask.height - 1)
        left, top = int(cols.min()), int(rows.min())
        pixels, valid = source.read_valid(left, top, int(cols.max()) - left + 1, int(rows.max()) - top + 1)
        place = rows - top, cols - left
        return pixels[place], valid[place] & inside


def class_number(value: Any, head: SegmentConfig, name: str) -> int:
    """The class that a value of the class field stands for.

    Args:
        value: a class name, or a number.
        head: its `class_names` and `classes`.
        name: of the file, for messages.

    Raises:
        DataError: no such class.
    """
    whole = isinstance(value, int | float) and float(value).is_integer()
    text = str(int(value)) if whole else str(value)
    if text in (head.class_names or ()):
        return list(head.class_names or ()).index(text)
    try:
        number = int(text)
    except ValueError:
        hint = nearest(text, head.class_names) if head.class_names else "; set model.head.class_names"
        raise DataError(f"{name}: `{head.class_field}` is {text!r}, which is no class of the model{hint}") from None
    if not 0 <= number < head.classes:
        raise DataError(f"{name}: `{head.class_field}` is {number}: expected a class from 0 to {head.classes - 1}")
    return number


def field_values(path: Path, field: str | None, image: Image) -> list[Any]:
    """The different values of a property in a vector file, of what lies near an image, sorted."""
    found = set(read_features(path, field, near=image).values)
    return sorted(found, key=lambda value: (isinstance(value, str), value))


def _drawn(path: Path, image: Image, head: SegmentConfig) -> VectorMask:
    if head.target == "regression":
        raise DataError(f"{path}: numbers are learnt from rasters; burn the polygons with gdal_rasterize -a FIELD")
    features = read_features(path, head.class_field, near=image)
    labels = head.target == "multi"
    if head.class_field is None and head.classes > (1 if labels else 2):
        raise ConfigError(
            f"model.head.class_field: {path} has polygons, and the model {head.classes} classes: name the property "
            "that tells which polygon has which"
        )
    own = 0 if labels else 1
    numbers = [own if head.class_field is None else class_number(v, head, features.name) for v in features.values]
    return VectorMask(
        str(path),
        in_pixels(features, image),
        numbers,
        image,
        bands=head.classes if labels else 1,
        labels=labels,
        empty=head.ignore if head.unlabelled == "ignore" else 0,
        dtype="uint8" if 0 <= head.ignore < 256 and head.classes <= 256 else "int32",
    )


def _matrix(image: Image) -> Any:
    assert image.transform is not None
    return np.array([*image.transform, 0, 0, 1]).reshape(3, 3)


def _shown(crs: str) -> str:
    code = epsg_code(crs)
    return f"EPSG:{code}" if code else crs[:40]
