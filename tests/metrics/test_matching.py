from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from gigaxt.errors import DataError
from gigaxt.metrics import matching
from gigaxt.metrics.matching import FAR_M, Pairs, match


def _points(seed: int, count: int, size: float) -> NDArray[np.float64]:
    return np.random.default_rng(seed).uniform(0, size, (count, 2))


@pytest.mark.parametrize("size", [30, 100, 400, 2000])
@pytest.mark.parametrize("batch", [1, 7, 1024])
def test_near_pairs_are_enough(size: float, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matching, "BATCH_POINTS", batch)
    for seed in range(20):
        n, m = np.random.default_rng(seed).integers(1, 30, 2)
        found, truth = _points(seed, n, size), _points(seed + 100, m, size)
        dense = match(found, truth, 200, costly=True)
        monkeypatch.setattr(matching, "DENSE_CELLS", 0)
        sparse = match(found, truth, 200, costly=True)
        monkeypatch.undo()
        assert set(zip(*dense, strict=True)) == set(zip(*sparse, strict=True))


@pytest.mark.parametrize("on_a_line", [False, True])
def test_of_equal_costs_another_may_be_found_but_none_cheaper(on_a_line: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole pixels and points on a line: many assignments cost the same."""
    monkeypatch.setattr(matching, "DENSE_CELLS", 0)
    for seed in range(40):
        found, truth = _points(seed, 12, 60).round(), _points(seed + 100, 9, 60).round()
        if on_a_line:
            found[:, 1] = truth[:, 1] = 5
        dense, sparse = matching._match_all(found, truth, 200, True), matching._match_near(found, truth, 200)
        assert _cost(dense.take(dense.distance_m <= 200)) == pytest.approx(_cost(sparse), abs=1e-6)
        for side in sparse[:2]:
            assert len(set(side)) == len(side)


def _cost(pairs: Pairs) -> float:
    return len(pairs.distance_m) * -FAR_M + float(pairs.distance_m.sum())


def test_a_near_pair_is_worth_more_than_any_distance() -> None:
    # 0 - 19 - 38 px: the outer detection reaches the inner object only, which is nearer to the other detection.
    found, truth = np.array([[0.0, 19], [0, 38]]), np.array([[0.0, 0], [0, 20]])
    assert set(zip(*match(found, truth, 200, costly=True)[:2], strict=True)) == {(0, 0), (1, 1)}


def test_far_pairs_compete_unless_costly() -> None:
    found, truth = np.array([[0.0, 15], [0, 60]]), np.array([[0.0, 0], [0, 30.5]])
    # 15 + 29.5 px is less than 15.5 + 60 px; without the far distance 15 px alone is.
    assert match(found, truth, 200, costly=False).distance_m.tolist() == [150]
    found, truth = np.array([[0.0, 0], [0, 100]]), np.array([[0.0, -15], [14, 0]])
    assert len(match(found, truth, 200, costly=True).found) == 1
    assert match(found, truth, 200, costly=True).truth.tolist() == [1]
    assert match(found, truth, 200, costly=False).truth.tolist() == [0]


def test_as_far_as_the_tolerance_is_assigned_but_no_match(monkeypatch: pytest.MonkeyPatch) -> None:
    # The second detection is 200 m from the first object: two pairs within reach beat one, though only one is a match.
    found, truth = np.array([[0.0, 5], [0, -20]]), np.array([[0.0, 0], [0, 24]])
    for cells in (matching.DENSE_CELLS, 0):
        monkeypatch.setattr(matching, "DENSE_CELLS", cells)
        pairs = match(found, truth, 200, costly=True)
        assert (pairs.found.tolist(), pairs.truth.tolist(), pairs.distance_m.tolist()) == ([0], [1], [190])


@pytest.mark.parametrize(("n", "m"), [(0, 0), (0, 3), (3, 0)])
def test_nothing_to_match(n: int, m: int) -> None:
    assert [len(column) for column in match(np.zeros((n, 2)), np.zeros((m, 2)), 200, costly=True)] == [0, 0, 0]


def test_nothing_in_reach_of_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matching, "DENSE_CELLS", 0)
    assert len(match(_points(0, 5, 10), _points(1, 5, 10) + 1000, 200, costly=True).found) == 0


def test_many_points_without_all_distances(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(matching, "distance_matrix")  # 3 GiB of them
    truth = _points(0, 20_000, 12_000)
    found = truth + np.random.default_rng(1).normal(0, 3, truth.shape)
    pairs = match(found, truth, 200, costly=True)
    assert (pairs.found == pairs.truth).mean() > 0.9
    assert len(pairs.found) > 19_900


def test_all_distances_of_too_many_points_are_refused() -> None:
    with pytest.raises(DataError, match="20000 predictions x 20000 objects, 3 GiB of distances; leave `costly_dist`"):
        match(np.zeros((20_000, 2)), np.zeros((20_000, 2)), 200, costly=False)
