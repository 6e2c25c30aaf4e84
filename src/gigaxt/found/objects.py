"""Objects of an image, points or boxes, as a table: what detectors find and what is written to CSV and GeoJSON.

In memory all places are px from the upper left corner of the image, so that the centre of its first pixel is at
(0.5, 0.5), whatever the file says.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gigaxt.errors import ConfigError, DataError
from gigaxt.image.base import Image
from gigaxt.image.part_file import PartFile
from gigaxt.shapes.crops import outlines
from gigaxt.shapes.polygons import epsg_code

BOX_COLUMNS = ("left", "top", "right", "bottom")
MAP_COLUMNS = ("map_x", "map_y")
GEOJSON_SUFFIXES = (".geojson", ".json")


@dataclass(frozen=True, kw_only=True)
class Objects:
    """Objects of one image, one row each.

    Raises:
        DataError: columns of different lengths, or a place that is not finite.
    """

    places: NDArray[np.float64]
    """(n, 2) as (row, col), px from the upper left corner; of boxes the centre."""
    classes: NDArray[np.int64]
    """(n,) from 0."""
    scores: NDArray[np.float64]
    """(n,) from 0 to 1."""
    boxes_xyxy: NDArray[np.float64] | None = None
    """(n, 4) left, top, right, bottom, px from the upper left corner; None: points."""
    masks: NDArray[np.float32] | None = None
    """(n, side, side), the chance that each cell of an object's box is covered; None: boxes alone."""
    attributes: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    """Name -> (n,): float64, NaN where not known; or int8 for yes (1), no (0) and not known (-1)."""

    def __post_init__(self) -> None:
        columns = {"classes": self.classes, "scores": self.scores, **self.attributes}
        if self.places.shape != (len(self), 2) or any(column.shape != (len(self),) for column in columns.values()):
            shapes = {name: column.shape for name, column in columns.items()}
            raise DataError(f"objects: expected places (n, 2) and columns (n,), got {self.places.shape} and {shapes}")
        if self.boxes_xyxy is not None and self.boxes_xyxy.shape != (len(self), 4):
            raise DataError(f"objects: expected {len(self)} boxes (n, 4), got {self.boxes_xyxy.shape}")
        if self.masks is not None and (self.boxes_xyxy is None or len(self.masks) != len(self)):
            raise DataError(f"objects: expected masks with {len(self)} boxes, got {len(self.masks)} masks")
        if not np.isfinite(self.places).all():
            raise DataError("objects: expected finite places")

    def __len__(self) -> int:
        return len(self.places)

    def take(self, rows: NDArray[Any]) -> Objects:
        """Some of the objects: a mask or indices (m,)."""
        return Objects(
            places=self.places[rows],
            classes=self.classes[rows],
            scores=self.scores[rows],
            boxes_xyxy=None if self.boxes_xyxy is None else self.boxes_xyxy[rows],
            masks=None if self.masks is None else self.masks[rows],
            attributes={name: column[rows] for name, column in self.attributes.items()},
        )

    def on(self, height: int, width: int, other_height: int, other_width: int) -> Objects:
        """The same objects of an image of `height` x `width` px, in px of the same image at another size."""
        scale = np.array([other_height / height, other_width / width])
        boxes = None if self.boxes_xyxy is None else self.boxes_xyxy * np.tile(scale[::-1], 2)
        return replace(self, places=self.places * scale, boxes_xyxy=boxes)


def write_objects(path: str | Path, image: Image, objects: Objects, class_names: Sequence[str]) -> Path:
    """Write the objects of one image; the suffix of `path` chooses `.csv` or `.geojson`. See the two writers.

    Raises:
        ConfigError: another suffix. ImageError: the file cannot be written; an older one stays.
    """
    suffix = Path(path).suffix.lower()
    if suffix == ".csv":
        return write_csv(path, [(image, objects)], class_names)
    if suffix in GEOJSON_SUFFIXES:
        return write_geojson(path, image, objects, class_names)
    raise ConfigError(
        f"{path}: expected the name of a .csv or a .geojson file for objects, got {suffix or 'no suffix'}"
    )


def write_csv(path: str | Path, found: Iterable[tuple[Image, Objects]], class_names: Sequence[str]) -> Path:
    """Write the objects of any number of images, a line each. Until it is complete the file has another name.

    Columns: `image`; `row` and `col`, the pixel, where a whole number is the pixel's centre; of boxes `left`, `top`,
    `right`, `bottom` in px from the upper left corner of the image; `class`; `score`; the attributes, empty where not
    known; `map_x` and `map_y` in the image's CRS, empty where it has none.

    Args:
        path: of the CSV.
        found: images as their files are, each with its objects in px of it; all of one kind, with the same attributes.
        class_names: one a class.

    Raises:
        DataError: images with different columns. ImageError: the file cannot be written; an older one stays.
    """
    file = PartFile(Path(path))
    try:
        header: list[str] | None = None
        for image, objects in found:
            text = io.StringIO()
            table = csv.writer(text, lineterminator="\n")
            boxes = BOX_COLUMNS if objects.boxes_xyxy is not None else ()
            columns = ["image", "row", "col", *boxes, "class", "score", *objects.attributes, *MAP_COLUMNS]
            if header is None:
                header = columns
                table.writerow(columns)
            if columns != header:
                raise DataError(f"{image.name}: expected objects with the columns {header}, got {columns}")
            table.writerows(_lines(image, objects, class_names))
            file.append(text.getvalue().encode())
        if header is None:
            raise DataError(f"{path}: expected the objects of at least one image, got none")
        file.commit()
    finally:
        file.discard()
    return Path(path)


