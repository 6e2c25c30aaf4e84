"""Pixels of many regions of one image, read together, and which of them are real."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from gigaxt.image.base import Image, Mask, Pixels, Window, lies_inside
from gigaxt.streaming.prefetch import host_buffer


def read_regions(image: Image, windows: Sequence[Window], out: Sequence[Pixels]) -> list[Mask | None]:
    """Read windows of level 0, and say which of their pixels are valid.

    Args:
        image: to read.
        windows: (x, y, w, h); may reach over its border.
        out: an array (h, w, C) for each, of the image's dtype or one that holds its values.

    Returns:
        (h, w, 1 or C) each; None: all are valid.
    """
    masks: list[Mask | None]
    if image.all_valid:
        image.read_into(out, windows)
        masks = [_inside(image, *window) for window in windows]
    else:
        masks = []
        if len(windows) > 1:
            image.expect(windows)
        for target, window in zip(out, windows, strict=True):
            target[...], mask = image.read_valid(*window)
            masks.append(mask[..., None])
    if image.dtype.kind == "f":
        masks = [_with_numbers(image, pixels, mask) for pixels, mask in zip(out, masks, strict=True)]
    return [None if mask is None or mask.all() else mask for mask in masks]


def stack_masks(masks: Sequence[Mask | None], size: tuple[int, int]) -> Tensor:
    """Masks of regions of `size` (h, w) as one tensor (n, h, w, 1 or C); None stands for all pixels."""
    bands = max((mask.shape[2] for mask in masks if mask is not None), default=1)
    stacked = host_buffer((len(masks), *size, bands), np.dtype(np.bool_))
    for whole, mask in zip(stacked.numpy(), masks, strict=True):
        whole[...] = True if mask is None else mask
    return stacked


def valid_cells(valid: Tensor, t: int) -> Tensor:
    """Which of the t x t cells of cores hold a valid pixel: (n, core, core, bands) bool -> (n, t * t) bool."""
    real, core = valid.any(dim=3), valid.shape[1]
    cells = list(pairwise(core * i // t for i in range(t + 1)))
    rows = torch.stack([real[:, start:stop].any(dim=1) for start, stop in cells], dim=1)  # (n, t, core)
    return torch.stack([rows[:, :, start:stop].any(dim=2) for start, stop in cells], dim=2).flatten(1)


def _inside(image: Image, x: int, y: int, w: int, h: int) -> Mask | None:
    """Which pixels of a window lie in the image, (h, w, 1); None: all do."""
    if lies_inside((x, y, w, h), image.height, image.width):
        return None
    inside = np.zeros((h, w, 1), dtype=np.bool_)
    inside[max(0, -y) : max(0, image.height - y), max(0, -x) : max(0, image.width - x)] = True
    return inside


def _with_numbers(image: Image, pixels: Pixels, mask: Mask | None) -> Mask:
    """A valid pixel of floating point may lack single bands: (h, w, C).

    Integers are left alone: 0 is nodata and a colour in too many files. What is not finite is no number, whatever the
    file says: through the context it would spoil the whole scene.
    """
    present = np.isfinite(pixels)
    if image.nodata is not None:
        present &= pixels != image.dtype.type(image.nodata)
    return present if mask is None else present & mask
