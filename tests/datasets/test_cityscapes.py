from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from faster_coco_eval import mask as api
from PIL import Image as Pillow

from gigaxt.cli import main
from gigaxt.datasets.cityscapes import cityscapes_to_coco
from gigaxt.errors import DataError


def make(folder: Path) -> None:
    """Two cars, a group of persons, road, and an id of a class without instances."""
    values = np.full((20, 30), 7, np.int32)
    values[2:6, 3:9] = 26000
    values[4:5, 8:12] = 26001
    values[10:13, 20:30] = 24
    values[0, 0] = 11
    for name, city in (("aachen_000001", "aachen"), ("bonn_000002", "bonn")):
        (folder / "gt" / city).mkdir(parents=True)
        (folder / "left" / city).mkdir(parents=True)
        Pillow.fromarray(values.astype(np.uint16)).save(folder / "gt" / city / f"{name}_gtFine_instanceIds.png")
        Pillow.new("RGB", (30, 20)).save(folder / "left" / city / f"{name}_leftImg8bit.png")


def test_instances_become_boxes_and_groups_crowds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path)
    args = [str(tmp_path / "gt"), str(tmp_path / "left"), str(tmp_path / "out.csv"), "--split", "train"]
    assert main(["import-coco", *args]) == 0
    assert "2 images, 0 of them without annotations, 6 boxes of 8 categories, 2 crowds" in capsys.readouterr().out
    data = json.loads((tmp_path / "out.json").read_text())
    assert [image["file_name"] for image in data["images"]] == [
        "aachen/aachen_000001_leftImg8bit.png",
        "bonn/bonn_000002_leftImg8bit.png",
    ]
    found = {(a["category_id"], *a["bbox"], a["area"], a["iscrowd"]) for a in data["annotations"] if a["image_id"] == 1}
    assert found == {(26, 3, 2, 6, 4, 23, 0), (26, 8, 4, 4, 1, 4, 0), (24, 20, 10, 10, 3, 30, 1)}
    car = next(entry for entry in data["annotations"] if entry["area"] == 23)
    expected = np.zeros((20, 30), np.uint8)
    expected[2:6, 3:9], expected[4, 8] = 1, 0  # the other car is in front
    np.testing.assert_array_equal(api.decode(car["segmentation"]), expected)
    with pytest.raises(DataError, match="expected the files of gtFine"):
        cityscapes_to_coco(tmp_path / "left", tmp_path / "none.json")
