"""From a detector's maps to objects, in scenes of several regions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from array_image import ArrayImage
from gigaxt import GigaXT, open_image
from gigaxt.augment import dihedral
from gigaxt.found.boxes import CandidatePool, Candidates, detect, find, no_candidates
from gigaxt.found.objects import Objects
from gigaxt.nn.region_answers import RegionAnswer
from gigaxt.targets.boxes import BoxTarget
from tiny_models import tiny_model


class Oracle(nn.Module):
    """Answers as a perfect head would: from the boxes of the scene, through what they draw."""

    def __init__(self, model: GigaXT, target: BoxTarget) -> None:
        super().__init__()
        self.head, self.target = model.head, model.head.as_target(target)

    def answer(self, x: int, y: int, valid: NDArray[np.bool_], core: int) -> RegionAnswer:
        drawn, start, maps = self.target.draw(x, y, core, core), 0, []
        classes = self.head.config.classes
        for s in self.head.lattice.strides:
            k = core // s
            here = slice(start, start := start + k * k)
            wanted, ltrb = torch.from_numpy(drawn["classes"][here]), torch.from_numpy(drawn["distances_ltrb"][here])
            answers = torch.full((classes + 5, k, k), -9.0)
            for c in range(classes):
                answers[c][(wanted == c).view(k, k)] = 5.0
            answers[classes:-1] = ltrb.T.reshape(4, k, k)
            answers[-1] = 5.0 - ltrb.std(dim=1).view(k, k) / 50  # best in the middle
            rows, cols = (-(-side // s) for side in valid.shape)
            maps.append(answers[:, :rows, :cols])
        return RegionAnswer(x, y, tuple(maps), valid)


def model_of(target: BoxTarget, **given: Any) -> GigaXT:
    """A model whose maps are perfect."""
    model = tiny_model({"kind": "detect", "classes": 3, "dim": 8, "max_cells": 4.0}, **given)
    oracle = Oracle(model, target)

    def predict_regions(batch: Any) -> Any:
        grid = batch.scenes[0].grid
        for place in grid.places:
            x, y, w, h = grid.core_xywh(place)
            yield oracle.answer(x, y, batch.scenes[0].core_validity(x, y)[:h, :w], grid.core)

    model.predict_regions = predict_regions
    return model


def truth() -> BoxTarget:
    """Across borders of regions of 64 px: along one, along both, over several regions, of a few px; two overlap."""
    boxes = [
        [50, 20, 75, 60],
        [60, 58, 68, 70],
        [10, 8, 140, 90],
        [126, 62, 129, 65],
        [30, 70, 60, 95],
        [44, 70, 74, 95],
    ]
    return BoxTarget(boxes, [0, 1, 2, 0, 1, 1], size_px=(100, 150))


def image(**given: Any) -> Any:
    return open_image(np.full((100, 150, 3), 7, np.uint8), **given)


def assert_found(found: Objects, target: BoxTarget) -> None:
    assert found.boxes_xyxy is not None
    np.testing.assert_allclose(found.places, (found.boxes_xyxy[:, 1::-1] + found.boxes_xyxy[:, :1:-1]) / 2)
    wanted = sorted([c, *box] for c, box in zip(target.classes.tolist(), target.boxes_xyxy.tolist(), strict=True))
    got = sorted([c, *box] for c, box in zip(found.classes.tolist(), found.boxes_xyxy.tolist(), strict=True))
    assert len(got) == len(wanted)
    np.testing.assert_allclose(got, wanted, atol=1e-4)


def test_objects_across_borders_come_once_and_whole() -> None:
    found = detect(model_of(truth()), image())
    assert_found(found, truth())
    assert (np.diff(found.scores) <= 0).all()
    assert ((found.scores > 0.9) & (found.scores < 1)).all()


@pytest.mark.parametrize("k", [1, 3, 5, 6])
def test_a_turned_scene_has_turned_objects(k: int) -> None:
    assert_found(detect(model_of(truth().turned(k)), dihedral(image(), k)), truth().turned(k))


def test_boxes_are_in_px_of_the_image_given() -> None:
    """The model works at 2 µm, the image has 1 µm a pixel along x and 2 along y."""
    half = truth().resampled(2.0, 1.0)
    pixels = open_image(np.full((100, 150, 3), 7, np.uint8))
    pixels.mpp = (1.0, 2.0)
    assert_found(detect(model_of(half, mpp=2.0), pixels), truth())


def test_locations_without_data_say_nothing() -> None:
    pixels = np.full((100, 150, 3), 7, np.uint8)
    pixels[:, 100:] = 0
    found = detect(model_of(truth()), ArrayImage(pixels, nodata=0))
    assert len(found.scores) == 5  # but for the small one at the right


def test_suppression_of_all_classes_and_the_best_n() -> None:
    model = model_of(BoxTarget([[20, 20, 50, 50], [27, 20, 57, 50], [80, 20, 110, 50]], [0, 1, 2]))
    assert len(detect(model, image()).scores) == 3
    model.config.head.class_aware = False
    assert len(detect(model, image()).scores) == 2
    model.config.head.max_objects = 1
    assert len(detect(model, image()).scores) == 1
    model.config.head.score = 1.0
    found = detect(model, image())
    assert len(found) == 0


def test_pool_keeps_the_best_and_cuts_at_the_border() -> None:
    rng = np.random.default_rng(0)
    pool, everything = CandidatePool(100, 50, most=40), []
    for _ in range(30):
        low = rng.uniform(-20, 120, (10, 2))
        part = Candidates(np.concatenate([low, low + 10], axis=1), rng.random(10), rng.integers(0, 3, 10))
        pool.add(part)
        inside = (part.boxes_xyxy[:, 2:] > 0).all(axis=1) & (part.boxes_xyxy[:, :2] < (100, 50)).all(axis=1)
        everything += part.scores[inside].tolist()
    found = pool.all()
    assert sorted(found.scores.tolist()) == sorted(everything)[-40:]
    assert found.boxes_xyxy.min() >= 0
    assert (found.boxes_xyxy.max(axis=0) <= (100, 50, 100, 50)).all()
    assert CandidatePool(9, 9).all().scores.shape == no_candidates().scores.shape == (0,)


def test_a_fresh_model_answers() -> None:
    """Many candidates in each region, and none that is not finite."""
    model = tiny_model({"kind": "detect", "classes": 3, "dim": 8, "score": 0.0, "strides": [8, 16]})
    found = detect(model, open_image(np.random.default_rng(0).integers(0, 255, (100, 150, 3), dtype=np.uint8)))
    assert len(found.scores) > 10
    assert np.isfinite(found.boxes_xyxy).all()
    assert isinstance(next(model.predict_regions(model.batch([image()]))).answers[0], Tensor)


@pytest.mark.parametrize("strides", [[4, 8, 16, 32], [8]])
def test_loss_and_objects_come_of_one_pass(strides: list[int]) -> None:
    """Each pixel is read twice, for its token and for its maps, as for the objects alone; the sums are the model's."""
    model = tiny_model({"kind": "detect", "classes": 3, "dim": 8, "strides": strides}).double()
    target = {"boxes": [[5, 5, 40, 30], [60, 10, 140, 96]], "labels": [0, 2], "ignored": [False, False]}
    masked = np.ones((100, 150), np.bool_)
    masked[40:, 100:] = False
    pixels = np.random.default_rng(0).integers(1, 255, (100, 150, 3), dtype=np.uint8)
    seen = ArrayImage(pixels, masks=(masked,))
    found = find(model, seen, target)
    expected = model.evaluate([ArrayImage(pixels, masks=(masked,))], [target])
    assert found.sums is not None
    assert found.sums.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found.sums[name], value, rtol=1e-10, atol=0)
    again = ArrayImage(pixels, masks=(masked,))
    alone = find(model, again)
    assert alone.sums is None
    assert sorted(again.windows) == sorted(seen.windows)  # threads read them
    whole = ArrayImage(pixels)  # no search for regions without data
    find(model, whole, target)
    assert (whole.times_read() == 2).all()
    np.testing.assert_array_equal(alone.objects.boxes_xyxy, found.objects.boxes_xyxy)
