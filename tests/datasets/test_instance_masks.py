"""Masks of a manifest's objects, from COCO JSON and GeoJSON, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faster_coco_eval import mask as api
from PIL import Image as Pillow

from gigaxt import DataError, open_image
from gigaxt.datasets.check import check_manifest
from gigaxt.datasets.instances import BROKEN, EMPTY, FITS, NO_MASK, OTHER_SIZE, OUTSIDE
from gigaxt.datasets.manifest import Manifest
from gigaxt.nn.heads import MaskRCNNConfig
from gigaxt.tasks import Instances

HEIGHT, WIDTH = 40, 60


def discs() -> np.ndarray:
    y, x = np.mgrid[:HEIGHT, :WIDTH] + 0.5
    return np.stack([np.hypot(x - 20, y - 15) < 8, np.hypot(x - 58, y - 30) < 9])


def counts_of(mask: np.ndarray) -> list[int]:
    flat = np.concatenate([[0], mask.T.ravel(), [2]])
    edges = np.flatnonzero(np.diff(flat))
    return np.diff(edges, prepend=0).tolist()


def task_of(folder: Path, annotations: list[dict[str, Any]]) -> Instances:
    Pillow.fromarray(np.zeros((HEIGHT, WIDTH, 3), np.uint8)).save(folder / "a.png")
    base = {"image_id": 7, "category_id": 3, "iscrowd": 0}
    truth = {
        "images": [{"id": 7, "file_name": "a.png", "height": HEIGHT, "width": WIDTH}, {"id": 8, "file_name": "b.png"}],
        "categories": [{"id": 3, "name": "disc"}],
        "annotations": [{"id": 10 + i, **base, **item} for i, item in enumerate(annotations)],
    }
    (folder / "truth.json").write_text(json.dumps(truth))
    (folder / "data.csv").write_text("image,boxes,split\na.png,truth.json,val\n")
    return task(folder)


def task(folder: Path) -> Instances:
    return Instances(Manifest.read(folder / "data.csv", task="detection"), MaskRCNNConfig(classes=1))


def masks_of(task: Instances) -> tuple[Any, np.ndarray]:
    """The target, and its masks as COCO's own code decodes them."""
    row = task.manifest.rows[0]
    target = task.target(row, open_image(row.image))
    return target, np.moveaxis(np.asarray([api.decode(rle) for rle in target.truth_masks]), 0, 0)


def test_polygons_and_run_lengths(tmp_path: Path) -> None:
    """In the order of the file, whatever stands between them; crowds are ignored, what has no area is left out."""
    first, second = discs()
    encoded = api.encode(np.asfortranarray(second.astype(np.uint8)))
    text = {"size": [HEIGHT, WIDTH], "counts": encoded["counts"].decode()}
    task = task_of(
        tmp_path,
        [
            {"bbox": [12, 7, 16, 16], "segmentation": {"size": [HEIGHT, WIDTH], "counts": counts_of(first)}},
            {"bbox": [5, 5, 0, 3], "segmentation": [[5, 5, 5, 8, 5, 6]]},
            {"image_id": 8, "bbox": [1, 1, 2, 2], "segmentation": []},
            {"bbox": [49, 21, 11, 18], "segmentation": text, "iscrowd": 1},
            {"bbox": [2, 20, 20, 10], "segmentation": [[2, 20, 22, 20, 22, 30, 2, 30], [40, 2, 44, 2, 44, 6, 40, 6]]},
            {"bbox": [0, 0, 4, 5], "segmentation": [], "iscrowd": 1},
        ],
    )
    target, masks = masks_of(task)
    np.testing.assert_array_equal(masks[0], first)
    np.testing.assert_array_equal(masks[2], second)
    assert masks[3].sum() == 200 + 16
    assert masks[4].sum() == 20
    assert target.boxes.ignored.tolist() == [False, True, False, True]
    for crop, mask in zip(target.crops, masks[[0, 2, 3, 4]], strict=True):
        h, w = crop.pixels.shape
        np.testing.assert_array_equal(mask[crop.y : crop.y + h, crop.x : crop.x + w], crop.pixels)
        assert crop.pixels.sum() == mask.sum()


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        (
            None,
            "annotation id 10: expected polygons or run lengths.*; without masks learn boxes, with head.kind detect",
        ),
        ([], "without masks learn boxes"),
        ([[1, 2, 3]], "annotation id 10: expected a polygon of three or more"),
        ([[1, 2, 3, float("nan"), 5, 6]], "expected a polygon in an image"),
        ({"size": [40, 60], "counts": [1, 2]}, "run lengths that add up to 2400 pixels, got 3"),
        ({"size": [60, 40], "counts": "abc"}, "run lengths of the image's size"),
        ({"size": [40, 60], "counts": "\x00"}, "compressed run lengths"),
        ("circle", "expected polygons or run lengths"),
        ([["a", "b", "c", "d", "e", "f"]], "expected a polygon"),
    ],
)
def test_broken_masks_are_named(tmp_path: Path, segmentation: Any, message: str) -> None:
    task = task_of(tmp_path, [{"bbox": [1, 1, 5, 5], "segmentation": segmentation}])
    with pytest.raises(DataError, match=message):
        masks_of(task)


