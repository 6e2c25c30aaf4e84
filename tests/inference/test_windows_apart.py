"""Models without context: windows are decoded with their own tokens, and nothing is encoded for others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gigaxt import GigaXT, Image, open_image
from gigaxt.augment import inverse, turn
from gigaxt.inference.parts import Parts
from gigaxt.inference.scene_pass import TURNS, ScenePass
from gigaxt.nn.context.base import NoContext
from tiny_models import segmenter

Array = np.ndarray[Any, Any]
HALO = {"region": 128, "halo": 32}


class SameInTwoPasses(NoContext):
    """No context as well, but the prediction cannot know."""


def without_context(**given: Any) -> GigaXT:
    return segmenter(context="none", **given).double()


def scene(height: int, width: int) -> Array:
    """Noise with a region that is left out, and a hole elsewhere that covers a token and parts of others."""
    pixels = np.random.default_rng(0).random((height, width, 3), np.float32)
    pixels[:64, 64:128] = np.nan
    pixels[64:110, :50] = np.nan
    return pixels


def opened(pixels: Array) -> Image:
    return open_image(pixels, nodata=float("nan"))


def answers(model: GigaXT, pixels: Array, folder: Path, **settings: Any) -> dict[tuple[int, int], Tensor]:
    """Probabilities of each window, by its x and y."""
    whole = ScenePass(model, opened(pixels), **settings)
    windows, found = whole.windows, {}
    with Parts(folder / "mask.tif", "scene", None) as parts:
        whole.find_context(parts, lambda count: None)
        rows = range(len(windows.ys))
        for one in whole.answers(parts, rows, lambda maps: maps[0].softmax(1), lambda count: None):
            found[int(windows.xs[one.col]), int(windows.ys[one.row])] = one.maps
    return found


@torch.no_grad()
def forward(model: GigaXT, pixels: Array) -> Array:
    """What training's forward pass gives for a scene: probabilities (classes, height, width)."""
    result: Array = model([opened(pixels)])[0].softmax(0).numpy()
    return result


@pytest.mark.parametrize("dihedral", [1, 8])
@pytest.mark.parametrize("given", [{}, {"overview": [2]}, HALO])
def test_on_the_lattice_as_the_forward_pass_and_as_in_two_passes(
    tmp_path: Path, given: dict[str, Any], dihedral: int
) -> None:
    model, pixels = without_context(**given), scene(192, 256)
    turns = TURNS[dihedral]  # sides are multiples of the core, so that grids of turned scenes coincide
    turned = [turn(np.moveaxis(forward(model, turn(pixels, k).copy()), 0, -1), inverse(k)) for k in turns]
    expected = np.moveaxis(np.mean(turned, axis=0), -1, 0)
    found = answers(model, pixels, tmp_path, overlap=0, dihedral=dihedral)
    assert len(found) == 11
    for (x, y), maps in found.items():
        np.testing.assert_allclose(maps, expected[:, y : y + 64, x : x + 64], rtol=0, atol=1e-12)
    model.context = SameInTwoPasses(model.config.context)
    before = answers(model, pixels, tmp_path, overlap=0, dihedral=dihedral)
    assert found.keys() == before.keys()
    for place, maps in found.items():
        torch.testing.assert_close(maps, before[place], rtol=0, atol=1e-13)


def test_off_the_lattice_as_the_forward_pass_for_a_region_there(tmp_path: Path) -> None:
    model, pixels = without_context(), scene(150, 200)
    found = answers(model, pixels, tmp_path, overlap=32)
    padded = np.pad(pixels, ((0, 64), (0, 64), (0, 0)), constant_values=np.nan)
    cut = {(x, y): padded[y : y + 64, x : x + 64] for x, y in found}
    assert len(cut) > 10
    for place, window in cut.items():
        if not np.isnan(window).all():
            np.testing.assert_allclose(found[place], forward(model, window), rtol=0, atol=1e-12)
    model.context = SameInTwoPasses(model.config.context)
    before = answers(model, pixels, tmp_path, overlap=32)  # tokens of the regions below a window, as with a context
    assert max(float((maps - before[place]).abs().max()) for place, maps in found.items()) > 1e-4


@pytest.mark.parametrize(
    ("given", "regions"), [({"context": "none"}, 0), ({"context": "none", **HALO}, 12), ({"context": "mamba2"}, 12)]
)
def test_only_windows_are_encoded_where_no_token_goes_elsewhere(
    tmp_path: Path, given: dict[str, Any], regions: int
) -> None:
    model, pixels = segmenter(**given), np.random.default_rng(0).random((150, 200, 3), np.float32)
    counts: list[int] = []
    model.encode.register_forward_pre_hook(lambda module, args: counts.append(len(args[0]["pixels"])))
    answers(model, pixels, tmp_path, overlap=32, dihedral=4)
    work = ScenePass(model, opened(pixels), overlap=32, dihedral=4).work
    assert sum(counts) == work == 4 * (regions + 4 * 6)
