"""Detections of points against objects: matches, thresholds, scores, and the loss in the same pass."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch

from gigaxt import ConfigError, DataError
from gigaxt.datasets.manifest import Manifest
from gigaxt.found.objects import Objects
from gigaxt.found.points import decided, find
from gigaxt.image.memory import ArrayImage
from gigaxt.nn.heads import PointsConfig
from gigaxt.targets.points import UNKNOWN, PointTarget
from gigaxt.tasks.point_matching import LEFT_OUT, WRONG, Curve, match_points
from gigaxt.tasks.points import Points, fitted_points
from tiny_models import tiny_model


def test_each_detection_takes_the_nearest_free_object() -> None:
    truth = np.array([[0.0, 0], [0, 6], [50, 50], [90, 90]])
    ignored = np.array([False, False, True, False])
    found = np.array([[0.0, 4], [0, 5], [0, 3], [50, 51], [51, 50], [90, 80], [90, 80.01]])
    matched = match_points(found, truth, ignored, 10.0)
    assert matched.tolist() == [1, 0, WRONG, LEFT_OUT, LEFT_OUT, WRONG, 3]  # 10 px away is too far
    # The best k alone are matched as they are among all.
    for k in range(len(found)):
        assert match_points(found[:k], truth, ignored, 10.0).tolist() == matched[:k].tolist()
    assert match_points(found[:0], truth, ignored, 10.0).tolist() == []
    assert match_points(found[:1], truth[:0], ignored[:0], 10.0).tolist() == [WRONG]


def test_best_threshold_against_all() -> None:
    random = np.random.default_rng(0)
    for _ in range(20):
        scores = random.integers(1, 9, 12) / 10  # with ties
        right = random.random(12) < 0.5
        curve = Curve.of(scores, right, 9)

        def f1(threshold: float, scores: Any = scores, right: Any = right) -> float:
            kept = scores >= threshold
            return float(2 * (right & kept).sum() / (kept.sum() + 9))

        assert f1(curve.best_threshold(0.5)) == pytest.approx(max(f1(t) for t in np.unique(scores)))
    assert Curve.of([0.9, 0.5], np.array([False, False]), 3).best_threshold(0.3) == 0.3
    assert Curve.of([0.9, 0.5], np.array([True, False]), 1).best_threshold(0.3) == pytest.approx(0.7)


def test_average_precision_of_a_known_case() -> None:
    curve = Curve.of([0.9, 0.8, 0.7, 0.6], np.array([True, False, True, False]), 3)
    assert curve.average_precision() == pytest.approx((1 + 2 / 3) / 3)
    assert np.isnan(Curve.of([], np.zeros(0, bool), 0).average_precision())


def task(tmp_path: Path, **head: Any) -> Points:
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((64, 64), np.uint8))
    lines = "row,col,class,moving,length\n10,10,ship,True,20\n30,30,buoy,,\n50,50,,False,10\n"
    (tmp_path / "a_points.csv").write_text(lines)
    (tmp_path / "all.csv").write_text("image,points,split\na.tif,a_points.csv,train\n")
    given = {"classes": 2, "flags": ["moving"], "numbers": ["length"], **head}
    return Points(Manifest.read(tmp_path / "all.csv", task="points"), PointsConfig(**given))


def detections(places: Any, classes: Any, scores: Any, moving: Any, length: Any) -> Objects:
    return Objects(
        places=np.array(places, float).reshape(-1, 2),
        classes=np.array(classes, dtype=np.int64),
        scores=np.array(scores, float),
        attributes={"moving": np.array(moving, float), "length": np.array(length, float)},
    )


def evaluated(task: Points, found: Objects) -> Any:
    tally = task.tally()
    (row,) = task.manifest.rows
    target = task.target(row, ArrayImage(np.zeros((64, 64, 1), np.uint8)))
    tally.update([row], [target], {"found": found, "loss_sum": torch.tensor(6.0), "objects": torch.tensor(3.0)})
    return tally.compute()


def test_scores_of_a_known_case(tmp_path: Path) -> None:
    """One ship found, a buoy taken for a ship, the third object of no class, a false alarm below the threshold."""
    points = task(tmp_path)
    assert points.class_names == ("buoy", "ship")
    found = detections(
        [[10, 11], [30, 30], [50, 50], [20, 50]], [1, 1, 1, 0], [0.9, 0.8, 0.7, 0.1], [0.8, 0, 0, 0], [25, 0, 0, 0]
    )
    result = evaluated(points, found)
    # ship: right 1 of 1, wrong 1 above 0.85? The best threshold leaves the wrong one out.
    assert result.per_class["ship"]["threshold"] == pytest.approx(0.85)
    assert (result.metrics["precision"], result.metrics["recall"]) == (1.0, 0.5)
    assert result.metrics["f1"] == pytest.approx(2 / 3)
    assert result.metrics["length_mae"] == 5
    assert result.metrics["moving_f1"] == 1
    assert result.loss == 2
    head = PointsConfig(classes=2, flags=["moving"], numbers=["length"])
    points.settle(head, result)
    assert head.threshold == pytest.approx([0.3, 0.85])
    kept = decided(found, head)
    assert len(kept) == 1
    assert kept.attributes["moving"].tolist() == [1]
    fixed = evaluated(task(tmp_path, threshold=[0.05, 0.75]), found)
    assert (fixed.metrics["precision"], fixed.metrics["recall"]) == (pytest.approx(1 / 3), 0.5)


def test_nothing_found_and_nothing_there(tmp_path: Path) -> None:
    none = detections([], [], [], [], [])
    result = evaluated(task(tmp_path), none)
    assert (result.metrics["recall"], result.metrics["f1"]) == (0.0, 0.0)
    assert np.isnan(result.metrics["precision"])
    assert np.isnan(result.metrics["length_mae"])


def test_wrong_numbers_of_classes_and_unknown_attributes(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"classes is 3, but the points of .* have 2: buoy, ship"):
        task(tmp_path, classes=3)
    points = task(tmp_path, logarithmic=["length"])
    fitted = fitted_points(points.head, points.manifest)
    assert fitted.number_mean == pytest.approx([np.log([20, 10]).mean()])
    assert fitted.number_std == pytest.approx([np.log([20, 10]).std()])
    (tmp_path / "a_points.csv").write_text("row,col,class,length\n1,1,a,\n2,2,b,\n")
    with pytest.raises(DataError, match="no training image has a known `length`"):
        fitted_points(PointsConfig(classes=2, numbers=["length"]), points.manifest)


def test_found_in_one_pass_with_the_loss_of_evaluation() -> None:
    """Also where the image is resampled, has holes, and does not fill its regions."""
    head = {"kind": "points", "classes": 2, "dim": 8, "flags": ["moving"], "score": 0.008}
    pixels = np.random.default_rng(0).integers(1, 255, (100, 150, 3), dtype=np.uint8)
    pixels[:40, :70] = 0
    image = ArrayImage(pixels, nodata=0)
    target = PointTarget([[50, 20], [63.9, 64.2], [90, 140], [10, 100]], [0, 1, UNKNOWN, 1], [[1], [0], [np.nan], [1]])
    model = tiny_model(head, seed=1).double()
    found = find(model, image, target)
    expected = model.evaluate([image], [target])
    assert found.sums is not None
    for name, value in expected.items():
        torch.testing.assert_close(found.sums[name], value, rtol=1e-10, atol=0)
    assert len(found.objects)
    assert (found.objects.places <= (100, 150)).all()
    answer = model([image])[0][0].detach().sigmoid()
    assert found.objects.scores.max() == pytest.approx(float(answer[answer < 1].max()), rel=1e-6)
    turned = find(model, image)
    assert turned.sums is None
    np.testing.assert_array_equal(turned.objects.places, found.objects.places)


def test_objects_are_in_px_of_the_file() -> None:
    model = tiny_model({"kind": "points", "dim": 8, "score": 0.001}, resize_px=64)
    image = ArrayImage(np.random.default_rng(0).integers(1, 255, (128, 256, 3), dtype=np.uint8))
    places = find(model, image).objects.places
    assert places[:, 0].max() > 64
    assert places[:, 1].max() > 128


def test_intervals_are_over_groups_of_images(tmp_path: Path) -> None:
    """Twice the same image in one group, another in a second one: three draws have other scores than all."""
    points = task(tmp_path)
    for name in ("b", "c"):
        tifffile.imwrite(tmp_path / f"{name}.tif", np.zeros((64, 64), np.uint8))
    (tmp_path / "all.csv").write_text(
        "image,points,split,group\na.tif,a_points.csv,val,1\nb.tif,a_points.csv,val,1\nc.tif,a_points.csv,val,2\n"
    )
    points = Points(
        Manifest.read(tmp_path / "all.csv", task="points"),
        replace(points.head, threshold=[0.5, 0.5], flag_threshold=[0.5]),
    )
    good = detections([[10, 10], [30, 30]], [1, 0], [0.9, 0.8], [0.8, 0], [22, 0])
    bad = detections([[10, 10], [50, 20]], [1, 1], [0.9, 0.8], [0.1, 0], [30, 0])
    tally = points.tally()
    for row, found in zip(points.manifest.rows, (good, good, bad), strict=True):
        target = points.target(row, ArrayImage(np.zeros((64, 64, 1), np.uint8)))
        tally.update([row], [target], {"found": found})
    result = tally.compute()
    # right, wrong, to find: (2, 0, 2) twice and (1, 1, 2)
    assert result.metrics["f1"] == pytest.approx(10 / 12)
    assert result.intervals["f1"] == (0.5, 1.0)
    assert result.intervals["precision"] == (0.5, 1.0)
    assert result.metrics["length_mae"] == pytest.approx(14 / 3)
    assert result.intervals["length_mae"] == (2.0, 10.0)
    assert result.intervals["moving_f1"] == (0.0, 1.0)
    assert "average_precision" not in result.intervals
    scores = tally.scoring(tally.thresholds())(torch.tensor([[1.0, 2, 0], [0, 0, 1], [2, 1, 0]]).double())
    assert scores["f1"].tolist() == pytest.approx([2 * (2 + 2) / (4 + 2 + 6), 2 * (4 + 1) / (5 + 1 + 6), 1.0])
