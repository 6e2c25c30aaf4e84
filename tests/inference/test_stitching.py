from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch

from gigaxt.inference.scene_pass import WindowMaps
from gigaxt.inference.stitching import Stitcher
from gigaxt.inference.windows import WindowGrid
from gigaxt.regions import RegionGrid


def windows_of(height: int, width: int, overlap: int, *, hole: bool = False) -> WindowGrid:
    keep = np.ones((-(-height // 64), -(-width // 64)), bool)
    if hole:
        keep[1:3, 1:4] = False
    return WindowGrid(RegionGrid(height, width, 64, order="raster", keep=keep), 4, overlap)


def answers(windows: WindowGrid, maps: torch.Tensor, rows: Sequence[int], stride: int) -> Iterator[WindowMaps]:
    """Each window's part of `maps` (channels, H, W), and noise beyond the image."""
    side = windows.core // stride
    padded = torch.nn.functional.pad(maps, (0, 2 * side, 0, 2 * side), value=99)
    for row in rows:
        for col in np.flatnonzero(windows.needed[row]):
            y, x = int(windows.ys[row]) // stride, int(windows.xs[col]) // stride
            inside = np.zeros((64, 64), bool)
            inside[: windows.grid.height - y * stride, : windows.grid.width - x * stride] = True
            yield WindowMaps(row, int(col), padded[:, y : y + side, x : x + side], inside)


@pytest.mark.parametrize("stride", [1, 4])
@pytest.mark.parametrize("overlap", [0, 16, 32, 48])
@pytest.mark.parametrize(("height", "width"), [(150, 290), (64, 128), (30, 20), (1, 200), (200, 1), (65, 63)])
def test_what_all_windows_agree_on_comes_out(height: int, width: int, overlap: int, stride: int) -> None:
    """A numbered scene: every cell is itself again, once."""
    windows = windows_of(height, width, overlap)
    rows, cols = -(-height // stride), -(-width // stride)
    maps = torch.arange(2 * rows * cols, dtype=torch.float64).view(2, rows, cols)
    result = torch.full_like(maps, -1)
    seen = np.zeros((height, width), int)
    stitcher = Stitcher(windows, 2, stride=stride, dtype=torch.float64)
    everything = range(len(windows.ys))
    for block in stitcher.blocks(everything, answers(windows, maps, everything, stride)):
        h, w = block.valid.shape
        seen[block.y : block.y + h, block.x : block.x + w] += 1
        assert block.maps is not None
        y, x = block.y // stride, block.x // stride
        result[:, y : y + block.maps.shape[1], x : x + block.maps.shape[2]] = block.maps
        assert block.valid.all()
    assert (seen == 1).all()
    torch.testing.assert_close(result, maps, rtol=0, atol=1e-9)


@pytest.mark.parametrize("overlap", [0, 16, 48])
def test_windows_that_disagree_are_weighed(overlap: int) -> None:
    """Random answers with regions left out, against sums over the whole scene."""
    windows = windows_of(250, 330, overlap, hole=True)
    random = torch.Generator().manual_seed(0)
    rows = range(len(windows.ys))
    given = [
        WindowMaps(row, int(col), torch.rand(3, 64, 64, generator=random, dtype=torch.float64), np.ones((64, 64), bool))
        for row in rows
        for col in np.flatnonzero(windows.needed[row])
    ]
    down, across = windows.axis_weights()
    expected = torch.zeros(3, 400, 500, dtype=torch.float64)
    for one in given:
        y, x = windows.ys[one.row], windows.xs[one.col]
        weight = torch.from_numpy(down[one.row][:, None] * across[one.col])
        expected[:, y : y + 64, x : x + 64] += one.maps * weight
    kept = windows.kept_pixels(0, 0, 330, 250)
    assert not kept.all()
    for block in Stitcher(windows, 3, dtype=torch.float64).blocks(rows, iter(given)):
        h, w = block.valid.shape
        place = slice(block.y, block.y + h), slice(block.x, block.x + w)
        np.testing.assert_array_equal(block.valid, kept[place])
        if block.maps is not None:
            torch.testing.assert_close(block.maps, expected[:, place[0], place[1]])


@pytest.mark.parametrize("overlap", [16, 48])
def test_some_rows_alone_are_the_same(overlap: int) -> None:
    windows = windows_of(400, 150, overlap)
    maps = torch.rand(1, 400, 150, generator=torch.Generator().manual_seed(0))

    def blocks(rows: Sequence[int]) -> dict[tuple[int, int], torch.Tensor]:
        found = Stitcher(windows, 1).blocks(rows, answers(windows, maps, rows, 1))
        return {(block.row, block.x): block.maps for block in found if block.maps is not None}

    whole = blocks(range(len(windows.ys)))
    for row in range(len(windows.ys)):
        reached = [*(r for r in windows.rows_reaching(0)), *windows.rows_reaching(row)]
        part = blocks(sorted(set(reached)))  # row 0 leaves something behind that must not count
        for (of_row, x), block in part.items():
            if of_row == row:
                assert torch.equal(block, whole[row, x])
