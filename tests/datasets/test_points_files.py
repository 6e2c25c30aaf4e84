"""Points of images from CSV and GeoJSON, in every frame, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gigaxt import DataError
from gigaxt.datasets.points import Spec, class_words, known_numbers, read_points
from gigaxt.found.objects import Objects, write_objects
from gigaxt.image.memory import ArrayImage
from gigaxt.nn.heads import PointsConfig
from gigaxt.targets.points import UNKNOWN


def image(*, placed: bool = False) -> ArrayImage:
    found = ArrayImage(np.zeros((40, 60, 1), np.uint8))
    found.name = "scenes/a.tif"
    if placed:
        found.crs, found.transform = "EPSG:32630", (10.0, 0.0, 600_000.0, 0.0, -10.0, 4_220_000.0)
    return found


def spec(**head: Any) -> Spec:
    return Spec.of(PointsConfig(**head))


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("header", "line", "placed"),
    [
        ("row,col", "3,6", False),
        ("Row,Column", "3,6", True),
        ("detect_scene_row,detect_scene_column", "3,6", False),
        ("x,y", "6.5,3.5", False),
        ("map_x,map_y", "600065,4219965", True),
        ("lon,lat", "-1.86018,38.1225", True),
        ("row,col,map_x,map_y", "3,6,0,0", True),  # of two the first
    ],
)
def test_places_are_read_in_every_frame(tmp_path: Path, header: str, line: str, placed: bool) -> None:
    if "lon" in header:
        pyproj = pytest.importorskip("pyproj")
        transformer = pyproj.Transformer.from_crs("EPSG:32630", "EPSG:4326", always_xy=True)
        line = ",".join(map(str, transformer.transform(600_065, 4_219_965)))
    path = write(tmp_path / "a.csv", f"{header}\n{line}\n")
    np.testing.assert_allclose(read_points(path, spec(), image(placed=placed)).places, [[3.5, 6.5]], atol=1e-3)


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    objects = Objects(
        places=np.array([[3.25, 6.5], [30, 50]]),
        classes=np.array([1, 0]),
        scores=np.ones(2),
        attributes={"length": np.array([np.nan, 12]), "moving": np.array([1, -1], np.int8)},
    )
    wanted = spec(classes=2, class_names=["buoy", "ship"], flags=["moving"], numbers=["length"])
    for name in ("a.csv", "a.geojson"):
        for placed in (True, False):
            path = write_objects(tmp_path / name, image(placed=placed), objects, ["buoy", "ship"])
            found = read_points(path, wanted, image(placed=placed))
            np.testing.assert_allclose(found.places, objects.places, atol=1e-6)
            assert found.classes.tolist() == [1, 0]
            np.testing.assert_array_equal(found.attributes, [[1, np.nan], [np.nan, 12]])


def test_geojson_of_qupath_is_in_px(tmp_path: Path) -> None:
    feature = {
        "type": "Feature",
        "geometry": {"type": "MultiPoint", "coordinates": [[6.5, 3.5], [7, 8]]},
        "properties": {"classification": {"name": "tumour"}},
    }
    path = write(tmp_path / "a.geojson", json.dumps({"type": "FeatureCollection", "features": [feature]}))
    found = read_points(path, spec(classes=2, class_names=["stroma", "tumour"]), image())
    np.testing.assert_array_equal(found.places, [[3.5, 6.5], [8, 7]])
    assert found.classes.tolist() == [1, 1]


def test_unknown_classes_flags_and_numbers(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "row,col,Class,moving,length\n1,2,ship,True,\n3,4,,,7\n5,6,buoy,0,2\n")
    head = {"classes": 2, "class_names": ["buoy", "ship"], "flags": ["moving"], "numbers": ["length"]}
    wanted = spec(**head, logarithmic=["length"])
    found = read_points(path, wanted, image())
    assert found.classes.tolist() == [1, UNKNOWN, 0]
    np.testing.assert_array_equal(found.attributes, [[1, np.nan], [np.nan, 7], [0, 2]])
    assert class_words(path, wanted) == {"buoy", "ship"}
    np.testing.assert_allclose(known_numbers([path], wanted), np.log([[np.nan], [7], [2]]))
    np.testing.assert_array_equal(known_numbers([path, path], spec(**head))[:3], [[np.nan], [7], [2]])


def test_one_file_of_many_images(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "row,col,image\n1,2,x/a.tif\n3,4,b.tif\n5,6,a.tif\n")
    assert read_points(path, spec(), image()).places[:, 0].tolist() == [1.5, 5.5]
    path = write(tmp_path / "b.csv", "row,col,scene_id\n1,2,s1\n3,4,s2\n")
    assert read_points(path, spec(), image(), "s2").places.tolist() == [[3.5, 4.5]]
    with pytest.raises(DataError, match="none of its 2 points has the scene_id 's3'"):
        read_points(path, spec(), image(), "s3")
    assert len(read_points(path, spec(), image(), "s3", {"s1", "s2", "s3"})) == 0
    with pytest.raises(DataError, match="some have 's2', which no row of the manifest has"):
        read_points(path, spec(), image(), "s3", {"s1", "s3"})
    path = write(tmp_path / "c.csv", "row,col,scene_id\n")
    assert len(read_points(path, spec(), image(), "s3")) == 0


@pytest.mark.parametrize("low", ["ignore", "object", "background"])
def test_low_confidence(tmp_path: Path, low: Any) -> None:
    text = "row,col,is_vessel,is_fishing,vessel_length_m,confidence\n1,2,,,,HIGH\n3,4,,,,LOW\n5,6,,,,MEDIUM\n"
    flags = {"flags": ["is_vessel", "is_fishing"], "numbers": ["vessel_length_m"]}
    path = write(tmp_path / "a.csv", text)
    found = read_points(path, spec(**flags, scoring="xview3", low_confidence=low), image())
    assert found.ignored.tolist() == {"ignore": [False, True, False], "object": [False] * 3}.get(low, [False] * 2)
    assert not read_points(path, spec(**flags), image()).ignored.any()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("row,col\n1,2\n,3\n", r"a.csv line 3: expected a place in columns `row` and `col`, got nan and 3"),
        ("row,col\n1,nan\n", r"line 2: expected a place"),
        ("row,col\n1,far\n", r"line 2: expected a number in column `col`, got 'far'"),
        ("row,col\n1,2\n3,60\n", r"1 of 2 points lie outside of scenes/a.tif, 60 x 40 px, the first at row 3.5"),
        ("r,c\n1,2\n", r"expected columns with places, one of: row, col; .* got r, c"),
        ("row,col\n1,2\n", r"expected a column `class`"),
        ("row,col,class\n1,2,shp\n", r"line 2: no class 'shp' in column `class`; did you mean `ship`"),
        ("row,col,class,moving\n1,2,ship,perhaps\n", r"line 2: expected True, False or nothing in column `moving`"),
        ("row,col,class,moving,length\n1,2,ship,,0\n", r"line 2: expected a number above 0 in column `length`, got 0"),
        ("row,col,class,moving,length\n1,2,ship,,inf\n", r"line 2: expected a number above 0"),
        ("map_x,map_y,class,moving,length\n1,2,ship,,1\n", r"places are in map, but scenes/a.tif has no CRS"),
        ("", r"the file is empty"),
    ],
)
def test_what_is_refused(tmp_path: Path, text: str, message: str) -> None:
    header = text.split("\n")[0]
    head: dict[str, Any] = {}
    if "class" in header or "column `class`" in message:
        head |= {"classes": 2, "class_names": ["buoy", "ship"]}
    if "moving" in header:
        head |= {"flags": ["moving"]}
    if "length" in header:
        head |= {"numbers": ["length"], "logarithmic": ["length"]}
    with pytest.raises(DataError, match=message):
        read_points(write(tmp_path / "a.csv", text), spec(**head), image())


def test_missing_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No such file"):
        read_points(tmp_path / "none.csv", spec(), image())
    with pytest.raises(DataError, match="expected GeoJSON"):
        read_points(write(tmp_path / "a.geojson", "{"), spec(), image())
    polygon = {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": []}, "properties": {}}
    with pytest.raises(DataError, match="feature 1: expected a Point or MultiPoint, got Polygon"):
        read_points(write(tmp_path / "b.geojson", json.dumps({"features": [polygon]})), spec(), image())
    with pytest.raises(DataError, match="FeatureCollection"):
        read_points(write(tmp_path / "c.geojson", "3"), spec(), image())


def test_a_file_that_changes_is_read_anew(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "row,col\n1,2\n")
    assert len(read_points(path, spec(), image())) == 1
    write(path, "row,col\n1,2\n3,4\n")
    import os

    os.utime(path, ns=(1, 1))
    assert len(read_points(path, spec(), image())) == 2


def test_rows_of_a_scene_are_found_by_the_name_of_its_file(tmp_path: Path) -> None:
    """A manifest without a column `scene_id` does not give each image the points of all."""
    path = tmp_path / "p.csv"
    path.write_text("scene_id,row,col\na.tif,1,2\nb.tif,3,4\n")
    spec = Spec.of(PointsConfig())
    image = ArrayImage(np.zeros((20, 20, 1), np.uint8))
    image.name = "/somewhere/b.tif"
    assert read_points(path, spec, image).places.tolist() == [[3.5, 4.5]]
    assert read_points(path, spec, image, "a.tif").places.tolist() == [[1.5, 2.5]]
    image.name = "c.tif"
    with pytest.raises(DataError, match=r"none of its 2 points has the scene_id 'c.tif'"):
        read_points(path, spec, image)
