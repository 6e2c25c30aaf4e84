"""Polygons: GeoJSON in, area per lattice cell out. Needs numpy only."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gigaxt.augment import Edges
from gigaxt.errors import DataError

Ring = NDArray[np.float64]
"""(N, 2) corners as (x, y), closed or not."""
Polygon = list[Ring]
"""Outer ring and holes. What an odd number of rings encloses is inside."""


def polygon_from_array(corners: ArrayLike, where: str = "polygons") -> Polygon:
    """A polygon without holes from (N, 2) corners as (x, y).

    Raises:
        DataError: not three or more finite corners.
    """
    return [_ring(corners, where)]


def read_geojson(path: Path) -> tuple[list[Polygon], str | None]:
    """All polygons of a GeoJSON file (collections, features, bare geometries, QuPath's lists), and its `crs` member.

    Points and lines are passed over, as they have no area.

    Raises:
        DataError: not JSON, not GeoJSON, no polygons, or a broken ring.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: expected GeoJSON, got {error}") from error
    polygons = [polygon_of(rings, str(path)) for rings in polygons_in(data, path)]
    if not polygons:
        raise DataError(f"{path}: expected Polygon or MultiPolygon geometries, got none")
    crs = data.get("crs") if isinstance(data, dict) else None
    name = crs.get("properties", {}).get("name") if isinstance(crs, dict) else crs
    return polygons, None if name is None else str(name)


def polygons_in(data: Any, path: Path) -> Iterator[Any]:
    """Coordinates of each polygon below a GeoJSON object: lists of rings."""
    if isinstance(data, list):
        for member in data:
            yield from polygons_in(member, path)
        return
    kind = data.get("type") if isinstance(data, dict) else None
    match kind:
        case "FeatureCollection":
            yield from polygons_in(data.get("features"), path)
        case "GeometryCollection":
            yield from polygons_in(data.get("geometries"), path)
        case "Feature" if data.get("geometry") is None:
            return
        case "Feature":
            yield from polygons_in(data["geometry"], path)
        case "Polygon" if data.get("coordinates"):
            yield data["coordinates"]
        case "MultiPolygon" if isinstance(data.get("coordinates"), list):
            yield from data["coordinates"]
        case "Polygon" | "Point" | "MultiPoint" | "LineString" | "MultiLineString":
            return
        case _:
            raise DataError(f"{path}: expected GeoJSON objects, got the type {kind!r}")


def polygon_of(rings: Any, where: str) -> Polygon:
    """A polygon from its rings, the outer one first.

    Raises:
        DataError: a broken ring.
    """
    if not isinstance(rings, list) or not rings:
        raise DataError(f"{where}: expected a polygon as a list of rings, got {repr(rings)[:60]}")
    return [_ring(ring, where) for ring in rings]


def _ring(corners: Any, where: str) -> Ring:
    try:
        ring = np.asarray(corners, dtype=np.float64)
    except (TypeError, ValueError):
        ring = np.empty(0)
    if ring.ndim != 2 or len(ring) < 3 or ring.shape[1] < 2 or not np.isfinite(ring).all():
        text = repr(corners)
        raise DataError(f"{where}: expected a polygon of three or more corners (x, y), got {text[:60]}")
    return ring[:, :2]


def epsg_code(crs: str | None) -> str | None:
    """The EPSG code that a CRS name, URN or WKT ends with; WGS 84 in longitude and latitude counts as 4326."""
    if crs and "CRS84" in crs:
        return "4326"
    found = re.search(r"EPSG.*?(\d+)\W*$", crs or "", re.DOTALL)
    return found[1] if found else None


def rasterised_area(polygons: list[Polygon], row_edges: Edges, col_edges: Edges) -> NDArray[np.float64]:
    """Pixels in each cell between the lines whose centre lies in a polygon: (len(row_edges) - 1, len(col_edges) - 1).

    Counts are exact; pixels in several polygons count once.

    Args:
        polygons: corners in px.
        row_edges: ascending whole lines in px, the first 0.
        col_edges: the same for columns.
    """
    sides = sides_of(polygons)
    top, bottom = np.minimum(sides[:, 1], sides[:, 3]), np.maximum(sides[:, 1], sides[:, 3])
    width = int(col_edges[-1])
    area = np.zeros((len(row_edges) - 1, len(col_edges) - 1))
    for row, (y0, y1) in enumerate(zip(row_edges[:-1].tolist(), row_edges[1:].tolist(), strict=True)):
        start, stop = _spans(sides[(top < y1) & (bottom > y0)], y0, y1, width)
        if len(start):
            steps = np.bincount(start, minlength=width + 1) - np.bincount(stop, minlength=width + 1)
            area[row] = np.add.reduceat(np.cumsum(steps[:width]), col_edges[:-1])
    return area


def sides_of(polygons: list[Polygon]) -> NDArray[np.float64]:
    """(sides, 5): x0, y0, x1, y1 and the polygon's number, of all sides of all rings but the level ones."""
    sides = [np.empty((0, 5))]
    for number, polygon in enumerate(polygons):
        for ring in polygon:
            following = np.roll(ring, -1, axis=0)
            sides.append(np.column_stack([ring, following, np.full(len(ring), number)]))
    found = np.concatenate(sides)
    return np.asarray(found[found[:, 1] != found[:, 3]])


def _spans(sides: NDArray[np.float64], y0: int, y1: int, width: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Start and stop columns of the pixels inside, in all pixel rows y0 to y1 - 1; no pixel twice."""
    _, y, x = crossings(sides, y0, y1)
    # Along a pixel row the crossings of one polygon go in, out, in, out, ...
    column = np.clip(np.ceil(x - 0.5), 0, width).astype(np.int64)
    row = (y[::2] - y0) * (width + 1)
    start, stop = column[::2] + row, column[1::2] + row
    # Spans of several polygons: each begins where all before it have ended. Rows do not touch, by the spare column.
    order = np.argsort(start, kind="stable")
    start, stop = start[order], stop[order]
    ended = np.maximum.accumulate(np.concatenate([[0], stop]))[:-1]
    start = np.maximum(start, ended)
    wanted = stop > start
    return start[wanted] % (width + 1), stop[wanted] - start[wanted] // (width + 1) * (width + 1)


def crossings(
    sides: NDArray[np.float64], y0: int, y1: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """Where sides cross the middles of the pixel rows y0 to y1 - 1: polygon, row and x, sorted in this order.

    What is found in a row does not depend on the other rows. Of each polygon a row has an even number of them.

    Args:
        sides: (n, 5) as `sides_of` gives them, whole polygons.
        y0: first row.
        y1: one past the last.
    """
    upper, lower = np.minimum(sides[:, 1], sides[:, 3]), np.maximum(sides[:, 1], sides[:, 3])
    # A side crosses the pixel rows whose centre it spans, its upper end included: so each corner counts once.
    first = np.clip(np.ceil(upper - 0.5), y0, y1).astype(np.int64)
    count = np.clip(np.ceil(lower - 0.5), y0, y1).astype(np.int64) - first
    side = np.repeat(np.arange(len(sides)), count)
    y = np.arange(len(side)) - np.repeat(np.cumsum(count) - count, count) + first[side]
    xa, ya, xb, yb, number = sides[side].T
    x = xa + (y + 0.5 - ya) * (xb - xa) / (yb - ya)
    order = np.lexsort((x, y, number))
    return number[order].astype(np.int64), y[order], x[order]
