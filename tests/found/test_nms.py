from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torchvision.ops import batched_nms, nms

from gigaxt.found.nms import _clusters, suppress


def candidates(
    seed: int, count: int, side: float = 1000.0, objects: int | None = None
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
    """Several around each object, of sizes from 3 to 60 px, some scores equal."""
    rng = np.random.default_rng(seed)
    which = rng.integers(0, objects or count // 10, count)
    centre = rng.uniform(0, side, (objects or count // 10, 2))[which] + rng.normal(0, 3, (count, 2))
    size = np.exp(rng.uniform(1, 4, (objects or count // 10, 2)))[which] * np.exp(rng.normal(0, 0.1, (count, 2)))
    boxes = np.concatenate([centre - size / 2, centre + size / 2], axis=1)
    return boxes, np.round(rng.random(count), 2), rng.integers(0, 3, count)


@pytest.mark.parametrize("iou", [0.0, 0.3, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("side", [200.0, 1000.0, 5000.0])
def test_equals_torchvision(iou: float, side: float) -> None:
    boxes, scores, classes = candidates(int(side), 3000, side)
    tensors = torch.from_numpy(boxes), torch.from_numpy(scores)
    assert suppress(boxes, scores, iou).tolist() == nms(*tensors, iou).tolist()
    found = suppress(boxes, scores, iou, classes)
    assert sorted(found.tolist()) == sorted(batched_nms(*tensors, torch.from_numpy(classes), iou).tolist())
    assert (np.diff(scores[found]) <= 0).all()


def test_wide_and_narrow_huge_and_tiny() -> None:
    rng = np.random.default_rng(0)
    size = np.exp(rng.uniform(-2, 8, (2000, 2)))
    centre = rng.uniform(-500, 500, (2000, 2))
    boxes, scores = np.concatenate([centre - size / 2, centre + size / 2], axis=1), rng.random(2000)
    for iou in (0.1, 0.6):
        expected = nms(torch.from_numpy(boxes), torch.from_numpy(scores), iou).tolist()
        assert suppress(boxes, scores, iou).tolist() == expected


def test_nothing_and_one_place() -> None:
    none = np.zeros((0, 4))
    assert suppress(none, np.zeros(0), 0.5).tolist() == []
    assert suppress(none, np.zeros(0), 0.5, np.zeros(0, np.int64)).tolist() == []
    same = np.tile([[3.0, 4, 9, 8]], (5000, 1))
    assert suppress(same, np.linspace(0, 1, 5000), 0.5).tolist() == [4999]


def test_clusters_are_small_where_objects_are_apart() -> None:
    """Else it would be the plain one: 100,000 candidates of 10,000 objects on a scene of 20,000 px."""
    boxes, scores, classes = candidates(0, 100_000, 20_000.0)
    found = suppress(boxes, scores, 0.5, classes)
    assert np.bincount(_clusters(boxes, 0.5, classes)).max() < 200
    assert len(found) > 10_000
