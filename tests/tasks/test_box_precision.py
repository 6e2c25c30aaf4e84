"""Average precision of drawn images equals COCO's of a data set that has them so often."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from gigaxt.datasets.boxes import RowBoxes
from gigaxt.found.objects import Objects
from gigaxt.metrics import coco_score
from gigaxt.tasks.box_precision import average_precision, rank

CLASSES, MOST = 3, 12


def drawn_image(random: np.random.Generator, objects: int) -> tuple[RowBoxes, Objects]:
    """Objects and crowds, found up to some px away, often or not at all; scores are equal in other images only."""
    low = random.uniform(0, 80, (objects, 2))
    true = np.concatenate([low, low + random.uniform(8, 30, (objects, 2))], axis=1)
    classes, crowd = random.integers(0, CLASSES, objects), random.random(objects) < 0.2
    often = random.integers(0, 4, objects)
    found = np.repeat(true, often, axis=0) + random.normal(0, 1.5, (often.sum(), 4))
    scores = np.sort(random.choice(np.arange(1, 241), len(found), replace=False) / 240)[::-1].copy()
    area = (true[:, 2:] - true[:, :2]).prod(axis=1)
    answers = Objects(
        places=found[:, :2], classes=np.repeat(classes, often), scores=scores, boxes_xyxy=found.reshape(-1, 4)
    )
    return RowBoxes(true, classes, crowd, area), answers


def coco_of(images: list[tuple[RowBoxes, Objects]]) -> dict[str, float]:
    truth: list[dict[str, Any]] = []
    found: list[dict[str, Any]] = []
    for number, (objects, answers) in enumerate(images, start=1):
        for (left, top, right, low), k, crowd, area in zip(*(column.tolist() for column in objects), strict=True):
            one = {"id": len(truth) + 1, "image_id": number, "category_id": k + 1, "iscrowd": int(crowd), "area": area}
            truth.append({**one, "bbox": [left, top, right - left, low - top]})
        assert answers.boxes_xyxy is not None
        columns = answers.boxes_xyxy.tolist(), answers.classes.tolist(), answers.scores.tolist()
        for (left, top, right, low), k, score in zip(*columns, strict=True):
            box = [left, top, right - left, low - top]
            found.append({"image_id": number, "category_id": k + 1, "bbox": box, "score": score})
    frame = {"images": [{"id": i + 1, "height": 200, "width": 200} for i in range(len(images))]}
    frame |= {"categories": [{"id": k + 1} for k in range(CLASSES)], "annotations": truth}
    return coco_score(frame, found, max_dets=(1, 10, MOST))["stats"]


@pytest.mark.parametrize("seed", range(4))
def test_weighted_images_are_those_of_a_data_set_that_has_them_so_often(seed: int) -> None:
    random = np.random.default_rng(seed)
    images = [drawn_image(random, count) for count in (9, 0, 60, 14)]
    weights = np.concatenate([np.ones((4, 1)), random.integers(0, 3, (4, 5))], axis=1).astype(float)
    weights[:, 2] = [0, 1, 0, 0]  # nothing to find
    got = average_precision(rank(images, CLASSES, MOST), torch.from_numpy(weights))
    for draw in range(weights.shape[1]):
        often = weights[:, draw].astype(int).tolist()
        again = [image for image, count in zip(images, often, strict=True) for _ in range(count)]
        for name in ("AP", "AP50"):
            expected = coco_of(again)[name]
            value = float(got[name][draw])
            assert np.isnan(value) if expected < 0 else value == pytest.approx(expected, abs=1e-9), (name, draw)
