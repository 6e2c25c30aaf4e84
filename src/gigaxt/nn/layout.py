"""Where the tokens and answers of regions belong: scenes that go together, neighbours, the whole scene."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from gigaxt.regions import RegionGrid
from gigaxt.scenes.batch import SceneBatch


def cases_alike(batch: SceneBatch) -> Iterator[list[int]]:
    """Groups of cases whose images have the same regions at the same places: their contexts are computed as one batch.

    A case of a dense model is a scene, so that its groups are of scenes.
    """
    groups: dict[Any, list[int]] = {}
    for case, scenes in enumerate(batch.cases):
        grids = [batch.scenes[scene].grid for scene in scenes]
        groups.setdefault(tuple((grid.rows, grid.cols, grid.places) for grid in grids), []).append(case)
    yield from groups.values()


def token_places(batch: SceneBatch, scenes: list[int], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Where the tokens of b scenes with equal grids are: in the batch, and on the token lattice.

    Returns:
        Rows of the batch (b, regions), on the CPU, where looking at them does not wait for the device. On `device`:
        coordinates (b, N, 2) as (row, col), and validity (b, N), N = regions * t * t.
    """
    rows = torch.stack([batch.rows_of(scene) for scene in scenes])
    coords = torch.from_numpy(batch.scenes[scenes[0]].grid.token_coords(batch.t))  # (regions, t * t, 2)
    valid = batch.token_validity[rows].flatten(1)  # (b, regions, t * t) -> (b, N)
    return rows, coords.flatten(0, 1).expand(len(scenes), -1, -1).to(device), valid.to(device)


def gather(tokens: Tensor, rows: Tensor) -> Tensor:
    """Tokens (regions, t * t, dim) of scenes whose regions are `rows` (b, regions): (b, N, dim), a view if possible."""
    ordered = rows.numel() == len(tokens) and in_order(rows.flatten())
    # (b, regions, t * t, dim) -> (b, N, dim)
    return (tokens.unflatten(0, rows.shape) if ordered else tokens[rows]).flatten(1, 2)


def in_order(rows: Tensor) -> bool:
    """Whether rows (n,) are 0, 1, ..., n - 1."""
    return torch.equal(rows, torch.arange(len(rows)))


def with_halo(context: Tensor, grid: RegionGrid, t: int, k: int) -> Tensor:
    """The context of regions of full size and of their halos, which is their neighbours'.

    Args:
        context: (b, N, dim) of scenes with this grid, `t` * `t` tokens a region.
        grid: of each.
        t: tokens along a side of a core.
        k: tokens along the halo.

    Returns:
        (b, regions, side * side, dim), side = t + 2 * k; zeros where the scene has no token.
    """
    if not k:
        own: Tensor = context[:, : grid.full_size * t * t].unflatten(1, (-1, t * t))  # (b, N, dim) -> (b, regions, ..)
        return own
    numbers = torch.from_numpy(grid.tokens_with_halo(t, k)).to(context.device)  # (regions, side * side)
    nothing = context.new_zeros(len(context), 1, context.shape[2])
    around: Tensor = torch.cat([context, nothing], dim=1)[:, numbers]  # -1 finds the zeros
    return around


def stitched(batch: SceneBatch, s: int, answers: Tensor) -> Tensor:
    """One scene's map (channels, height / stride, width / stride), of all regions' (n, channels, side, side)."""
    scene = batch.scenes[s]
    grid, side = scene.grid, answers.shape[-1]
    whole = answers.new_zeros(grid.rows, grid.cols, *answers.shape[1:])
    rows = [row for row, place in enumerate(batch.places[: batch.full_size]) if place[0] == s]
    places = torch.tensor([batch.places[row][2][:2] for row in rows])
    whole = whole.index_put((places[:, 0], places[:, 1]), answers[rows])
    # (rows, cols, channels, side, side) -> (channels, rows * side, cols * side)
    image = whole.permute(2, 0, 3, 1, 4).reshape(-1, grid.rows * side, grid.cols * side)
    return cut(image, scene.image.height, scene.image.width, grid.core // side)


def cut(answer: Tensor, height: int, width: int, stride: int) -> Tensor:
    """A map (channels, rows, cols) of `stride` px a cell without the cells that lie beyond `height` and `width` px."""
    return answer[:, : -(-height // stride), : -(-width // stride)]
