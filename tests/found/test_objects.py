"""The table of objects: its columns in CSV, its geometry in GeoJSON, and files that are whole or not there."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faster_coco_eval import mask as api
from shapely.geometry import shape

from gigaxt import ConfigError, DataError, ImageError
from gigaxt.found.coco_results import write_coco_results
from gigaxt.found.objects import Objects, write_csv, write_geojson, write_objects
from gigaxt.image.memory import ArrayImage

NAMES = ["ship", "buoy"]


def image(*, placed: bool) -> ArrayImage:
    found = ArrayImage(np.zeros((40, 60, 1), np.uint8))
    if placed:
        found.crs, found.transform = "EPSG:32630", (10.0, 0.0, 600_000.0, 0.0, -10.0, 4_220_000.0)
    return found


def objects(**changed: Any) -> Objects:
    given: dict[str, Any] = {
        "places": np.array([[3.5, 7.25], [30.0, 59.5]]),
        "classes": np.array([1, 0]),
        "scores": np.array([0.25, 1.0]),
        "attributes": {"length_m": np.array([12.5, np.nan]), "moving": np.array([-1, 1], np.int8)},
    }
    return Objects(**(given | changed))


BOXES = np.array([[2.0, 1, 12.5, 6], [59, 29, 60, 31]])


def test_csv_holds_pixels_and_map(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "a.csv", [(image(placed=True), objects()), (image(placed=False), objects())], NAMES)
    lines = list(csv.DictReader(path.read_text().splitlines()))
    assert len(lines) == 4
    assert not list(tmp_path.glob("*.part"))
    first, second = lines[:2]
    assert list(first) == ["image", "row", "col", "class", "score", "length_m", "moving", "map_x", "map_y"]
    assert (first["row"], first["col"], first["class"], first["score"]) == ("3", "6.75", "buoy", "0.25")
    assert (first["length_m"], first["moving"], second["length_m"], second["moving"]) == ("12.5", "", "", "True")
    assert (float(first["map_x"]), float(first["map_y"])) == (600_072.5, 4_219_965.0)
    assert lines[2]["map_x"] == ""


def test_boxes_have_columns_and_polygons(tmp_path: Path) -> None:
    boxes = objects(boxes_xyxy=BOXES)
    line = next(
        csv.DictReader(write_objects(tmp_path / "a.csv", image(placed=False), boxes, NAMES).read_text().splitlines())
    )
    assert [line[c] for c in ("left", "top", "right", "bottom")] == ["2", "1", "12.5", "6"]
    data = json.loads(write_geojson(tmp_path / "a.geojson", image(placed=True), boxes, NAMES).read_text())
    geometry = data["features"][0]["geometry"]
    assert geometry["type"] == "Polygon"
    ring = np.array(geometry["coordinates"][0])
    np.testing.assert_array_equal(ring.min(0), [600_020, 4_219_940])
    np.testing.assert_array_equal(ring.max(0), [600_125, 4_219_990])
    x, y = ring[:-1].T
    assert (x * np.roll(y, -1) - np.roll(x, -1) * y).sum() > 0  # counter-clockwise on the map, as RFC 7946 asks


def test_boxes_far_out_in_a_slide_keep_their_fractions_of_a_pixel(tmp_path: Path) -> None:
    far = objects(boxes_xyxy=BOXES + np.array([123_456, 100_000, 123_456, 100_000.25]))
    path = write_csv(tmp_path / "a.csv", [(image(placed=False), far)], NAMES)
    line = next(csv.DictReader(path.read_text().splitlines()))
    assert [float(line[side]) for side in ("left", "top", "right", "bottom")] == [123458, 100001, 123468.5, 100006.25]


def test_masks_are_outlined_on_the_map_and_run_lengths_in_coco(tmp_path: Path) -> None:
    """Two parts, one with a hole; what covers nothing keeps its box, and has an empty mask."""
    chances = np.zeros((2, 28, 28), np.float32)
    chances[0, 2:14, 2:14], chances[0, 6:10, 6:10], chances[0, 20:26, 20:26] = 1, 0, 1
    boxes = np.array([[2.0, 1, 30, 29], [40, 10, 50, 30]])
    found = objects(boxes_xyxy=boxes, masks=chances)
    data = json.loads(write_geojson(tmp_path / "a.geojson", image(placed=True), found, NAMES).read_text())
    first, second = (shape(feature["geometry"]) for feature in data["features"])
    assert first.is_valid
    assert sorted(len(part.interiors) for part in first.geoms) == [0, 1]
    assert all(part.exterior.is_ccw for part in first.geoms)
    assert first.area == pytest.approx(100 * (144 - 16 + 36), rel=0.02)  # corners are cut; a px is 10 m
    assert second.bounds == (600_400, 4_219_700, 600_500, 4_219_900)
    path = tmp_path / "a.json"
    assert write_coco_results(path, [(7, image(placed=False), found)], [3, 5]) == 2
    entries = json.loads(path.read_text())
    masks = [api.decode(entry["segmentation"]) for entry in entries]
    expected = np.zeros((40, 60))
    expected[1:29, 2:30] = chances[0]
    np.testing.assert_array_equal(masks[0], expected)
    assert not masks[1].any()
    assert found.take(np.array([1])).masks.shape == (1, 28, 28)
    with pytest.raises(DataError, match="expected masks with 2 boxes, got 1 masks"):
        objects(boxes_xyxy=boxes, masks=chances[:1])


@pytest.mark.parametrize("placed", [True, False])
def test_geojson_is_in_the_crs_or_in_px(tmp_path: Path, placed: bool) -> None:
    data = json.loads(write_geojson(tmp_path / "a.geojson", image(placed=placed), objects(), NAMES).read_text())
    first, second = data["features"]
    expected = [600_072.5, 4_219_965.0] if placed else [7.25, 3.5]
    assert first["geometry"] == {"type": "Point", "coordinates": expected}
    properties = first["properties"]
    assert (properties["class"], properties["length_m"], properties["moving"]) == ("buoy", 12.5, None)
    assert (second["properties"]["length_m"], second["properties"]["moving"]) == (None, True)
    assert (data["crs"]["properties"]["name"] == "urn:ogc:def:crs:EPSG::32630") if placed else "crs" not in data
    assert ("objectType" in properties) != placed


def test_gdal_reads_the_geojson_in_its_crs(tmp_path: Path) -> None:
    pyogrio = pytest.importorskip("pyogrio")
    path = write_geojson(tmp_path / "a.geojson", image(placed=True), objects(), NAMES)
    info = pyogrio.read_info(path)
    assert (info["crs"], info["features"], info["geometry_type"]) == ("EPSG:32630", 2, "Point")


def test_no_objects_are_a_file_too(tmp_path: Path) -> None:
    none = objects().take(np.zeros(2, bool))
    assert write_objects(tmp_path / "a.csv", image(placed=True), none, NAMES).read_text().count("\n") == 1
    path = write_objects(tmp_path / "a.geojson", image(placed=True), none, NAMES)
    assert json.loads(path.read_text())["features"] == []


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("old")
    other = objects(attributes={})
    with pytest.raises(DataError, match="expected objects with the columns"):
        write_csv(path, [(image(placed=True), objects()), (image(placed=True), other)], NAMES)
    assert [file.name for file in tmp_path.iterdir()] == ["a.csv"]
    assert path.read_text() == "old"
    with pytest.raises(ImageError, match="make it first"):
        write_csv(tmp_path / "none" / "a.csv", [(image(placed=True), objects())], NAMES)
    with pytest.raises(ConfigError, match=r"expected the name of a \.csv or a \.geojson"):
        write_objects(tmp_path / "a.tif", image(placed=True), objects(), NAMES)
    with pytest.raises(DataError, match="at least one image"):
        write_csv(path, [], NAMES)


def test_moved_to_another_size() -> None:
    there = objects(boxes_xyxy=BOXES).on(40, 60, 80, 30)
    np.testing.assert_array_equal(there.places[0], [7, 3.625])
    assert there.boxes_xyxy is not None
    np.testing.assert_array_equal(there.boxes_xyxy[0], [1, 2, 6.25, 12])


def test_columns_must_fit() -> None:
    with pytest.raises(DataError, match=r"columns \(n,\)"):
        objects(classes=np.array([1]))
    with pytest.raises(DataError, match="boxes"):
        objects(boxes_xyxy=BOXES[:1])
    with pytest.raises(DataError, match="finite"):
        objects(places=np.array([[np.nan, 1], [2, 2]]))
