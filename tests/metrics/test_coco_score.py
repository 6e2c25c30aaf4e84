from __future__ import annotations

import copy
import json
import math
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from naive_coco import naive_stats

from gigaxt.errors import ConfigError, DataError, GigaxtError
from gigaxt.metrics import coco_score

Item = dict[str, Any]


@pytest.mark.parametrize(
    ("case", "run"),
    [
        ("bbox_01", "bbox"),
        ("bbox_01", "bbox_class_agnostic"),
        ("segm_01", "segm"),
        ("segm_01", "bbox"),
        ("real_val2014_100", "bbox"),
        ("real_val2014_100", "segm"),
        ("real_val2014_100", "bbox_only_images_with_detections"),
        ("real_val2014_100", "segm_only_images_with_detections"),
    ],
)
def test_equals_pycocotools(case: str, run: str, fixtures: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = fixtures / "coco_map_cases" / case
    expected = json.loads((folder / "expected.json").read_text())["runs"][run]
    iou = expected["args"]["iou"]
    results = folder / ("dt.json" if (folder / "dt.json").exists() else f"dt_{iou}.json")
    truth: Any = folder / "gt.json"
    if "only_images" in run:
        truth = json.loads(truth.read_text())
        seen = {result["image_id"] for result in json.loads(results.read_text())}
        truth["images"] = [image for image in truth["images"] if image["id"] in seen]
        truth["annotations"] = [item for item in truth["annotations"] if item["image_id"] in seen]
    got = coco_score(truth, results, iou=iou, use_categories=bool(expected["args"].get("useCats", 1)))
    assert list(got["stats"]) == list(expected["stats"])
    for key in ("stats", "per_category_AP"):
        assert got[key] == pytest.approx(expected[key], abs=1e-12)
    assert capfd.readouterr() == ("", "")


def _truth(*boxes: list[float], **columns: Any) -> Item:
    return {
        "images": [{"id": 5, "height": 100, "width": 200}, {"id": 9, "height": 100, "width": 200}],
        "categories": [{"id": 3, "name": "a"}, {"id": 90, "name": "b"}],
        "annotations": [
            {"id": i, "image_id": 5, "category_id": 3, "bbox": box, "area": box[2] * box[3], "iscrowd": 0} | columns
            for i, box in enumerate(boxes)
        ],
    }


def _results(*boxes: list[float], **columns: Any) -> list[Item]:
    return [
        {"image_id": 5, "category_id": 3, "bbox": box, "score": 0.9 - i / 100} | columns for i, box in enumerate(boxes)
    ]


def _random_case(seed: int) -> tuple[Item, list[Item]]:
    draw = random.Random(seed)
    truth, results = _truth(), []
    truth["annotations"] = []
    for _ in range(draw.randint(1, 25)):
        w, h = draw.choice([20, 60, 150]), draw.choice([20, 60, 100])
        box = [draw.uniform(0, 200 - w), draw.uniform(0, 101 - h), w, h]
        place = {"image_id": draw.choice([5, 9]), "category_id": draw.choice([3, 90])}
        crowd = int(draw.random() < 0.15)
        area = w * h * draw.choice([1, 0.5])
        truth["annotations"].append(place | {"id": len(results) + 1, "bbox": box, "area": area, "iscrowd": crowd})
        for _ in range(draw.randint(0, 2)):
            shifted = [max(0, side + draw.gauss(0, 4)) for side in box]
            results.append(place | {"bbox": shifted, "score": round(draw.random(), 1 if seed % 2 else 9)})
    return truth, results


def test_equals_plain_loops() -> None:
    for seed in range(15):
        truth, results = _random_case(seed)
        for limits in ((1, 10, 100), (1, 2)):
            got = coco_score(truth, results, max_dets=limits)["stats"]
            assert got == pytest.approx(naive_stats(truth, results, limits), abs=1e-12), seed


def test_input_is_not_changed() -> None:
    truth, results = _random_case(0)
    before = copy.deepcopy((truth, results))
    coco_score(truth, results)
    assert (truth, results) == before


def test_ids_may_be_anything() -> None:
    """0, gaps, numbers beyond 32 bits, text, whole floats and numpy's; equal scores go by the order of the ids."""
    for seed in (1, 3, 5):
        truth, results = _random_case(seed)
        expected = coco_score(truth, results)
        for images, categories in (({5: 0, 9: 2**40}, {3: 0, 90: 7}), ({5: "a", 9: "b"}, {3: "x", 90: "y"})):
            new_truth, new_results = copy.deepcopy((truth, results))
            for item in (*new_truth["annotations"], *new_results):
                item["image_id"] = images[item["image_id"]]
                item["category_id"] = categories[item["category_id"]]
            new_truth["images"] = [image | {"id": images[image["id"]]} for image in truth["images"][::-1]]
            new_truth["categories"] = [{"id": categories[c["id"]]} for c in truth["categories"][::-1]]
            got = coco_score(new_truth, new_results)
            assert got["stats"] == expected["stats"]
            assert list(got["per_category_AP"]) == [str(categories[3]), str(categories[90])]
    as_numpy = [
        item | {"image_id": np.int64(item["image_id"]), "category_id": float(item["category_id"])} for item in results
    ]
    assert coco_score(truth, as_numpy) == expected


def test_first_annotation_may_have_id_0() -> None:
    box = [10.0, 10.0, 40.0, 40.0]
    assert coco_score(_truth(box), _results(box))["stats"]["AP"] == pytest.approx(1)


def test_max_dets_beyond_100() -> None:
    boxes = [[float(x), float(y), 8.0, 8.0] for x in range(0, 200, 10) for y in range(0, 100, 10)]
    truth, results = _truth(*boxes), [r | {"score": 0.5} for r in _results(*boxes)]
    usual = coco_score(truth, results)["stats"]
    assert usual["AR_100"] == pytest.approx(0.5)
    got = coco_score(truth, results, max_dets=(200, 100))["stats"]
    assert list(got)[6:8] == ["AR_100", "AR_200"]
    assert (got["AP"], got["AR_200"], got["AR_small"]) == (pytest.approx(1), 1, 1)
    assert coco_score(truth, results, max_dets=[500])["stats"]["AP50"] == pytest.approx(1)


def test_no_predictions() -> None:
    got = coco_score(_truth([10, 10, 40, 40]), [])
    assert got["stats"]["AP"] == got["stats"]["AR_100"] == 0
    assert got["stats"]["AP_small"] == -1
    assert got["per_category_AP"] == {"3": 0, "90": -1}
    assert coco_score(_truth([10, 10, 40, 40]), [], use_categories=False)["stats"]["AP"] == 0
    assert coco_score(_truth([10, 10, 40, 40], segmentation=[[1, 1, 9, 1, 9, 9]]), [], iou="segm")["stats"]["AP"] == 0


def test_no_objects() -> None:
    for use_categories in (True, False):
        got = coco_score(_truth(), _results([10, 10, 40, 40]), use_categories=use_categories)
        assert set(got["stats"].values()) == {-1}
    assert coco_score(_truth(), [])["per_category_AP"] == {"3": -1, "90": -1}


def test_boxes_without_area_overlap_with_nothing() -> None:
    box, flat = [10.0, 10.0, 40.0, 40.0], [10.0, 10.0, 0.0, 40.0]
    assert coco_score(_truth(box, flat), _results(box))["stats"]["AR_100"] == 0.5
    assert coco_score(_truth(box), _results(flat, box))["stats"]["AP"] == pytest.approx(0.5)
    assert coco_score(_truth(flat), _results(flat))["stats"]["AP"] == 0


def test_boxes_outside_the_image() -> None:
    box = [-500.0, -10.0, 4000.0, 40.0]
    assert coco_score(_truth(box), _results(box))["stats"]["AP"] == pytest.approx(1)


def test_missing_iscrowd_and_area() -> None:
    boxes = [[10.0, 10.0, 20.0, 20.0], [60.0, 10.0, 40.0, 40.0]]
    truth = _truth(*boxes)
    expected = coco_score(truth, _results(boxes[0]))
    for item in truth["annotations"]:
        del item["iscrowd"], item["area"], item["id"]
    assert coco_score(truth, _results(boxes[0])) == expected
    assert expected["stats"]["AR_small"] == 1
    assert expected["stats"]["AR_medium"] == 0


def test_a_crowd_forgives_and_ignore_is_not_read() -> None:
    box, other = [10.0, 10.0, 40.0, 40.0], [100.0, 10.0, 40.0, 40.0]
    truth = _truth(box, other, ignore=1)
    truth["annotations"][1]["iscrowd"] = 1
    inside = [105.0, 20.0, 10.0, 10.0]
    assert coco_score(truth, _results(inside, inside, box))["stats"]["AP"] == pytest.approx(1)


SQUARE = [[10.0, 10.0, 50.0, 10.0, 50.0, 50.0, 10.0, 50.0]]
"""40 x 40 px of 100 x 200."""
RUNS = {"size": [100, 200], "counts": [1010, *([40, 60] * 39), 40, 100 * 200 - 1010 - 39 * 100 - 40]}


def test_masks_of_all_kinds_are_the_same() -> None:
    from faster_coco_eval import mask as api

    packed = api.segmToRle(RUNS, 200, 100)
    text = packed | {"counts": packed["counts"].decode()}
    for shape in (SQUARE, RUNS, packed, text):
        truth = _truth([10, 10, 40, 40], segmentation=shape)
        for result in (SQUARE, RUNS, packed, text):
            (given,) = _results([10, 10, 40, 40], segmentation=result)
            assert coco_score(truth, [given], iou="segm")["stats"]["AP"] == pytest.approx(1)
            given.pop("bbox")
            for iou in ("segm", "bbox"):
                assert coco_score(truth, [given], iou=iou)["stats"]["AP"] == pytest.approx(1)
        given["bbox"], given["segmentation"] = [10, 10, 40, 40], []
        assert coco_score(truth, [given], iou="segm")["stats"]["AP"] == pytest.approx(1)
    del truth["annotations"][0]["area"]
    assert coco_score(truth, [given], iou="segm")["stats"]["AR_medium"] == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_id": 7}, "expected an image_id that truth lists, got 7"),
        ({"image_id": "7.png"}, "got '7.png'; `gigaxt predict` takes ids from the CSV's column image_id"),
        ({"image_id": "5"}, "got '5'"),
        ({"image_id": [5]}, r"got \[5\]"),
        ({"category_id": 4}, "expected a category_id that truth lists, got 4"),
        ({"category_id": None}, "got None"),
        ({"score": math.nan}, "expected a finite number as score, got nan"),
        ({"score": None}, "expected a finite number as score, got None"),
        ({"bbox": [1, 2, 3]}, r"expected finite x, y, width and height \(at least 0\) as bbox, got \[1, 2, 3\]"),
        ({"bbox": [1, math.nan, 3, 4]}, "expected finite x, y"),
        ({"bbox": [1, 2, -3, 4]}, "expected finite x, y"),
        ({"bbox": "1234567"}, "expected finite x, y"),
        ({"bbox": 7}, "expected finite x, y"),
        ({"bbox": []}, "expected `bbox` or `segmentation`, got neither"),
    ],
)
def test_predictions_that_do_not_fit(change: Item, message: str) -> None:
    results = _results([1, 2, 3, 4], [1, 2, 3, 4])
    results[1] |= change
    for use_categories in (True, False):
        with pytest.raises(DataError, match=rf"^predictions: prediction 1 \(from 0\): .*{message}"):
            coco_score(_truth([1, 2, 3, 4]), results, use_categories=use_categories)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_id": 7}, "expected an image_id that .*, got 7"),
        ({"category_id": 4}, "expected a category_id that .*, got 4"),
        ({"bbox": None}, "expected finite x, y, width and height"),
        ({"area": math.inf}, "expected a finite number of at least 0 as area, got inf"),
        ({"area": -1}, "expected .* as area, got -1"),
        ({"iscrowd": "0"}, "expected 0 or 1 as iscrowd, got '0'"),
    ],
)
def test_annotations_that_do_not_fit(change: Item, message: str, tmp_path: Path) -> None:
    path = tmp_path / "gt.json"
    path.write_text(json.dumps(_truth([1, 2, 3, 4], id=17, **change)))
    with pytest.raises(DataError, match=rf"gt\.json: annotation id 17: {message}"):
        coco_score(path, [])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": []}, r"truth: expected a list `images`, got \[\]"),
        ({"images": None}, "truth: expected a list `images`, got None"),
        ({"categories": {}}, "truth: expected a list `categories`"),
        ({"annotations": None}, "truth: expected a list `annotations`"),
        ({"annotations": [3]}, r"truth: annotation 0 \(from 0\): expected an object, got 3"),
        ({"images": [{"id": 5}, {"id": 5}]}, "truth: expected every id once in `images`, got 5 2 times"),
        (
            {"images": [{"id": 5}, {"id": "6"}]},
            "truth: expected an `id` for each of `images`, all whole numbers or all",
        ),
        ({"categories": [{"name": "a"}]}, "truth: expected an `id` for each of `categories`"),
        ({"categories": [3]}, "truth: expected an `id` for each of `categories`"),
    ],
)
def test_truth_that_does_not_fit(change: Item, message: str) -> None:
    with pytest.raises(DataError, match=message):
        coco_score(_truth([1, 2, 3, 4]) | change, [])


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    truth = _truth([1, 2, 3, 4])
    with pytest.raises(DataError, match=r"nothing\.json: No such file or directory; expected a JSON file"):
        coco_score(truth, tmp_path / "nothing.json")
    path = tmp_path / "broken.json"
    path.write_text('[{"image_id": 5,')
    with pytest.raises(DataError, match=r"broken\.json: not readable as JSON: .* line 1 column"):
        coco_score(truth, str(path))
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match=r"broken\.json: not readable as JSON"):
        coco_score(path, [])
    for wrong in (truth, "{}"):
        path.write_text(json.dumps(wrong))
        with pytest.raises(
            DataError, match=r"broken\.json: expected COCO results, a list of predictions, got (dict|str)"
        ):
            coco_score(truth, path)
    path.write_text("[]")
    with pytest.raises(DataError, match=r"broken\.json: expected COCO JSON, an object with `images`, got list"):
        coco_score(path, [])


