from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from gigaxt.metrics import coco_score, coco_split
from gigaxt.metrics.coco_split import take_best

Item = dict[str, Any]


def _case(seed: int) -> tuple[Item, list[Item]]:
    """Overlapping boxes and polygons, crowds, two categories, many equal scores."""
    draw = random.Random(seed)
    images = [{"id": i, "height": 150, "width": 200} for i in (4, 2, 8)]
    truth: Item = {"images": images, "categories": [{"id": 1}, {"id": 6}], "annotations": []}
    results = []
    for _ in range(40):
        x, y, w, h = draw.uniform(0, 150), draw.uniform(0, 100), draw.uniform(0, 50), draw.uniform(0, 50)
        item = {
            "image_id": draw.choice([4, 2]),
            "category_id": draw.choice([1, 6]),
            "bbox": [x, y, w, h],
            "segmentation": [[x, y, x + w, y, x, y + h]],
        }
        if draw.random() < 0.5:
            truth["annotations"].append(item | {"iscrowd": int(draw.random() < 0.2)})
        for _ in range(draw.choice([0, 1, 2])):
            box = [x + draw.gauss(0, 2), y + draw.gauss(0, 2), w, h]
            results.append(item | {"bbox": box, "score": round(draw.random(), 1)})
    draw.shuffle(results)
    return truth, results


@pytest.mark.parametrize("iou", ["bbox", "segm"])
@pytest.mark.parametrize("use_categories", [True, False])
@pytest.mark.parametrize("group", [1, 6])
def test_split_images_have_the_same_score(
    iou: Any, use_categories: bool, group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coco_split, "GROUP_ITEMS", group)
    for seed in range(8):
        truth, results = _case(seed)
        options: Item = {"iou": iou, "use_categories": use_categories, "max_dets": (2, 5, 100)}
        with monkeypatch.context() as patched:
            patched.setattr(coco_split, "SPLIT_CELLS", 0)
            got = coco_score(truth, results, **options)
        expected = coco_score(truth, results, **options)
        assert got == {key: pytest.approx(value, abs=1e-12) for key, value in expected.items()}


def test_a_mask_may_leave_its_box(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coco_split, "SPLIT_CELLS", 0)
    monkeypatch.setattr(coco_split, "GROUP_ITEMS", 1)
    truth, _ = _case(0)
    place = {"image_id": 4, "category_id": 1, "segmentation": [[10, 10, 60, 10, 60, 60, 10, 60]]}
    truth["annotations"] = [place]
    result = place | {"bbox": [150, 100, 20, 20], "score": 1}
    assert coco_score(truth, [result], iou="segm")["stats"]["AP"] == pytest.approx(1)


def test_many_objects(monkeypatch: pytest.MonkeyPatch) -> None:
    """6,000 x 6,000 overlaps would be 288 MB, and half a minute."""
    places = np.stack(np.meshgrid(np.arange(60), np.arange(100)), axis=-1).reshape(-1, 2) * 40.0
    items = [{"image_id": 1, "category_id": 1, "bbox": [x, y, 30, 30]} for x, y in places.tolist()]
    truth = {"images": [{"id": 1}], "categories": [{"id": 1}], "annotations": items}
    results = [item | {"score": i / 6000} for i, item in enumerate(items)]
    images: list[dict[int, int]] = []

    def noted(*given: list[Item]) -> Any:
        objects, found, old_image = coco_split.split(*given)
        images.append(old_image)
        return objects, found, old_image

    monkeypatch.setattr("gigaxt.metrics.coco.split", noted)
    got = coco_score(truth, results, max_dets=(600, 6000))["stats"]
    assert (got["AP"], got["AR_600"], got["AR_6000"]) == (pytest.approx(1), pytest.approx(0.1), 1)
    assert max(images[-1]) == 12  # 12,000 boxes in groups of 1,024


def test_best_of_each_category_or_of_all() -> None:
    found = [
        {"id": i, "image_id": image, "category_id": category, "score": score}
        for i, (image, category, score) in enumerate([(1, 1, 0.5), (1, 2, 0.5), (1, 1, 0.9), (2, 1, 0.5), (1, 1, 0.5)])
    ]
    best = take_best(found, 2, by_category=True)
    assert [item["id"] for item in best] == [2, 0, 1, 3]
    assert [item["score"] for item in best] == [0, -1, -2, -3]
    assert [item["id"] for item in take_best(found, 2, by_category=False)] == [2, 0, 3]
