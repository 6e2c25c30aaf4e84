from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as PillowImage
from PIL import ImageDraw

from gigaxt.errors import DataError
from gigaxt.regions import lattice_edges
from gigaxt.shapes.polygons import Polygon, epsg_code, polygon_from_array, rasterised_area, read_geojson

SQUARE = [[2.0, 1.0], [6.0, 1.0], [6.0, 5.0], [2.0, 5.0], [2.0, 1.0]]


def pixels_inside(polygons: list[Polygon], height: int, width: int) -> np.ndarray:
    """The naive way: every pixel centre against every side of every ring, even-odd."""
    y, x = np.mgrid[:height, :width] + 0.5
    found = np.zeros((height, width), dtype=np.bool_)
    for polygon in polygons:
        inside = np.zeros((height, width), dtype=np.bool_)
        for ring in polygon:
            for (xa, ya), (xb, yb) in zip(ring, np.roll(ring, -1, axis=0), strict=True):
                if ya != yb:
                    inside ^= ((ya <= y) != (yb <= y)) & (xa + (y - ya) * (xb - xa) / (yb - ya) <= x)
        found |= inside
    return found


def random_polygons(rng: np.random.Generator) -> list[Polygon]:
    """Self-crossing, overlapping, with holes, partly outside; many corners on whole or half pixels."""

    def ring(corners: int) -> np.ndarray:
        return np.asarray(rng.choice([1.0, 0.5, 0.013]) * rng.integers(-30, 200, (corners, 2)))

    return [[ring(int(n)) for n in rng.integers(3, 9, rng.integers(1, 4))] for _ in range(rng.integers(1, 5))]


@pytest.mark.parametrize("seed", range(30))
def test_area_equals_the_naive_count(seed: int) -> None:
    polygons = random_polygons(np.random.default_rng(seed))
    rows, cols = lattice_edges(71, 16), lattice_edges(90, 16)
    inside = pixels_inside(polygons, 71, 90)
    expected = np.add.reduceat(np.add.reduceat(inside, rows[:-1], axis=0, dtype=int), cols[:-1], axis=1)
    np.testing.assert_array_equal(rasterised_area(polygons, rows, cols), expected)


def test_sides_on_a_line_belong_to_one_cell() -> None:
    square = polygon_from_array([(32, 32), (64, 32), (64, 64), (32, 64)])
    area = rasterised_area([square], lattice_edges(96, 32), lattice_edges(96, 32))
    assert area.tolist() == [[0, 0, 0], [0, 1024, 0], [0, 0, 0]]


def test_a_large_annotation_has_the_area_of_its_polygons() -> None:
    angle = np.linspace(0, 2 * np.pi, 200, endpoint=False)
    ring = np.column_stack([50_000 + 40_000 * np.cos(angle), 40_000 + 30_000 * np.sin(angle)])
    rows, cols = lattice_edges(80_000, 256), lattice_edges(100_000, 256)
    area = rasterised_area([[ring], [ring / 2]], rows, cols)
    assert area.max() == 256 * 256
    union = pixels_inside([[ring / 100], [ring / 200]], 800, 1000).sum() * 100**2
    assert area.sum() == pytest.approx(union, rel=1e-3)


def feature(geometry: object) -> dict[str, object]:
    return {"type": "Feature", "properties": {}, "geometry": geometry}


def write(path: Path, data: object) -> Path:
    path.write_text(json.dumps(data), encoding="utf-8")
    return path


def test_geojson_of_all_shapes(tmp_path: Path) -> None:
    hole = [[3.0, 2.0], [4.0, 2.0], [4.0, 3.0]]
    polygon = {"type": "Polygon", "coordinates": [SQUARE, hole]}
    several = {"type": "MultiPolygon", "coordinates": [[SQUARE], [[[*corner, 7.0] for corner in SQUARE]]]}
    point = {"type": "Point", "coordinates": [0, 0]}
    shapes: list[tuple[object, int]] = [
        (polygon, 1),
        (feature(polygon), 1),
        ([feature(polygon), feature(None), feature(several)], 3),  # QuPath writes bare lists
        ({"type": "FeatureCollection", "features": [feature(point), feature(polygon)]}, 1),
        (feature({"type": "GeometryCollection", "geometries": [point, several, polygon]}), 3),
    ]
    for data, count in shapes:
        polygons, crs = read_geojson(write(tmp_path / "a.geojson", data))
        assert (len(polygons), crs) == (count, None)
        assert all(ring.shape[1] == 2 for rings in polygons for ring in rings)
    assert [len(ring) for ring in polygons[-1]] == [5, 3]


def test_the_crs_member_is_read(tmp_path: Path) -> None:
    member = {"type": "name", "properties": {"name": "urn:ogc:def:crs:EPSG::32633"}}
    data = {
        "type": "FeatureCollection",
        "crs": member,
        "features": [feature({"type": "Polygon", "coordinates": [SQUARE]})],
    }
    assert read_geojson(write(tmp_path / "a.geojson", data))[1] == "urn:ogc:def:crs:EPSG::32633"


def test_epsg_codes() -> None:
    assert epsg_code("EPSG:32633") == epsg_code("urn:ogc:def:crs:EPSG:9.8:32633") == "32633"
    wkt = 'PROJCS["x",GEOGCS["WGS 84",AUTHORITY["EPSG","4326"]],AUTHORITY["EPSG","32633"]]'
    assert epsg_code(wkt) == "32633"
    assert epsg_code("urn:ogc:def:crs:OGC:1.3:CRS84") == "4326"
    assert epsg_code('LOCAL_CS["site"]') is None
    assert epsg_code(None) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "expected GeoJSON, got"),
        ("[]", "expected Polygon or MultiPolygon geometries, got none"),
        ('{"type": "Point", "coordinates": [0, 0]}', "got none"),
        ('{"type": "Topology"}', "expected GeoJSON objects, got the type 'Topology'"),
        ("3", "got the type None"),
        ('{"type": "FeatureCollection"}', "got the type None"),
        ('{"type": "Polygon", "coordinates": [[[0, 0], [1, 1]]]}', "three or more corners"),
        ('{"type": "Polygon", "coordinates": [[[0, 0], [1, 1], [2]]]}', "three or more corners"),
        ('{"type": "Polygon", "coordinates": [[[0, 0], [1, NaN], [2, 3]]]}', "three or more corners"),
        ('{"type": "Polygon", "coordinates": 5}', "list of rings, got 5"),
        ('{"type": "MultiPolygon", "coordinates": [5]}', "list of rings, got 5"),
    ],
)
def test_broken_files_are_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.geojson"
    path.write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        read_geojson(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_pillow_agrees_on_a_plain_polygon() -> None:
    corners = [(10, 5), (80, 20), (60, 70), (15, 50)]
    canvas = PillowImage.new("1", (96, 96))
    ImageDraw.Draw(canvas).polygon(corners, fill=1)
    area = rasterised_area([polygon_from_array(corners)], lattice_edges(96, 96), lattice_edges(96, 96))
    assert area[0, 0] == pytest.approx(np.asarray(canvas).sum(), rel=0.03)  # Pillow fills the outline too
