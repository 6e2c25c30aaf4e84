"""From a points model's maps to objects of a scene: each once, wherever the borders of regions lie."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from gigaxt import GigaXT, Streaming
from gigaxt.augment import dihedral
from gigaxt.found.objects import Objects
from gigaxt.found.points import decided, find
from gigaxt.image.memory import ArrayImage
from gigaxt.nn.heads import PointsHead
from gigaxt.nn.region_answers import RegionAnswer
from gigaxt.targets.points import PointTarget
from tiny_models import tiny_model

HEIGHT, WIDTH = 150, 230
"""Regions of 64 px: three rows and four columns, the last ones cut."""
CORNERS = [(64.0, 64.0), (64.0, 128.0), (128.0, 64.0), (128.0, 192.0)]
"""Where four regions meet."""
BORDERS = [(20.5, 63.9), (20.5, 128.1), (63.6, 20.0), (128.3, 100.2), (149.9, 229.9), (0.0, 0.0)]


def model_of(target: PointTarget, **head: Any) -> GigaXT:
    """A model whose maps are perfect: what the target draws, as logits."""
    model = tiny_model({"kind": "points", "classes": 2, "dim": 8, "numbers": ["size"], **head})
    assert isinstance(model.head, PointsHead)
    drawn_by, stride = target.on(model.head.config.lattice), model.head.config.stride

    def answer(x: int, y: int, valid: Any, core: int) -> RegionAnswer:
        drawn = drawn_by.draw(x, y, core, core)
        kinds = np.stack([(drawn["classes"] == k) * 8.0 for k in range(2)])
        heat = np.log(np.clip(drawn["heat"], 1e-4, None)) + 5.0
        maps = np.concatenate([heat[None], kinds, drawn["attributes"], drawn["offsets"]])
        h, w = (-(-side // stride) for side in valid.shape)
        return RegionAnswer(x, y, (torch.from_numpy(maps[:, :h, :w]),), valid)

    def predict_regions(batch: Any) -> Iterator[RegionAnswer]:
        (scene,) = batch.scenes
        for place in scene.grid.places:
            x, y, w, h = scene.grid.core_xywh(place)
            yield answer(x, y, scene.core_validity(x, y)[:h, :w], scene.grid.core)

    model.predict_regions = predict_regions
    return model


def target_at(places: Any) -> PointTarget:
    """Objects of two classes in turn, each with a number of its own."""
    n = len(places)
    return PointTarget(places, np.arange(n) % 2, np.arange(n)[:, None] + 10.0, size_px=(HEIGHT, WIDTH))


def image() -> ArrayImage:
    return ArrayImage(np.full((HEIGHT, WIDTH, 3), 7, np.uint8))


def assert_found(found: Objects, target: PointTarget) -> None:
    """Each object once, at its place, with its class and number."""
    found = found.take(found.scores > 0.99)
    assert len(found) == len(target)
    distances = np.linalg.norm(found.places[:, None] - target.places, axis=2)
    nearest = distances.argmin(axis=1)
    assert sorted(nearest.tolist()) == list(range(len(target)))
    assert distances.min(axis=1).max() < 1e-3
    np.testing.assert_array_equal(found.classes, target.classes[nearest])
    np.testing.assert_allclose(found.attributes["size"], target.attributes[nearest, 0], atol=1e-3)


@pytest.mark.parametrize("stride", [2, 4])
@pytest.mark.parametrize("k", [0, 1, 2, 4, 7])
def test_objects_on_corners_and_borders_of_regions_come_once(stride: int, k: int) -> None:
    target = target_at(CORNERS + BORDERS)
    model = model_of(target.turned(k), stride=stride, min_distance_px=0.1)  # doubles would show
    assert_found(find(model, dihedral(image(), k)).objects, target.turned(k))


@pytest.mark.parametrize("seed", range(3))
def test_objects_5_px_apart_around_borders_are_told_apart(seed: int) -> None:
    """Pairs in any direction whose middle lies on a border or a corner of regions, at stride 2; all are recovered."""
    random = np.random.default_rng(seed)
    borders = [(64.0, y) for y in (20.0, 64, 90, 128, 160)] + [(y, 64.0) for y in (25.0, 100, 128)]
    places = []
    for middle in borders:
        angle = random.uniform(0, np.pi)
        half = 2.5 * np.array([np.sin(angle), np.cos(angle)])
        places += [np.add(middle, half), np.subtract(middle, half)]
    assert_found(find(model_of(target_at(places)), image()).objects, target_at(places))


def test_a_trained_model_finds_an_object_on_a_corner_once() -> None:
    """Spots in a scene of four regions, learnt at other places of another scene."""

    def scene(places: Any, seed: int) -> tuple[ArrayImage, PointTarget]:
        pixels = np.random.default_rng(seed).integers(0, 40, (128, 128, 3), dtype=np.uint8)
        for row, col in np.asarray(places, dtype=int).tolist():
            pixels[row - 2 : row + 2, col - 2 : col + 2] = 250
        return ArrayImage(pixels), PointTarget(places, size_px=(128, 128))

    grid = np.stack(np.meshgrid(np.arange(14, 124, 20), np.arange(14, 124, 20)), axis=-1).reshape(-1, 2)
    learnt = scene(grid + np.random.default_rng(0).integers(-5, 6, grid.shape), 0)
    model = tiny_model({"kind": "points", "dim": 8, "threshold": [0.3]}, region=128, halo=32).train()
    model.streaming = Streaming(budget_gib=1.0)  # nothing is computed twice
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    for step in range(60):
        optimizer.zero_grad()
        model([learnt[0]], [learnt[1]], seed=step).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    places = np.array([[64.0, 64.0], [20.0, 64.0], [100.0, 64.0], [64.0, 30.0], [64.0, 100.0], [90.0, 90.0]])
    found = decided(find(model.eval(), scene(places, 9)[0]).objects, model.config.head)
    distances = np.linalg.norm(found.places[:, None] - places, axis=2)
    assert sorted(distances.argmin(axis=1).tolist()) == list(range(len(places)))
    assert distances.min(axis=1).max() < 2
