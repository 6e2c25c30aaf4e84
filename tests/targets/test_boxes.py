"""Boxes of a scene, assigned to cells region by region, against a loop over locations."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from gigaxt.augment import turn
from gigaxt.errors import DataError
from gigaxt.image.memory import ArrayImage
from gigaxt.targets.boxes import IGNORED, NOTHING, BoxTarget, Lattice, as_boxes

LATTICE = Lattice((4, 8), max_cells=4.0, radius=1.5)
CORE = 32


def random_target(seed: int, height: int = 100, width: int = 150, count: int = 70) -> BoxTarget:
    rng = np.random.default_rng(seed)
    size = rng.uniform(1, 6.3, (count, 2)) ** 2
    low = rng.uniform(0, 1, (count, 2)) * ([width, height] - size)
    boxes = np.concatenate([low, low + size], axis=1)
    ignored = np.arange(count) % 7 == 0
    return BoxTarget(boxes, rng.integers(0, 5, count), ignored, size_px=(height, width), lattice=LATTICE)


def naive(target: BoxTarget, stride: int, finest: bool, row: int, col: int) -> tuple[int, list[float]]:
    """Class and distances at one location of the whole scene, by the words of the docstrings."""
    x, y = (col + 0.5) * stride, (row + 0.5) * stride
    best: tuple[float, int, list[float]] | None = None
    for i, (x0, y0, x1, y1) in enumerate(target.boxes_xyxy.tolist()):
        if target.ignored[i] or (max(x1 - x0, y1 - y0) <= 16) != finest:
            continue
        answers = True
        for at, low, high, cell in ((x, x0, x1, col), (y, y0, y1, row)):
            centre = (low + high) / 2
            inside = low <= at <= high and abs(at - centre) <= 1.5 * stride
            answers &= inside or cell == centre // stride
        area = (x1 - x0) * (y1 - y0)
        if answers and (best is None or area < best[0]):
            best = (area, int(target.classes[i]), [x - x0, y - y0, x1 - x, y1 - y])
    if best is not None:
        return best[1:]
    ignored = target.boxes_xyxy[target.ignored].tolist()
    return IGNORED if any(x0 <= x <= x1 and y0 <= y <= y1 for x0, y0, x1, y1 in ignored) else NOTHING, [0.0] * 4


def whole(target: BoxTarget, height: int, width: int) -> list[tuple[NDArray[Any], NDArray[Any]]]:
    """Drawn region by region and stitched: classes (rows, cols) and distances (rows, cols, 4) of each map."""
    maps: list[tuple[NDArray[Any], NDArray[Any]]] = []
    for s in LATTICE.strides:
        maps.append((np.zeros((height // s, width // s), np.int64), np.zeros((height // s, width // s, 4))))
    for y in range(0, height, CORE):
        for x in range(0, width, CORE):
            drawn, start = target.draw(x, y, CORE, CORE), 0
            for (classes, distances), s in zip(maps, LATTICE.strides, strict=True):
                k = CORE // s
                part, place = slice(start, start := start + k * k), np.s_[y // s : y // s + k, x // s : x // s + k]
                classes[place] = drawn["classes"][part].reshape(k, k)
                distances[place] = drawn["distances_ltrb"][part].reshape(k, k, 4)
    return maps


@pytest.mark.parametrize("seed", [0, 1])
def test_regions_draw_what_a_loop_over_locations_finds(seed: int) -> None:
    target = random_target(seed)
    seen = set()
    for (classes, distances), stride in zip(whole(target, 128, 160), LATTICE.strides, strict=True):
        for row, col in np.ndindex(classes.shape):
            class_, ltrb = naive(target, stride, stride == 4, row, col)
            assert classes[row, col] == class_, (stride, row, col)
            np.testing.assert_allclose(distances[row, col], ltrb, atol=1e-4)
            seen.add((stride, class_))
    assert {(s, c) for s in (4, 8) for c in (IGNORED, NOTHING, 0, 4)} <= seen


def test_every_object_alone_is_learnt_somewhere() -> None:
    for x, y, w, h in ((10.2, 7.7, 0.5, 0.5), (0, 0, 1, 90), (31.9, 31.9, 0.2, 0.2), (60, 60, 15, 2)):
        target = BoxTarget([[x, y, x + w, y + h]], [3], size_px=(128, 160), lattice=LATTICE)
        found = [(classes == 3).sum() for classes, _ in whole(target, 128, 160)]
        assert sum(found) >= 1
        assert found[0 if max(w, h) > 16 else 1] == 0


@pytest.mark.parametrize("k", range(8))
def test_turns_with_the_image(k: int) -> None:
    """Pixels that a box covers, in an image that is not square."""
    pixels = np.zeros((20, 30), np.uint8)
    pixels[3:8, 11:25] = 1
    target = BoxTarget([[11, 3, 25, 8]], [0], size_px=(20, 30)).turned(k)
    turned = turn(pixels, k)
    assert target.size_px == turned.shape
    x0, y0, x1, y1 = target.boxes_xyxy[0].astype(int)
    assert turned[y0:y1, x0:x1].all()
    assert turned.sum() == (y1 - y0) * (x1 - x0)


def test_crops_scales_and_sizes() -> None:
    target = BoxTarget([[10, 10, 30, 20], [0, 0, 8, 8], [28, 10, 60, 20]], [0, 1, 2], size_px=(40, 60))
    crop = target.cropped(20, 5, 12, 30)
    assert crop.boxes_xyxy.tolist() == [[0, 5, 10, 15], [8, 5, 12, 15]]
    assert (crop.classes.tolist(), crop.ignored.tolist(), crop.size_px) == ([0, 2], [False, True], (30, 12))
    half = target.resampled(2.0, 4.0)
    assert half.boxes_xyxy[0].tolist() == [5, 2.5, 15, 5]
    assert half.size_px == (10, 30)
    twice = target.resized(120, 40)
    assert twice.boxes_xyxy[0].tolist() == [20, 10, 60, 20]
    assert twice.size_px == (40, 120)


def test_targets_that_do_not_fit() -> None:
    image = ArrayImage(np.zeros((20, 30, 3), np.uint8))
    for boxes, message in (
        ([[1, 1, 1, 5]], "area above 0"),
        ([[1, 1, float("nan"), 5]], "area above 0"),
        ([[5, 5, 1, 9]], "area above 0"),
    ):
        with pytest.raises(DataError, match=message):
            BoxTarget(boxes, [0])
    with pytest.raises(DataError, match="class for each of 1 boxes"):
        BoxTarget([[0, 0, 1, 1]], [0, 1])
    with pytest.raises(DataError, match=r"lies outside of .*30 x 20 px"):
        BoxTarget([[0, 0, 32, 5]], [0]).check(image)
    with pytest.raises(DataError, match="boxes of an image of 30 x 21 px"):
        BoxTarget([[0, 0, 2, 5]], [0], size_px=(21, 30)).check(image)
    with pytest.raises(DataError, match="class 3 is out of range"):
        as_boxes({"boxes": [[0, 0, 1, 1]], "labels": [3]}, 3)
    with pytest.raises(DataError, match="expected a BoxTarget"):
        as_boxes([[0, 0, 1, 1]], 3)
    empty = BoxTarget([], [])
    empty.check(image)
    assert (empty.on(LATTICE).draw(0, 0, 32, 32)["classes"] == NOTHING).all()
