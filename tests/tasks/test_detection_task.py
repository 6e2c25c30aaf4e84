"""Scores of detection: COCO's AP on what was found, F1 at one score, and which objects count as found."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from gigaxt.datasets.manifest import Manifest
from gigaxt.errors import ConfigError, DataError
from gigaxt.found.objects import Objects
from gigaxt.image import open_image
from gigaxt.metrics import coco_score
from gigaxt.nn.heads import DetectConfig
from gigaxt.tasks import Detection, make_task
from gigaxt.tasks.box_matching import FALSE, FOUND, IGNORED, match

BOX = [10.0, 10, 20, 20]


def iou(a: list[float], b: list[float], *, of_a: bool) -> float:
    w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(w, 0) * max(h, 0)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return shared / (areas[0] if of_a else sum(areas) - shared)


def test_match_equals_a_plain_loop() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        low = rng.uniform(0, 40, (70, 2))
        boxes = np.concatenate([low, low + rng.uniform(5, 20, (70, 2))], axis=1)
        classes, ignored = rng.integers(0, 2, 70), rng.random(70) < 0.2
        true, found = slice(0, 30), slice(30, 70)
        expected, free = [], [True] * 30
        for i in range(30, 70):
            best, at = FALSE, None
            for want_ignored in (False, True):
                overlaps = [
                    (iou(boxes[i].tolist(), boxes[j].tolist(), of_a=want_ignored), -j)
                    for j in range(30)
                    if classes[j] == classes[i] and bool(ignored[j]) == want_ignored and (free[j] or want_ignored)
                ]
                if overlaps and max(overlaps)[0] >= 0.3 and best == FALSE:
                    best, at = (IGNORED if want_ignored else FOUND), -max(overlaps)[1]
            if best == FOUND and at is not None:
                free[at] = False
            expected.append(best)
        args = boxes[found], classes[found], boxes[true], classes[true], ignored[true]
        assert match(*args, iou=0.3).tolist() == expected
        assert {FOUND, FALSE, IGNORED} <= set(expected)
    nothing = np.zeros((0, 4)), np.zeros(0, np.int64)
    assert match(*nothing, *nothing, np.zeros(0, np.bool_)).tolist() == []


def make(folder: Path, truth: list[dict[str, Any]], **head: Any) -> tuple[Detection, list[Any]]:
    from PIL import Image as Pillow

    images = [{"id": i, "file_name": f"{i}.png", "width": 60, "height": 40} for i in (1, 2)]
    for i in (1, 2):
        Pillow.new("RGB", (60, 40)).save(folder / f"{i}.png")
    annotations = [{"id": i + 1, **entry} for i, entry in enumerate(truth)]
    categories = [{"id": 5, "name": "car"}, {"id": 9, "name": "tree"}]
    data = {"images": images, "categories": categories, "annotations": annotations}
    (folder / "truth.json").write_text(json.dumps(data))
    (folder / "data.csv").write_text("image,boxes,split\n1.png,truth.json,val\n2.png,truth.json,val\n")
    config = DetectConfig(**{"classes": 2, "threshold": 0.5, **head})
    manifest = Manifest.read(folder / "data.csv", task="detection")
    task = make_task(config, manifest)
    assert isinstance(task, Detection)
    return task, [task.target(row, open_image(row.image)) for row in manifest.rows]


def objects(boxes: Any, scores: list[float], classes: list[int]) -> Objects:
    array: NDArray[np.float64] = np.array(boxes, dtype=np.float64).reshape(-1, 4)
    return Objects(
        places=(array[:, 1::-1] + array[:, :1:-1]) / 2,
        classes=np.array(classes, dtype=np.int64),
        scores=np.array(scores),
        boxes_xyxy=array,
    )


TRUTH = [
    {"image_id": 1, "category_id": 5, "bbox": [10, 10, 10, 10], "area": 60},
    {"image_id": 1, "category_id": 9, "bbox": [30, 10, 10, 10], "area": 100},
    {"image_id": 2, "category_id": 5, "bbox": [0, 0, 60, 40], "iscrowd": 1, "area": 2400},
    {"image_id": 2, "category_id": 9, "bbox": [2, 2, 20, 30], "area": 600},
]


def test_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task, targets = make(tmp_path, TRUTH)
    assert task.class_names == ("car", "tree")
    assert task.class_counts("val") == [1, 2]
    assert targets[1].ignored.tolist() == [True, False]
    found = [
        objects([BOX, [31, 10, 41, 20], [1, 30, 9, 39]], [0.9, 0.4, 0.3], [0, 1, 0]),
        objects([[5, 5, 20, 20], [2, 2, 22, 30], [40, 2, 50, 12]], [0.8, 0.7, 0.6], [0, 1, 1]),
    ]
    tally = task.tally()
    for row, target, answer in zip(task.manifest.rows, targets, found, strict=True):
        tally.update([row], [target], {"loss_sum": 6.0, "answering": 4.0, "objects": answer})
    result = tally.compute()
    # From 0.5 on: 2 found, 1 in a crowd, 1 of nothing, 3 to find.
    assert result.metrics["precision"] == pytest.approx(2 / 3)
    assert result.metrics["recall"] == pytest.approx(2 / 3)
    assert result.metrics["f1"] == pytest.approx(2 / 3)
    # With that of 0.4, too, all are found.
    assert (result.metrics["best_f1"], result.metrics["best_threshold"]) == (pytest.approx(6 / 7), 0.4)
    assert result.loss == 12 / 8
    predictions = [
        {"image_id": i, "category_id": (5, 9)[c], "score": s, "bbox": [b[0], b[1], b[2] - b[0], b[3] - b[1]]}
        for i, found_in in enumerate(found, start=1)
        for b, c, s in zip(found_in.boxes_xyxy.tolist(), found_in.classes, found_in.scores.tolist(), strict=True)
    ]
    expected = coco_score(tmp_path / "truth.json", predictions)
    for name in ("AP", "AP50", "AP75"):
        assert result.metrics[name] == pytest.approx(expected["stats"][name], abs=1e-12)
    assert {name: row["AP"] for name, row in result.per_class.items()} == {
        "car": expected["per_category_AP"]["5"],
        "tree": expected["per_category_AP"]["9"],
    }
    assert [row["boxes"] for row in result.per_class.values()] == [1, 2]
    assert set(result.intervals) == {"AP", "AP50", "f1", "precision", "recall"}
    low, high = result.intervals["AP"]
    assert 0 <= low <= result.metrics["AP"] + 1e-9
    assert result.metrics["AP"] - 1e-9 <= high <= 1
    monkeypatch.setattr("gigaxt.tasks.detection.MOST_DRAWN", 5)
    assert "AP" not in tally.compute().intervals
    assert any("AP has no interval: 6 predictions" in note for note in tally.compute().notes)
    assert [Path(case.image).name for case in result.worst] == ["1.png", "2.png"]  # equally bad
    assert "F1 0.667: 1 of 1 objects found, 1 predictions of nothing" in result.worst[1].caption
    task.settle(task.head, result)
    assert task.head.threshold == 0.5  # as the user set it
    opened, _ = make(tmp_path, TRUTH, threshold=None)
    for old in (None, 0.9):  # settled once, it is still open to a better model's
        opened.head.threshold = old
        opened.settle(opened.head, result)
        assert opened.head.threshold == 0.4
    part = tally.select(lambda row: row.image.name == "1.png")
    assert part.merged(tally.select(lambda row: row.image.name == "2.png")).compute().metrics == tally.compute().metrics


def test_nothing_found_and_nothing_to_find(tmp_path: Path) -> None:
    for truth, ap in ((TRUTH, 0.0), ([], math.nan)):
        task, targets = make(tmp_path, truth, threshold=None)
        tally = task.tally()
        nothing = {"loss_sum": 0.0, "answering": 0.0, "objects": objects([], [], [])}
        tally.update([task.manifest.rows[0]], [targets[0]], nothing)
        metrics = tally.compute().metrics
        assert metrics["AP"] == ap or (math.isnan(ap) and math.isnan(metrics["AP"]))
        assert math.isnan(metrics["best_threshold"])
        task.settle(task.head, tally.compute())
        assert task.head.threshold is None
    with pytest.raises(DataError, match="no image to evaluate"):
        task.tally().compute()


def test_more_objects_than_coco_scores(tmp_path: Path) -> None:
    """150 in one image, all found: AP is 1, where COCO's own 100 would leave a third out."""
    boxes = [[(i % 20) * 3, (i // 20) * 5, 2, 4] for i in range(150)]
    truth = [{"image_id": 1, "category_id": 5, "bbox": box, "area": 8} for box in boxes]
    task, targets = make(tmp_path, truth)
    tally = task.tally()
    found = objects([[x, y, x + w, y + h] for x, y, w, h in boxes], np.linspace(1, 0.6, 150).tolist(), [0] * 150)
    answer = {"loss_sum": 0.0, "answering": 0.0, "objects": found}
    tally.update([task.manifest.rows[0]], [targets[0]], answer)
    result = tally.compute()
    assert result.metrics["AP"] == pytest.approx(1)
    assert any("up to 150 predictions" in note for note in result.notes)


def test_classes_of_head_and_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model.head.classes is 3, but the boxes of .* have 2: car, tree"):
        make(tmp_path, TRUTH, classes=3)
    task, targets = make(tmp_path, TRUTH, class_names=["tree", "car"])
    assert targets[0].classes.tolist() == [1, 0]
    assert task.class_names == ("tree", "car")