def write_geojson(path: str | Path, image: Image, objects: Objects, class_names: Sequence[str]) -> Path:
    """Write the objects of one image as a FeatureCollection of points or polygons.

    Of an image with a CRS and a transform the coordinates are in that CRS, which the member `crs` names (QGIS and GDAL
    read it); of others they are px (x, y) from the upper left corner, and the features carry what QuPath reads.

    Args:
        path: of the file, which has another name until it is complete.
        image: as its file is.
        objects: in px of it.
        class_names: one a class.

    Raises:
        ImageError: the file cannot be written; an older one stays.
    """
    placed = image.crs is not None and image.transform is not None
    head: dict[str, Any] = {"type": "FeatureCollection"}
    if placed:
        code = epsg_code(image.crs)
        name = f"urn:ogc:def:crs:EPSG::{code}" if code else image.crs
        head["crs"] = {"type": "name", "properties": {"name": name}}
    file = PartFile(Path(path))
    try:
        file.append(f'{json.dumps(head)[:-1]}, "features": ['.encode())
        features = (json.dumps(f, allow_nan=False) for f in _features(image, objects, class_names, placed))
        for i, feature in enumerate(features):
            file.append(f"{',' if i else ''}\n{feature}".encode())
        file.append(b"\n]}\n")
        file.commit()
    finally:
        file.discard()
    return Path(path)


def to_map(image: Image, places: NDArray[np.float64]) -> NDArray[np.float64]:
    """Places (n, 2) as (row, col) in px of an image with a transform, as (n, 2) x and y in its CRS."""
    assert image.transform is not None
    a, b, c, d, e, f = image.transform
    return np.asarray(places[:, ::-1] @ np.array([[a, d], [b, e]]) + (c, f))


def _lines(image: Image, objects: Objects, class_names: Sequence[str]) -> Iterable[list[str]]:
    placed = image.crs is not None and image.transform is not None
    on_map = to_map(image, objects.places) if placed else None
    for i in range(len(objects)):
        box = [] if objects.boxes_xyxy is None else [f"{side:.10g}" for side in objects.boxes_xyxy[i]]
        yield [
            image.name,
            *(f"{place:.10g}" for place in objects.places[i] - 0.5),
            *box,
            class_names[objects.classes[i]],
            f"{objects.scores[i]:.6g}",
            *(_cell(column[i]) for column in objects.attributes.values()),
            *(["", ""] if on_map is None else [f"{at:.12g}" for at in on_map[i]]),
        ]


def _features(image: Image, objects: Objects, class_names: Sequence[str], placed: bool) -> Iterable[dict[str, Any]]:
    for i in range(len(objects)):
        name = class_names[objects.classes[i]]
        properties: dict[str, Any] = {"class": name, "score": round(float(objects.scores[i]), 6)}
        properties |= {key: _json(column[i]) for key, column in objects.attributes.items()}
        if not placed:
            properties |= {"objectType": "detection", "classification": {"name": name}}
        yield {"type": "Feature", "geometry": _geometry(image, objects, i, placed), "properties": properties}


def _geometry(image: Image, objects: Objects, i: int, placed: bool) -> dict[str, Any]:
    """A point; or the outline of a mask; or a box, also of an object whose mask covers nothing."""

    def coordinates(corners: NDArray[np.float64]) -> Any:
        return (to_map(image, corners) if placed else corners[:, ::-1]).tolist()

    if objects.boxes_xyxy is None:
        return {"type": "Point", "coordinates": coordinates(objects.places[i : i + 1])[0]}
    left, top, right, bottom = objects.boxes_xyxy[i]
    shapes = [] if objects.masks is None else outlines(objects.masks[i], (left, top, right, bottom))
    if not shapes:
        corners = np.array([[bottom, left], [bottom, right], [top, right], [top, left], [bottom, left]])
        return {"type": "Polygon", "coordinates": [coordinates(corners)]}
    # Rings (x, y), the outlines anticlockwise where y goes up, as that of a box.
    polygons = [[coordinates(ring[::-1, ::-1]) for ring in rings] for rings in shapes]
    if len(polygons) == 1:
        return {"type": "Polygon", "coordinates": polygons[0]}
    return {"type": "MultiPolygon", "coordinates": polygons}


def _json(value: np.generic) -> float | bool | None:
    if value.dtype == np.int8:
        return {1: True, 0: False}.get(int(value))
    return float(value) if np.isfinite(value) else None


def _cell(value: np.generic) -> str:
    known = _json(value)
    return "" if known is None else str(known) if isinstance(known, bool) else f"{known:.6g}"
