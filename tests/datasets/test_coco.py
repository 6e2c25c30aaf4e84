"""Boxes of COCO JSON and GeoJSON as manifests name them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as Pillow

from gigaxt.datasets.boxes import BoxClasses, box_classes, learnt_boxes, row_boxes
from gigaxt.datasets.coco import import_coco, read_coco
from gigaxt.datasets.manifest import Manifest
from gigaxt.errors import DataError
from gigaxt.image import open_image

CLASSES = BoxClasses(("tree", "car"), (3, 90))


def coco(**changes: Any) -> dict[str, Any]:
    """Two images, one without annotations; ids with gaps; a crowd, a box across the border, one without an area."""
    data: dict[str, Any] = {
        "images": [
            {"id": 12, "file_name": "a/one.png", "width": 40, "height": 30},
            {"id": 7, "file_name": "b/one.png", "width": 20, "height": 10},
        ],
        "categories": [{"id": 90, "name": "car"}, {"id": 3, "name": "tree"}],
        "annotations": [
            {"id": 1, "image_id": 12, "category_id": 90, "bbox": [30, 20, 15, 5], "iscrowd": 0, "area": 60},
            {"id": 5, "image_id": 12, "category_id": 3, "bbox": [1, 2, 8, 9], "area": 72},
            {
                "id": 6,
                "image_id": 12,
                "category_id": 3,
                "iscrowd": 1,
                "segmentation": {"size": [30, 40], "counts": [60, 4, 26, 4, 1106]},
            },
            {"id": 8, "image_id": 12, "category_id": 3, "bbox": [5, 5, 0, 3], "area": 0},
        ],
    }
    return {**data, **changes}


def write(folder: Path, data: Any) -> Path:
    (folder / "truth.json").write_text(json.dumps(data))
    for name, size in (("a/one.png", (40, 30)), ("b/one.png", (20, 10))):
        (folder / name).parent.mkdir(exist_ok=True)
        Pillow.new("RGB", size).save(folder / name)
    return folder / "truth.json"


def test_boxes_of_images(tmp_path: Path) -> None:
    csv = tmp_path / "out" / "data.csv"
    csv.parent.mkdir()
    found = import_coco(write(tmp_path, coco()), tmp_path, csv)
    assert found == {"images": 2, "without": 1, "boxes": 4, "crowds": 1, "empty": 1, "categories": 2}
    manifest = Manifest.read(csv)
    assert manifest.task == "detection"
    assert [row.cells["image_id"] for row in manifest.rows] == ["12", "7"]
    assert box_classes(manifest) == CLASSES
    row = manifest.rows[0]
    image = open_image(row.image)
    truth = row_boxes(row, image, CLASSES)
    assert truth.boxes_xyxy.tolist() == [[30, 20, 45, 25], [1, 2, 9, 11], [2, 0, 4, 4], [5, 5, 5, 8]]
    assert truth.classes.tolist() == [1, 0, 0, 0]
    assert truth.crowd.tolist() == [False, False, True, False]
    assert truth.areas.tolist() == [60, 72, 8, 0]
    learnt = learnt_boxes(truth, image)
    assert learnt.boxes_xyxy.tolist() == [[30, 20, 40, 25], [1, 2, 9, 11], [2, 0, 4, 4]]
    empty = row_boxes(manifest.rows[1], open_image(manifest.rows[1].image), CLASSES)
    assert [len(column) for column in empty] == [0, 0, 0, 0]
    other = row_boxes(row, image, BoxClasses(("car", "bus", "tree")))  # by name, where a model has no ids
    assert other.classes.tolist() == [0, 2, 2, 2]


def test_images_are_found_by_file_name(tmp_path: Path) -> None:
    file = read_coco(write(tmp_path, coco()))
    assert file.find(tmp_path / "a" / "one.png").id == 12
    assert file.find(tmp_path / "b" / "one.png").id == 7
    assert file.find(tmp_path / "x.png", "7").id == 7
    for path, id_ in (("c/one.png", None), ("two.png", None), ("a/one.png", "13")):
        with pytest.raises(DataError, match="a column `image_id` in the CSV says which"):
            file.find(tmp_path / path, id_)


def test_import_appends_and_names_missing_images(tmp_path: Path) -> None:
    path, csv = write(tmp_path, coco()), tmp_path / "data.csv"
    import_coco(path, tmp_path, csv, split="train")
    import_coco(path, tmp_path, csv, split="train", append=True)
    assert len(csv.read_text().splitlines()) == 5
    with pytest.raises(DataError, match="expected the columns image,boxes,image_id, got"):
        import_coco(path, tmp_path, csv, append=True)
    with pytest.raises(DataError, match=r"2 of 2 images are not in .*nowhere, such as 'a/one.png'"):
        import_coco(path, tmp_path / "nowhere", csv)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": []}, r"truth.json: expected a list `images`, got \[\]"),
        ({"images": None}, "expected a list `images`, got None"),
        ({"bbox": [1, 2, float("nan"), 4]}, r"annotation id 1: expected finite x, y, width and height"),
        ({"bbox": [1, 2, -3, 4]}, "annotation id 1: expected finite x, y"),
        ({"category_id": 4}, "annotation id 1: expected a category_id that .*truth.json lists, got 4"),
        ({"image_id": 99}, "annotation id 1: expected an image_id"),
        ({"bbox": None, "segmentation": {"size": [30, 40], "counts": "!!"}}, "annotation id 1: "),
        ({"bbox": None, "segmentation": {"size": [30, 40], "counts": [5, 5]}}, "annotation id 1: "),
        ({"bbox": None}, "annotation id 1: expected finite x, y"),
        ({"bbox": [50, 2, 3, 4]}, r"image 12: box \[50.0, 2.0, 3.0, 4.0\] .*lies outside of .*one.png, 40 x 30 px"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    data = coco()
    if "images" in changes:
        data |= changes
    else:
        data["annotations"][0] |= changes
    path = write(tmp_path, data)
    (tmp_path / "data.csv").write_text(f"image,boxes,image_id\na/one.png,{path.name},12\n")
    (row,) = Manifest.read(tmp_path / "data.csv").rows
    with pytest.raises(DataError, match=message):
        row_boxes(row, open_image(row.image), CLASSES)


def test_sizes_and_classes_that_do_not_fit(tmp_path: Path) -> None:
    data = coco()
    data["images"][0]["width"] = 41
    del data["annotations"][2]  # whose mask has the size of the image
    path = write(tmp_path, data)
    (tmp_path / "data.csv").write_text(f"image,boxes\na/one.png,{path.name}\n")
    (row,) = Manifest.read(tmp_path / "data.csv").rows
    with pytest.raises(DataError, match=r"image 12 has 41 x 30 px there, but .* has 40 x 30"):
        row_boxes(row, open_image(row.image), CLASSES)
    write(tmp_path, coco())
    with pytest.raises(DataError, match=r"category 3 \(tree\) is none of the model's \[90\]"):
        row_boxes(row, open_image(row.image), BoxClasses(("car",), (90,)))
    with pytest.raises(DataError, match="class 'car' is none of the model's; did you mean `cart`"):
        row_boxes(row, open_image(row.image), BoxClasses(("cart", "tree")))


def feature(corners: list[list[float]], **properties: Any) -> dict[str, Any]:
    return {
        "type": "Feature",
        "geometry": {"type": "Polygon", "coordinates": [corners]},
        "properties": properties,
    }


def geo_row(folder: Path, data: Any, image: str) -> Any:
    (folder / "boxes.geojson").write_text(json.dumps(data))
    (folder / "geo.csv").write_text(f"image,boxes\n{image},boxes.geojson\n")
    (row,) = Manifest.read(folder / "geo.csv").rows
    return row


def test_geojson_in_pixels_as_qupath_writes_it(tmp_path: Path) -> None:
    Pillow.new("RGB", (40, 30)).save(tmp_path / "one.png")
    corners = [[3.0, 5.0], [20.0, 5.0], [12.0, 9.0], [3.0, 5.0]]
    data = [feature(corners, classification={"name": "car"}, name="mine"), feature(corners, **{"class": "tree"})]
    row = geo_row(tmp_path, data, "one.png")
    found = row_boxes(row, open_image(row.image), BoxClasses(("car", "tree")))
    assert found.boxes_xyxy.tolist() == [[3, 5, 20, 9]] * 2
    assert found.classes.tolist() == [0, 1]
    assert box_classes(Manifest.read(tmp_path / "geo.csv")) == BoxClasses(("car", "tree"))


def test_geojson_in_the_crs_and_in_longitude_and_latitude(tmp_path: Path) -> None:
    rasterio = pytest.importorskip("rasterio")
    from rasterio.warp import transform

    with rasterio.open(
        tmp_path / "geo.tif",
        "w",
        driver="GTiff",
        width=60,
        height=40,
        count=1,
        dtype="uint8",
        crs="EPSG:32633",
        transform=rasterio.Affine(10, 0, 500_000, 0, -10, 5_000_000),
    ) as file:
        file.write(np.full((1, 40, 60), 9, np.uint8))
    box = np.array([[12.0, 8], [30, 8], [30, 20], [12, 20], [12, 8]])
    utm = box * (10, -10) + (500_000, 5_000_000)
    lon_lat = np.stack(transform("EPSG:32633", "EPSG:4326", *utm.T.tolist()), axis=1)
    named = {"type": "name", "properties": {"name": "urn:ogc:def:crs:OGC:1.3:CRS84"}}
    for corners, crs in ((utm, "EPSG:32633"), (lon_lat, None), (lon_lat, named)):
        data = {"type": "FeatureCollection", "features": [feature(corners.tolist(), label="car")]}
        row = geo_row(tmp_path, data | ({"crs": crs} if crs else {}), "geo.tif")
        found = row_boxes(row, open_image(row.image), BoxClasses(("car",)))
        np.testing.assert_allclose(found.boxes_xyxy, [[12, 8, 30, 20]], atol=0.05)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"type": "FeatureCollection"}, "expected a FeatureCollection"),
        ([feature([[1, 1], [2, 1], [2, float("nan")]])], "expected a geometry with finite corners"),
        ([feature([[1, 1], [5, 1]])], "corners around an area"),
        ([feature([[50, 1], [60, 1], [60, 9]])], r"feature 0 \(from 0\) lies outside of"),
        (
            {"type": "FeatureCollection", "features": [feature([[1, 1], [2, 1], [2, 3]])], "crs": "EPSG:3857"},
            "has no CRS to place it by",
        ),
        ([feature([[1, 1], [2, 1], [2, 3]])], "a feature has no class"),
        ([feature([[1, 1], [2, 1], [2, 3]], label="bus")], "class 'bus' is none of the model's"),
    ],
)
def test_geojson_that_does_not_fit(tmp_path: Path, data: Any, message: str) -> None:
    Pillow.new("RGB", (40, 30)).save(tmp_path / "one.png")
    row = geo_row(tmp_path, data, "one.png")
    with pytest.raises(DataError, match=message):
        row_boxes(row, open_image(row.image), BoxClasses(("car", "tree")))
