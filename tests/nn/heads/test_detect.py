"""The detection head: its loss against a plain one, streamed against in memory, and what it answers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from gigaxt import ConfigError, DataError, GigaXT, Streaming, open_image
from gigaxt.nn.heads import DetectConfig, DetectHead
from gigaxt.nn.heads.detect import centreness_of
from streamed import BUDGETS, assert_streamed_exactly
from tiny_models import tiny_model

BOXES = [[50, 20, 75, 60], [5, 5, 12, 9], [10, 8, 140, 90], [100, 60, 145, 98]]
TARGET = {"boxes": BOXES, "labels": [0, 1, 2, 0], "ignored": [False, False, False, True]}


def make(**head: Any) -> GigaXT:
    given = {"kind": "detect", "classes": 3, "dim": 8, "depth": 1, "max_cells": 4.0, **head}
    return tiny_model(given, seed=1).double()


def image(seed: int = 0) -> Any:
    return open_image(np.random.default_rng(seed).integers(1, 255, (100, 150, 3), dtype=np.uint8))


def plain_loss(model: GigaXT, classes: int) -> torch.Tensor:
    """From the stitched maps of the scene, location by location."""
    (maps,) = model([image()])
    target = model.head.as_target(TARGET)
    total, found = torch.zeros((), dtype=torch.float64), 0
    start, drawn = 0, target.draw(0, 0, 192, 192)
    for stride, answers in zip(model.head.lattice.strides, maps, strict=True):
        k = 192 // stride
        here = slice(start, start := start + k * k)
        wanted = drawn["classes"][here].reshape(k, k)
        distances = torch.from_numpy(drawn["distances_ltrb"][here].reshape(k, k, 4)).double()
        for row, col in np.ndindex(*answers.shape[1:]):
            x, y = (col + 0.5) * stride, (row + 0.5) * stride
            if x >= 150 or y >= 100 or wanted[row, col] == -2:
                continue
            answer = answers[:, row, col]
            for c in range(classes):
                p, is_it = answer[c].sigmoid(), wanted[row, col] == c
                total = total - (0.25 * (1 - p) ** 2 * p.log() if is_it else 0.75 * p**2 * F.logsigmoid(-answer[c]))
            if wanted[row, col] < 0:
                continue
            found += 1
            left, t, r, b = answer[classes : classes + 4]
            tl, tt, tr, tb = distances[row, col]
            inter = (torch.minimum(left, tl) + torch.minimum(r, tr)).clamp(min=0) * (
                torch.minimum(t, tt) + torch.minimum(b, tb)
            ).clamp(min=0)
            union = (left + r) * (t + b) + (tl + tr) * (tt + tb) - inter
            hull = (torch.maximum(left, tl) + torch.maximum(r, tr)) * (torch.maximum(t, tt) + torch.maximum(b, tb))
            total = total + 1 - inter / union + (hull - union) / hull
            half = stride / 2
            a, c = sorted((tl + half, tr + half)), sorted((tt + half, tb + half))
            centred = (a[0] / a[1] * c[0] / c[1]) ** 0.5
            total = total + F.binary_cross_entropy_with_logits(answer[-1], centred)
    assert found > 10
    return total / found


def test_loss_equals_a_loop_over_locations() -> None:
    model = make()
    torch.testing.assert_close(model.loss([image()], [TARGET]), plain_loss(model, 3), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("streaming", "forwards"), list(zip(BUDGETS, (3, 2, 1), strict=True)))
def test_streamed_loss_is_exact_in_few_passes(streaming: Streaming, forwards: int) -> None:
    """Boxes reach across the borders of regions of 64 px."""
    assert assert_streamed_exactly(make(), image(), TARGET, streaming) == forwards * 6  # regions


def test_two_scenes_are_divided_by_the_objects_of_both() -> None:
    model = make()
    few = {"boxes": [[20, 20, 30, 30]], "labels": [1]}
    sums = [model._sums([image(i)], [t], 0, linear=False) for i, t in enumerate((TARGET, few))]
    expected = (sums[0][0] + sums[1][0]) / (sums[0][1] + sums[1][1])
    torch.testing.assert_close(model([image(0), image(1)], [TARGET, few]), expected, rtol=1e-12, atol=0)


def test_scene_without_objects_has_a_loss() -> None:
    model = make()
    loss = model([image()], [{"boxes": [], "labels": []}])
    loss.backward()
    assert 0 < loss < 100
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert any(g.any() for g in gradients)
    assert all(torch.isfinite(g).all() for g in gradients)


def test_ignored_boxes_do_not_count() -> None:
    model = make()
    everything = {"boxes": [[0, 0, 150, 100]], "labels": [0], "ignored": [True]}
    assert model([image()], [everything]) == 0


def test_classes_are_told_by_the_context() -> None:
    """The same maps under another context are of another class; their boxes too can change."""
    head = make().head
    maps = [torch.randn(1, c, 64 // s, 64 // s).double() for c, s in zip((8, 8, 8, 16), (4, 8, 16, 32), strict=True)]
    one, other = (head(maps, context) for context in torch.randn(2, 1, 2, 2, 16).double())
    for a, b in zip(one, other, strict=True):
        assert (a[:, :3] - b[:, :3]).abs().min() > 1e-4


def test_fresh_head_expects_few_objects_of_medium_size() -> None:
    torch.manual_seed(0)
    head = DetectHead(DetectConfig(classes=2), 32, [8, 8], [8, 16])
    maps = head([torch.randn(4, 8, 8, 8), torch.randn(4, 8, 4, 4)], torch.randn(4, 2, 2, 32))
    for answers, stride in zip(maps, (8, 16), strict=True):
        assert answers[:, :2].sigmoid().mean() < 0.05
        side = (answers[:, 2:4] + answers[:, 4:6]).mean()
        assert 2 * stride < side < 8 * stride


def test_centreness_is_1_in_the_middle_and_falls_to_the_border() -> None:
    ltrb = torch.tensor([[10.0, 10, 10, 10], [0, 10, 20, 10], [0, 0, 20, 20], [-3, 1, 5, 1]])
    found = centreness_of(ltrb, torch.full((4,), 8))
    torch.testing.assert_close(found, torch.tensor([1.0, (4 / 24) ** 0.5, 4 / 24, (1 / 9) ** 0.5]))


def test_settings_that_do_not_fit() -> None:
    for wrong, message in (
        ({"strides": [4, 12]}, r"head.strides: expected some of \[4, 8, 16, 32\]"),
        ({"strides": [8, 4]}, "fine to coarse"),
        ({"strides": []}, "head.strides"),
        ({"nms_iou": 1.5}, "head.nms_iou"),
        ({"radius": 0.0}, "head.radius"),
        ({"depth": 0}, "head.depth"),
        ({"label_smoothing": 0.1}, "head.label_smoothing"),
        ({"category_ids": [1]}, "head.category_ids"),
    ):
        with pytest.raises(ConfigError, match=message):
            make(**wrong)
    assert [len(m) for m in make(strides=[8, 32])([image()])[0]] == [8, 8]
    with pytest.raises(DataError, match="expected a BoxTarget"):
        make()([image()], [np.zeros((100, 150), np.uint8)])


def test_class_weights_weigh_the_classes() -> None:
    plain, weighted = (make(class_weights=w)._sums([image()], [TARGET], 0, linear=False)[2] for w in (None, [2.0] * 3))
    torch.testing.assert_close(weighted, plain * torch.tensor([2.0, 1, 1], dtype=torch.float64))
