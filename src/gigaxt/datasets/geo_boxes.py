"""Boxes of GeoJSON: around each geometry of a file of one image, with the class that its properties name."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gigaxt.errors import DataError
from gigaxt.image.base import Image
from gigaxt.shapes.polygons import Polygon, polygon_of, polygons_in
from gigaxt.shapes.projection import geojson_to_px

CLASS_KEYS = ("class", "category", "label", "name")
"""Properties that may name the class, the first that is there; after QuPath's `classification`."""


def is_geojson(path: Path) -> bool:
    """Whether a file holds GeoJSON by its name; COCO JSON ends with .json."""
    return path.suffix.lower() == ".geojson"


def geojson_classes(path: Path) -> list[str | None]:
    """The class of each feature, None where its properties name none."""
    return [_class_of(feature) for feature, _ in _features(path)]


def read_geojson_boxes(path: Path, image: Image) -> tuple[NDArray[np.float64], list[str | None]]:
    """Boxes (n, 4) as left, top, right, bottom in px of an image, and their classes.

    Coordinates are as of masks, see `gigaxt.shapes.projection.geojson_to_px`.

    Raises:
        DataError: no GeoJSON, a geometry without finite corners, a CRS where the image has none or that is not known,
            or a box outside of the image.
    """
    crs, features = _crs(path), list(_features(path))
    corners = [_corners(path, number, geometry) for number, (_, geometry) in enumerate(features)]
    if not corners:
        return np.zeros((0, 4)), []
    everything = np.concatenate(corners)
    pixels = geojson_to_px(crs, everything, image, str(path))(everything)
    parts = np.split(pixels, np.cumsum([len(part) for part in corners])[:-1])
    boxes = np.array([[*part.min(axis=0), *part.max(axis=0)] for part in parts])
    x0, y0, x1, y1 = boxes.T
    outside = (x0 >= image.width) | (y0 >= image.height) | (x1 <= 0) | (y1 <= 0)
    if outside.any():
        number = int(np.flatnonzero(outside)[0])
        raise DataError(
            f"{path}: feature {number} (from 0) lies outside of {image.name}, {image.width} x {image.height} px: its "
            f"box is {boxes[number].round(1).tolist()} px; is the file of this image, and in its CRS?"
        )
    return boxes, [_class_of(feature) for feature, _ in features]


def read_geojson_polygons(path: Path, image: Image) -> list[list[Polygon]]:
    """The polygons of each feature, in px of an image, in the order of `read_geojson_boxes`, whose rules hold.

    Raises:
        DataError: a feature is no Polygon or MultiPolygon, or as there.
    """
    shapes = []
    for number, (_, geometry) in enumerate(_features(path)):
        where = f"{path}: feature {number} (from 0)"
        shapes.append([polygon_of(rings, where) for rings in polygons_in(geometry, path)])
        if not shapes[-1]:
            raise DataError(f"{where}: expected a Polygon or MultiPolygon as its mask, got {geometry!r:.60}")
    rings = [ring for polygons in shapes for polygon in polygons for ring in polygon]
    if not rings:
        return []
    everything = np.concatenate(rings)
    pixels = geojson_to_px(_crs(path), everything, image, str(path))(everything)
    parts = iter(np.split(pixels, np.cumsum([len(ring) for ring in rings])[:-1]))
    return [[[next(parts) for _ in polygon] for polygon in polygons] for polygons in shapes]


def _load(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: expected GeoJSON, got {error}") from error


def _features(path: Path) -> Iterator[tuple[Mapping[str, Any], Any]]:
    """Properties and geometry of each feature that has one; QuPath writes a bare list."""
    data = _load(path)
    members = data.get("features") if isinstance(data, Mapping) else data
    if not isinstance(members, list):
        raise DataError(f"{path}: expected a FeatureCollection, or a list of features, got {type(data).__name__}")
    for member in members:
        if not isinstance(member, Mapping) or member.get("type") != "Feature":
            raise DataError(f"{path}: expected features, got {member!r:.60}")
        if member.get("geometry") is not None:
            properties = member.get("properties")
            yield properties if isinstance(properties, Mapping) else {}, member["geometry"]


def _crs(path: Path) -> str | None:
    data = _load(path)
    crs = data.get("crs") if isinstance(data, Mapping) else None
    name = crs.get("properties", {}).get("name") if isinstance(crs, Mapping) else crs
    return None if name is None else str(name)


def _class_of(properties: Mapping[str, Any]) -> str | None:
    own = properties.get("classification")
    if isinstance(own, Mapping) and own.get("name") is not None:
        return str(own["name"])
    found = next((properties[key] for key in CLASS_KEYS if properties.get(key) is not None), None)
    return None if found is None else str(found)


def _corners(path: Path, number: int, geometry: Any) -> NDArray[np.float64]:
    """All corners (n, 2) of a geometry as (x, y)."""
    found = list(_positions(geometry.get("coordinates"))) if isinstance(geometry, Mapping) else []
    corners = np.array(found, dtype=np.float64).reshape(-1, 2)
    if len(corners) < 2 or not np.isfinite(corners).all() or not (np.ptp(corners, axis=0) > 0).all():
        raise DataError(
            f"{path}: feature {number} (from 0): expected a geometry with finite corners around an area, got "
            f"{geometry!r:.80}"
        )
    return corners


def _positions(coordinates: Any) -> Iterator[tuple[float, float]]:
    if not isinstance(coordinates, list):
        return
    if len(coordinates) >= 2 and all(isinstance(number, int | float) for number in coordinates[:2]):
        yield float(coordinates[0]), float(coordinates[1])
        return
    for part in coordinates:
        yield from _positions(part)
