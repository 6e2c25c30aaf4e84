"""Vector files: polygons with a property each, from GeoJSON, GeoPackage and Shapefile, in px of an image."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from gigaxt.config import nearest
from gigaxt.errors import DataError
from gigaxt.image.base import Image
from gigaxt.shapes.polygons import Polygon, polygon_of, polygons_in
from gigaxt.shapes.projection import Change, geojson_to_px, projection, to_px

AREAS = ("Polygon", "MultiPolygon")
_EDGE_POINTS = 21
"""Points on each side of an image, from which the box that it covers in another CRS is found."""


@dataclass(frozen=True)
class Features:
    """The polygons of a file, in its own coordinates and order."""

    name: str
    polygons: list[Polygon]
    values: list[Any]
    """Of the property that was asked for, one a polygon; None without."""
    crs: str | None
    """As the file says; None where it says none."""
    geojson: bool


def is_vector(path: Path) -> bool:
    """Whether a file is GeoJSON (or text that begins like it), a GeoPackage or a Shapefile, by its first bytes."""
    try:
        with path.open("rb") as file:
            head = file.read(100)
    except OSError:
        return False
    if head.startswith(b"SQLite format 3\0"):
        return head[68:72] == b"GPKG"
    return head[:4] == b"\0\0\x27\x0a" or head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] in (b"{", b"[")


def read_features(path: Path, field: str | None = None, *, near: Image | None = None) -> Features:
    """The polygons of a vector file.

    Args:
        path: of GeoJSON, a GeoPackage or a Shapefile; the latter two need the extra `geo`.
        field: a property, whose value is read; dots lead into nested ones, such as QuPath's `classification.name`.
        near: of a GeoPackage or Shapefile only what may touch this image is read.

    Raises:
        DataError: the file cannot be read; it holds something other than polygons; a feature lacks the property.
    """
    with path.open("rb") as file:
        binary = file.read(4)[:4] in (b"SQLi", b"\0\0\x27\x0a")
    found = _read_ogr(path, field, near) if binary else _read_geojson(path, field)
    if not found.polygons and (near is None or not binary):
        raise DataError(f"{path}: expected polygons, got none")
    return found


def in_pixels(features: Features, image: Image) -> list[Polygon]:
    """The polygons in level-0 px of an image.

    Of GeoJSON see `gigaxt.shapes.projection.geojson_to_px`; the others are in the CRS that they name, or in px where
    neither they nor the image has one. All are reprojected to the CRS of the image.

    Raises:
        DataError: one of the two has no CRS, coordinates that the CRS does not have, or no overlap with the image.
    """
    placed = image.crs is not None and image.transform is not None
    if features.geojson or not placed:
        rings = [ring for polygon in features.polygons for ring in polygon]
        change = geojson_to_px(features.crs, np.concatenate([np.empty((0, 2)), *rings]), image, features.name)
    elif features.crs is None:
        raise DataError(f"{features.name}: says no CRS, {image.name} has {image.crs}; set it, as with ogr2ogr -a_srs")
    else:
        change = to_px(features.crs, image, features.name)
    polygons = mapped(features.polygons, change)
    _check_overlap(features.name, polygons, image)
    return polygons


def _read_geojson(path: Path, field: str | None) -> Features:
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: expected GeoJSON, got {error}") from error
    polygons: list[Polygon] = []
    values: list[Any] = []
    for number, (geometry, properties) in enumerate(_features_in(data), start=1):
        if geometry is None:
            continue
        kinds = _kinds_in(geometry)
        for kind in kinds:
            if kind not in AREAS:
                _refuse(path, number, kind)
        value = None if field is None else _property(path, number, properties, field)
        parts = [polygon_of(rings, f"{path} feature {number}") for rings in polygons_in(geometry, path)]
        polygons += parts
        values += [value] * len(parts)
    named = data.get("crs") if isinstance(data, dict) else None
    crs = named.get("properties", {}).get("name") if isinstance(named, dict) else named
    return Features(str(path), polygons, values, None if crs is None else str(crs), geojson=True)


def _features_in(data: Any) -> Iterator[tuple[Any, Any]]:
    """Geometry and properties of each feature; a bare geometry has none."""
    if isinstance(data, list):
        for member in data:
            yield from _features_in(member)
    elif isinstance(data, dict) and data.get("type") == "FeatureCollection":
        yield from _features_in(data.get("features") or [])
    elif isinstance(data, dict) and data.get("type") == "Feature":
        yield data.get("geometry"), data.get("properties")
    else:
        yield data, None


def _kinds_in(geometry: Any) -> list[str]:
    if isinstance(geometry, dict) and geometry.get("type") == "GeometryCollection":
        return [kind for part in geometry.get("geometries") or [] for kind in _kinds_in(part)]
    return [str(geometry.get("type") if isinstance(geometry, dict) else type(geometry).__name__)]


def _property(path: Path, number: int, properties: Any, field: str) -> Any:
    found: Any = properties if isinstance(properties, Mapping) else {}
    steps = [field] if field in found else field.split(".")
    for step in steps:
        if not isinstance(found, Mapping) or found.get(step) is None:
            known = list(found) if isinstance(found, Mapping) else []
            hint = nearest(step, known) if known else ""
            raise DataError(f"{path} feature {number}: expected a property `{field}`, got none{hint}")
        found = found[step]
    return found


def _refuse(path: Path, number: int, kind: str) -> NoReturn:
    raise DataError(
        f"{path} feature {number}: expected a Polygon or MultiPolygon, got {kind}; points and lines have no area: "
        "buffer them in QGIS (Vector > Geoprocessing > Buffer), or remove them"
    )


def _read_ogr(path: Path, field: str | None, near: Image | None) -> Features:
    try:
        import pyogrio
        import pyogrio.raw
    except ImportError as error:
        raise DataError(f"{path}: GeoPackage and Shapefile need pyogrio: pip install 'gigaxt[geo]'") from error
    try:
        layers = [str(name) for name, kind in pyogrio.list_layers(path) if kind is not None]
        if len(layers) != 1:
            raise DataError(
                f"{path}: expected one layer, got {', '.join(layers) or 'none'}; "
                f"use ogr2ogr {path.stem}_one.gpkg {path.name} LAYER"
            )
        info = pyogrio.read_info(path)
        fields = [str(name) for name in info["fields"]]
        if field is not None and field not in fields:
            raise DataError(f"{path}: expected a field `{field}`, got none{nearest(field, fields)}")
        crs = info["crs"]
        _, _, shapes, columns = pyogrio.raw.read(
            path,
            columns=[] if field is None else [field],
            force_2d=True,
            bbox=None if near is None or crs is None else _box_in(crs, near, str(path)),
        )
    except pyogrio.errors.DataSourceError as error:
        raise DataError(f"{path}: cannot read it as a vector file: {error}") from error
    polygons: list[Polygon] = []
    values: list[Any] = []
    for number, shape in enumerate(shapes, start=1):
        if shape is None:
            continue
        value = None if field is None else columns[0][number - 1]
        if field is not None and (value is None or value != value):
            raise DataError(f"{path} feature {number}: `{field}` is empty; give it a class, or remove it")
        parts = [polygon_of(rings, f"{path} feature {number}") for rings in _wkb_polygons(shape, path, number)]
        polygons += parts
        values += [value.item() if isinstance(value, np.generic) else value] * len(parts)
    return Features(str(path), polygons, values, crs, geojson=False)


def _wkb_polygons(data: bytes, path: Path, number: int) -> list[list[NDArray[np.float64]]]:
    """Rings of each polygon of a geometry in well-known binary, two dimensions."""
    polygons, _ = _wkb(data, 0, path, number)
    return polygons


def _wkb(data: bytes, at: int, path: Path, number: int) -> tuple[list[list[NDArray[np.float64]]], int]:
    order = "<" if data[at] else ">"
    kind, count = struct.unpack_from(f"{order}II", data, at + 1)
    at += 9
    if kind == 6:
        parts: list[list[NDArray[np.float64]]] = []
        for _ in range(count):
            found, at = _wkb(data, at, path, number)
            parts += found
        return parts, at
    if kind != 3:
        names = {1: "Point", 2: "LineString", 4: "MultiPoint", 5: "MultiLineString", 7: "GeometryCollection"}
        _refuse(path, number, names.get(kind, f"a geometry of type {kind}"))
    rings = []
    for _ in range(count):
        (points,) = struct.unpack_from(f"{order}I", data, at)
        rings.append(np.frombuffer(data, f"{order}f8", 2 * points, at + 4).reshape(points, 2).astype(np.float64))
        at += 4 + 16 * points
    return [rings] if rings else [], at


def _box_in(crs: str, image: Image, name: str) -> tuple[float, float, float, float] | None:
    """What an image covers in a CRS: left, bottom, right, top, and a little more."""
    if image.crs is None or image.transform is None:
        return None
    along = np.linspace(0, 1, _EDGE_POINTS)
    x, y = (axis.ravel() for axis in np.meshgrid(along * image.width, along * image.height))
    a, b, c, d, e, f = image.transform
    corners = np.column_stack([a * x + b * y + c, d * x + e * y + f])
    found = projection(image.crs, crs, name)(corners)
    low, high = found.min(axis=0), found.max(axis=0)
    (left, bottom), (right, top) = low - 0.01 * (high - low), high + 0.01 * (high - low)
    return float(left), float(bottom), float(right), float(top)


def mapped(polygons: Sequence[Polygon], change: Change) -> list[Polygon]:
    """All corners changed in one call."""
    rings = [ring for polygon in polygons for ring in polygon]
    if not rings:
        return []
    parts = iter(np.split(change(np.concatenate(rings)), np.cumsum([len(ring) for ring in rings])[:-1]))
    return [[next(parts) for _ in polygon] for polygon in polygons]


def _check_overlap(name: str, polygons: Sequence[Polygon], image: Image) -> None:
    boxes = [(polygon[0].min(axis=0), polygon[0].max(axis=0)) for polygon in polygons]
    size = np.array([image.width, image.height])
    if not any((high > 0).all() and (low < size).all() for low, high in boxes):
        where = ""
        if boxes:
            low, high = np.min([low for low, _ in boxes], axis=0), np.max([high for _, high in boxes], axis=0)
            where = f", but x {low[0]:.6g} to {high[0]:.6g}, y {low[1]:.6g} to {high[1]:.6g} px of it"
        raise DataError(
            f"{name}: none of its polygons is on {image.name} (0 to {image.width}, 0 to {image.height} px){where}; "
            "check that they belong together, and their CRS"
        )
