"""Peaks of maps that come region by region: each once, whatever the cut; and what perfect maps give back."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from gigaxt.found.peaks import PeakFinder, apart
from gigaxt.targets.points import PointLattice, PointTarget
from gigaxt.testing.live_memory import LiveMemory


def found(heat: Any, side: int, *, stride: int = 2, score: float = 0.1, valid: Any = None, most: int = 1000) -> Any:
    """Cells and values, from a map (rows, cols) or (channels, rows, cols) cut into regions of `side` cells."""
    maps = torch.as_tensor(heat).reshape(-1, *np.shape(heat)[-2:])
    rows, cols = maps.shape[1:]
    finder = PeakFinder(stride=stride, side=side, score=score, max_objects=most)
    valid = np.ones((rows * stride, cols * stride), bool) if valid is None else valid
    for r in range(0, rows, side):
        for c in range(0, cols, side):
            part = maps[:, r : r + side, c : c + side]
            here = valid[r * stride : (r + side) * stride, c * stride : (c + side) * stride]
            finder.add(c * stride, r * stride, part, here)
    return finder.finish()


def plain_peaks(heat: Any, least: float) -> set[tuple[int, int]]:
    padded = np.pad(heat, 1, constant_values=-np.inf)
    return {
        (r, c)
        for r, c in np.ndindex(heat.shape)
        if heat[r, c] >= least and heat[r, c] == padded[r : r + 3, c : c + 3].max()
    }


def test_answers_are_freed_with_their_region() -> None:
    finder = PeakFinder(stride=2, side=64, score=0.999, max_objects=10)
    with LiveMemory() as memory:
        for region in range(20):
            finder.add(region * 128, 0, torch.zeros(7, 64, 64), np.ones((128, 128), bool))
    assert memory.peak < 2.5 * 7 * 64 * 64 * 4


@pytest.mark.parametrize("side", [4, 7, 16, 100])
def test_peaks_do_not_know_of_regions(side: int) -> None:
    """Coarse values, so that there are ties everywhere."""
    heat = np.random.default_rng(0).integers(-3, 6, (37, 50)).astype(np.float32)
    cells, values = found(heat, side, score=torch.tensor(2.0).sigmoid().item())
    assert {tuple(cell) for cell in cells.tolist()} == plain_peaks(heat, 2)
    np.testing.assert_array_equal(values[:, 0], heat[cells[:, 0], cells[:, 1]])
    assert (np.diff(values[:, 0]) <= 0).all()


def test_an_object_on_the_corner_of_four_regions_is_one() -> None:
    """All four cells equally high."""
    heat = np.full((16, 16), -9.0)
    heat[7:9, 7:9] = 3.0
    cells, _ = found(heat, 8)
    assert len(cells) == 4  # a tie
    assert apart((cells + 0.5) * 2.0, 3.0).tolist() == [0]
    heat[8, 8] = 3.1
    assert found(heat, 8)[0].tolist() == [[8, 8]]


def test_values_come_with_their_peaks() -> None:
    maps = np.random.default_rng(0).normal(size=(3, 20, 30))
    maps[0] -= 9
    maps[0, 4, 29], maps[0, 19, 8] = 3, 4
    cells, values = found(maps, 8)
    assert cells.tolist() == [[19, 8], [4, 29]]
    np.testing.assert_array_equal(values, maps[:, [19, 4], [8, 29]].T)


def test_nothing_is_found_without_data() -> None:
    heat = np.full((8, 8), -9.0)
    heat[2, 2], heat[2, 3], heat[6, 6] = 4, 3, 2
    valid = np.ones((16, 16), bool)
    valid[4:6, 4:6] = False
    assert found(heat, 4, valid=valid)[0].tolist() == [[2, 3], [6, 6]]
    valid[4, 4] = True  # one pixel of the cell
    assert found(heat, 4, valid=valid)[0].tolist() == [[2, 2], [6, 6]]
    assert len(found(np.full((8, 8), np.nan), 4)[0]) == 0


def test_the_last_cells_of_an_image_are_cut() -> None:
    """15 x 13 px at stride 2: the last row and column of cells have half of their pixels, or a quarter."""
    heat = np.full((8, 7), -9.0)
    heat[7, 6], heat[7, 2], heat[3, 6] = 4, 3, 2
    finder = PeakFinder(stride=2, side=8, score=0.1, max_objects=9)
    valid = np.ones((15, 13), bool)
    valid[14, 4:6] = False
    finder.add(0, 0, torch.from_numpy(heat)[None], valid)
    assert finder.finish()[0].tolist() == [[7, 6], [3, 6]]


def test_a_flat_map_is_bounded() -> None:
    """Each cell of it is a peak."""
    finder = PeakFinder(stride=2, side=32, score=0.1, max_objects=50)
    for i in range(30):
        finder.add(64 * i, 0, torch.zeros(2, 32, 32), np.ones((64, 64), bool))
        assert len(finder._cells) <= 4 * 50
    assert len(finder.finish()[0]) == 50


def spread(least_px: float, size: int, count: int, seed: int) -> Any:
    """Random places, none nearer to another than `least_px`, at subpixel positions."""
    random, places = np.random.default_rng(seed), np.zeros((0, 2))
    while len(places) < count:
        near = places[random.integers(len(places))] if len(places) and random.random() < 0.7 else None
        angle = random.uniform(0, 2 * np.pi)
        new = random.uniform(0, size, 2) if near is None else near + least_px * np.array([np.cos(angle), np.sin(angle)])
        inside = (new >= 0).all() and (new < size).all()
        if inside and (not len(places) or np.linalg.norm(places - new, axis=1).min() >= least_px - 1e-9):
            places = np.concatenate([places, new[None]])
    return places


def recovered(places: Any, size: int, stride: int) -> float:
    target = PointTarget(places, size_px=(size, size)).on(PointLattice(stride, 3.0))
    drawn = target.draw(0, 0, size, size)
    logits = np.log(np.clip(drawn["heat"], 1e-9, None)) + 9.0
    maps = np.concatenate([logits[None], drawn["offsets"]])
    cells, values = found(maps, 16, stride=stride, score=1 / (1 + np.exp(-8.9)))
    at = (cells + 0.5 + values[:, 1:]) * stride
    at = at[apart(at, 1.5 * stride)]
    distances = np.linalg.norm(places[:, None] - at[None], axis=2)
    assert len(at) <= len(places)
    return float((distances.min(axis=1) < 0.01).mean())


@pytest.mark.parametrize("seed", range(3))
def test_perfect_maps_give_back_all_objects_5_px_apart(seed: int) -> None:
    """Many pairs at exactly 5 px, in all directions; regions of 32 px."""
    assert recovered(spread(5.0, 256, 500, seed), 256, 2) == 1.0
    assert recovered(spread(10.0, 256, 150, seed), 256, 4) == 1.0


def test_of_places_too_near_the_best_stays() -> None:
    places = np.array([[0.0, 0], [0, 2], [0, 4], [9, 9]])
    assert apart(places, 3.0).tolist() == [0, 2, 3]
    assert apart(places[:0], 3.0).tolist() == []