def test_polygons_of_geojson_with_holes(tmp_path: Path) -> None:
    ring, hole = [[4, 4], [24, 4], [24, 24], [4, 24], [4, 4]], [[10, 10], [14, 10], [14, 14], [10, 14], [10, 10]]
    apart = [[[40, 5], [45, 5], [45, 10], [40, 10], [40, 5]]]
    shapes = [("Polygon", [ring, hole]), ("MultiPolygon", [[ring], apart])]
    features = [
        {"type": "Feature", "properties": {"class": "disc"}, "geometry": {"type": kind, "coordinates": coordinates}}
        for kind, coordinates in shapes
    ]
    Pillow.fromarray(np.zeros((HEIGHT, WIDTH, 3), np.uint8)).save(tmp_path / "a.png")
    (tmp_path / "data.csv").write_text("image,boxes,split\na.png,a.geojson,val\n")
    (tmp_path / "a.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    target, masks = masks_of(task(tmp_path))
    assert masks.sum(axis=(1, 2)).tolist() == [400 - 16, 400 + 25]
    assert masks[0, 4:24, 4:24].sum() == 384
    assert not masks[0, 10:14, 10:14].any()
    assert target.boxes.boxes_xyxy.tolist() == [[4, 4, 24, 24], [4, 4, 45, 24]]
    features[0]["geometry"] = {"type": "LineString", "coordinates": ring}
    (tmp_path / "a.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    with pytest.raises(DataError, match=r"feature 0 .*expected a Polygon or MultiPolygon as its mask"):
        masks_of(task(tmp_path))


def test_check_counts_masks_that_do_not_fit(tmp_path: Path) -> None:
    square = [[4, 4, 14, 4, 14, 14, 4, 14]]
    task_of(
        tmp_path,
        [
            {"bbox": [4, 4, 10, 10], "segmentation": square},
            {"bbox": [4, 4, 8.5, 10], "segmentation": square},  # 1.5 px beyond
            {"bbox": [4, 4, 7, 10], "segmentation": square},
            {"bbox": [4, 4, 7, 10]},
            {"bbox": [4, 4, 7, 10], "iscrowd": 1},
            {"bbox": [4, 4, 7, 10], "segmentation": {"size": [HEIGHT, WIDTH], "counts": [HEIGHT * WIDTH]}},
            {"bbox": [4, 4, 7, 10], "segmentation": {"size": [WIDTH, HEIGHT], "counts": [HEIGHT * WIDTH]}},
            {"bbox": [4, 4, 7, 10], "segmentation": [[1, 2, 3]]},
        ],
    )
    report = check_manifest(tmp_path / "data.csv")
    assert report.object_masks == {FITS: 2, OUTSIDE: 1, NO_MASK: 1, EMPTY: 1, OTHER_SIZE: 1, BROKEN: 1}
    text = "\n".join(report.lines())
    assert "        1  with a mask that reaches more than 2 px beyond its box" in text
    assert any(line.startswith("5 objects have no mask, or one that does not fit") for line in report.proposals())
    assert report.ok
    task_of(tmp_path, [{"bbox": [4, 4, 10, 10]}])  # boxes alone
    report = check_manifest(tmp_path / "data.csv")
    assert "masks of objects" not in "\n".join(report.lines())
    assert not any("mask_rcnn" in line for line in report.proposals())
