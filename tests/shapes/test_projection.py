"""What GeoJSON's coordinates are in: one rule for masks, foreground, boxes and points."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyproj
import pytest

from gigaxt import DataError
from gigaxt.datasets.geo_boxes import read_geojson_boxes
from gigaxt.datasets.points import Spec, read_points
from gigaxt.image.memory import ArrayImage
from gigaxt.nn.heads import PointsConfig
from gigaxt.scenes.foreground import Foreground
from gigaxt.shapes.projection import geojson_to_px, to_px
from gigaxt.targets.vectors import in_pixels, read_features

UTM, LON_LAT = "EPSG:32633", "EPSG:4326"
CORNERS_PX = np.array([[32.0, 64.0], [64.0, 64.0], [64.0, 96.0], [32.0, 96.0]])
"""Of a square, as (x, y) of an image of 160 x 128 px: the third region of 32 px from above, second from left."""


def scene(*, placed: bool) -> ArrayImage:
    image = ArrayImage(np.ones((128, 160, 1), np.uint8))
    if placed:
        image.crs, image.transform = UTM, (10.0, 0.0, 500_000.0, 0.0, -10.0, 5_000_000.0)
    return image


def on_map(corners: Any) -> Any:
    return np.asarray(corners) * (10, -10) + (500_000, 5_000_000)


def lon_lat(corners: Any) -> Any:
    transformer = pyproj.Transformer.from_crs(UTM, LON_LAT, always_xy=True)
    return np.column_stack(transformer.transform(*on_map(corners).T))


def as_mask(path: Path, image: ArrayImage) -> Any:
    return in_pixels(read_features(path), image)[0][0][:4]


def as_foreground(path: Path, image: ArrayImage) -> Any:
    keep = Foreground.from_spec(path, min_fraction=0.9).keep(image, 32)
    (row, col), *others = np.argwhere(keep).tolist()
    assert not others
    return np.array([[col, row], [col + 1, row], [col + 1, row + 1], [col, row + 1]]) * 32.0


def as_boxes(path: Path, image: ArrayImage) -> Any:
    ((x0, y0, x1, y1),), _ = read_geojson_boxes(path, image)
    return np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]])


def as_points(path: Path, image: ArrayImage) -> Any:
    return read_points(path, Spec.of(PointsConfig()), image).places[:4, ::-1]


READERS = [as_mask, as_foreground, as_boxes, as_points]


def written(path: Path, corners: Any, crs: str | None, *, points: bool) -> Path:
    ring = [*np.asarray(corners).tolist(), np.asarray(corners)[0].tolist()]
    geometry = {"type": "MultiPoint", "coordinates": ring} if points else {"type": "Polygon", "coordinates": [ring]}
    data: dict[str, Any] = {"type": "FeatureCollection", "features": [{"type": "Feature", "geometry": geometry}]}
    if crs is not None:
        data["crs"] = {"type": "name", "properties": {"name": crs}}
    path.write_text(json.dumps(data))
    return path


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize(
    ("placed", "crs", "frame"),
    [
        (False, None, np.asarray),  # px, as QuPath writes them
        (True, None, lon_lat),
        (True, "urn:ogc:def:crs:OGC:1.3:CRS84", lon_lat),
        (True, "urn:ogc:def:crs:EPSG::32633", on_map),
    ],
)
def test_coordinates_are_what_the_standard_says(
    tmp_path: Path, read: Callable[..., Any], placed: bool, crs: str | None, frame: Callable[..., Any]
) -> None:
    path = written(tmp_path / "a.geojson", frame(CORNERS_PX), crs, points=read is as_points)
    np.testing.assert_allclose(read(path, scene(placed=placed)), CORNERS_PX, atol=1e-4)


@pytest.mark.parametrize("read", READERS)
def test_what_is_refused(tmp_path: Path, read: Callable[..., Any]) -> None:
    points = read is as_points
    path = written(tmp_path / "a.geojson", on_map(CORNERS_PX), None, points=points)
    with pytest.raises(
        DataError, match=r"without a `crs` member is in longitude and latitude, but coordinates reach 50"
    ):
        read(path, scene(placed=True))
    path = written(tmp_path / "b.geojson", on_map(CORNERS_PX), UTM, points=points)
    with pytest.raises(DataError, match=r"b.geojson: is in EPSG:32633, but array .* has no CRS to place it by"):
        read(path, scene(placed=False))
    path = written(tmp_path / "c.geojson", on_map(CORNERS_PX), "EPSG:99999", points=points)
    with pytest.raises(DataError, match=r"c.geojson: cannot be brought from EPSG:99999 to EPSG:32633"):
        read(path, scene(placed=True))


def test_a_place_that_is_nowhere_in_the_other_system() -> None:
    change = geojson_to_px(None, np.zeros((0, 2)), scene(placed=True), "a.geojson")
    with pytest.raises(DataError, match=r"a.geojson: \(15, 95\) in OGC:CRS84 is no place in EPSG:32633"):
        change(np.array([[15.0, 45.0], [15.0, 95.0]]))


def test_a_turned_transform() -> None:
    """Rows and columns are not mixed up."""
    image = scene(placed=True)
    image.transform = (3.0, 1.0, 100.0, -2.0, -4.0, 50.0)
    at = np.array([[7.0, 2.0], [1.0, 9.0]])  # x, y in px
    places = np.column_stack([3 * at[:, 0] + at[:, 1] + 100, -2 * at[:, 0] - 4 * at[:, 1] + 50])
    np.testing.assert_allclose(to_px(UTM, image, "a")(places), at)