def test_masks_that_do_not_fit() -> None:
    truth = _truth([10, 10, 40, 40], segmentation=SQUARE)
    with pytest.raises(DataError, match="annotation id 0: expected polygons or run lengths as segmentation, got None"):
        coco_score(_truth([10, 10, 40, 40]), [], iou="segm")
    with pytest.raises(
        DataError, match=r"prediction 0 .* run lengths of the image's size, \[100, 200\], got \[200, 100\]"
    ):
        coco_score(truth, _results([1, 2, 3, 4], segmentation=RUNS | {"size": [200, 100]}), iou="segm")
    for size in ({}, {"height": 0, "width": 3}, {"height": 1.5, "width": 2}):
        truth["images"][0] = {"id": 5} | size
        with pytest.raises(DataError, match="expected truth to give height and width of its image, got"):
            coco_score(truth, [], iou="segm")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"iou": "keypoints"}, "iou: expected one of bbox, segm, got 'keypoints'"),
        ({"max_dets": ()}, "max_dets: expected one or more whole numbers above 0"),
        ({"max_dets": (0, 1)}, "max_dets"),
        ({"max_dets": (1.5,)}, "max_dets"),
    ],
)
def test_options_out_of_range(options: Item, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        coco_score(_truth([1, 2, 3, 4]), [], **options)


@pytest.mark.parametrize("iou", ["bbox", "segm"])
def test_without_faster_coco_eval(iou: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    with pytest.raises(GigaxtError, match="coco_score needs faster-coco-eval: pip install"):
        coco_score(_truth([1, 2, 3, 4], segmentation=SQUARE), [], iou=iou)
