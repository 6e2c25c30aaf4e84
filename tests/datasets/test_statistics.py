from __future__ import annotations

import numpy as np
import pytest

from gigaxt.datasets.statistics import WINDOW, BandStatistics, spread_windows


def test_streamed_statistics_equal_those_of_all() -> None:
    rng = np.random.default_rng(0)
    # A mean far above the spread, where sums of squares would lose all digits.
    windows = [rng.normal((1e6, 5.0), (0.1, 3.0), size=(h, 30, 2)) for h in (5, 17, 1)]
    windows[1][3, :, 1] = np.nan
    valid = [rng.random(window.shape[:2]) < 0.7 for window in windows]
    statistics, second = BandStatistics(2), BandStatistics(2)
    statistics.add(windows[0], valid[0])
    for window, mask in zip(windows[1:], valid[1:], strict=True):
        second.add(window, mask)
    statistics.merge(second)
    values = np.concatenate([window[mask] for window, mask in zip(windows, valid, strict=True)])
    np.testing.assert_allclose(statistics.mean, np.nanmean(values, axis=0), rtol=1e-12)
    np.testing.assert_allclose(statistics.std, np.nanstd(values, axis=0), rtol=1e-9)
    assert statistics.count.tolist() == np.isfinite(values).sum(axis=0).tolist()


def test_windows_without_valid_pixels_change_nothing() -> None:
    statistics = BandStatistics(1)
    empty = np.zeros((4, 4), dtype=bool)
    statistics.add(np.ones((4, 4, 1), dtype=np.uint8), empty)
    assert (statistics.count, statistics.mean, statistics.std) == (0, 0, 0)
    statistics.add(np.full((4, 4, 1), 9, dtype=np.uint8), ~empty)
    statistics.add(np.ones((4, 4, 1), dtype=np.uint8), empty)
    assert (statistics.count, statistics.mean, statistics.std) == (16, 9, 0)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (256, 1), (300, 500), (700, 5000), (29000, 25000), (100, 90000)])
@pytest.mark.parametrize("count", [1, 2, 16])
def test_windows_are_inside_few_and_spread(height: int, width: int, count: int) -> None:
    windows = spread_windows(height, width, count)
    assert 1 <= len(windows) <= count
    for x, y, w, h in windows:
        assert 0 <= x < x + w <= width
        assert 0 <= y < y + h <= height
        assert max(w, h) <= WINDOW
    assert len(set(windows)) == len(windows)
    if -(-height // WINDOW) * -(-width // WINDOW) <= count:
        assert sum(w * h for _, _, w, h in windows) == height * width
    if count == 16:
        assert len(windows) > min(8, height * width // WINDOW**2)


def test_windows_of_the_foreground() -> None:
    keep = np.zeros((20, 30), dtype=bool)
    keep[3, 4:9] = True
    assert spread_windows(5000, 7600, 16, keep) == [(col * WINDOW, 3 * WINDOW, WINDOW, WINDOW) for col in range(4, 9)]
    assert len(spread_windows(5000, 7600, 3, keep)) == 3
    assert spread_windows(5000, 7600, 3, np.zeros_like(keep)) == []
