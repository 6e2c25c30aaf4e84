from __future__ import annotations

import numpy as np
import pytest

from gigaxt import ConfigError
from gigaxt.inference.windows import WindowGrid, blend_weights, usual_overlap, window_starts
from gigaxt.regions import RegionGrid


@pytest.mark.parametrize(("core", "overlap"), [(64, 0), (64, 32), (256, 64), (256, 96), (256, 192), (96, 64)])
@pytest.mark.parametrize("size", [1, 31, 64, 65, 300, 1023])
def test_weights_are_a_partition_of_unity(core: int, overlap: int, size: int) -> None:
    starts = window_starts(size, core, core - overlap)
    weights = blend_weights(starts, core, overlap, size)
    total = np.zeros(starts[-1] + core)
    for start, of_window in zip(starts, weights, strict=True):
        total[start : start + core] += of_window
    np.testing.assert_allclose(total[:size], 1, rtol=0, atol=1e-15)
    assert weights.min() >= 0
    assert starts[-1] + core >= size > (starts[-1] if len(starts) == 1 else starts[-2] + core) - core


def test_a_window_says_nothing_at_its_border_but_at_that_of_the_image() -> None:
    first, middle, last = blend_weights(window_starts(160, 64, 48), 64, 16, 160)
    assert first[0] == last[63] == 1
    np.testing.assert_allclose(middle[:2], np.sin(np.pi / 2 * np.array([0.5, 1.5]) / 16) ** 2)
    assert (middle[16:48] == 1).all()


def test_windows_without_overlap_are_the_cores() -> None:
    keep = np.random.default_rng(0).random((4, 3)) > 0.5
    grid = RegionGrid(250, 180, 64, order="raster", keep=keep)
    windows = WindowGrid(grid, 2)
    np.testing.assert_array_equal(windows.needed, keep)
    np.testing.assert_array_equal(windows.kept, keep)
    tokens = np.full((8, 6), -1)
    tokens[np.repeat(np.repeat(keep, 2, 0), 2, 1)] = 0
    order = iter(range(100))
    for row, col in np.argwhere(keep):
        tokens[2 * row : 2 * row + 2, 2 * col : 2 * col + 2] = [[next(order), next(order)], [next(order), next(order)]]
    found = np.block([[windows.token_rows(row)[col] for col in range(3)] for row in range(4)])
    np.testing.assert_array_equal(found, tokens)


@pytest.mark.parametrize("overlap", [0, 32, 64, 96])
def test_windows_overlap_at_whole_tokens(overlap: int) -> None:
    """Against a lattice of tokens with their own numbers, a border of -1 around it."""
    keep = np.random.default_rng(1).random((3, 4)) > 0.4
    grid = RegionGrid(300, 500, 128, order="raster", keep=keep)
    windows = WindowGrid(grid, 4, overlap)
    lattice = np.full((12 + 4, 16 + 4), -1)
    for number, (row, col) in enumerate(np.argwhere(keep)):
        lattice[4 * row : 4 * row + 4, 4 * col : 4 * col + 4] = number * 16 + np.arange(16).reshape(4, 4)
    pixels = np.zeros((3 * 128, 4 * 128), bool)
    pixels[np.repeat(np.repeat(keep, 128, 0), 128, 1)] = True
    pixels = pixels[:300, :500]
    np.testing.assert_array_equal(windows.kept_pixels(20, 30, 470, 260), pixels[30:290, 20:490])
    for row, y in enumerate(windows.ys):
        found = windows.token_rows(row)
        for col, x in enumerate(windows.xs):
            top, left = y // 32, x // 32
            np.testing.assert_array_equal(found[col], lattice[top : top + 4, left : left + 4])
            assert windows.needed[row, col] == pixels[y : y + 128, x : x + 128].any()
        assert list(windows.rows_reaching(row)) == [i for i, top in enumerate(windows.ys) if top <= y < top + 128]


@pytest.mark.parametrize(
    ("overlap", "nearest"), [(-32, "0"), (30, "32"), (256, "224"), (300, "224"), (20, "32"), (1000, "224")]
)
def test_overlaps_out_of_range(overlap: int, nearest: str) -> None:
    grid = RegionGrid(300, 500, 256, order="raster")
    with pytest.raises(ConfigError, match=rf"multiple of 32 px.*got {overlap}; the nearest is {nearest}$"):
        WindowGrid(grid, 8, overlap)


def test_tokens_that_cover_no_whole_pixels_allow_few_overlaps() -> None:
    grid = RegionGrid(300, 500, 224, order="raster")
    with pytest.raises(ConfigError, match=r"multiple of 112 px.*got 32; the nearest is 0"):
        WindowGrid(grid, 6, 32)
    assert WindowGrid(grid, 6, 112).step == 112


def test_usual_overlap() -> None:
    assert [usual_overlap(core, core // 32, 0) for core in (32, 64, 128, 224, 256, 512)] == [0, 0, 32, 32, 64, 128]
    assert usual_overlap(256, 4, 0) == 64
    assert usual_overlap(256, 2, 0) == 0
    assert usual_overlap(192, 6, 32) == 0
