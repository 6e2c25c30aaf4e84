from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor, nn

import gigaxt
from gigaxt import ConfigError, GigaXT, ModelConfig, Streaming, open_image
from gigaxt.augment import dihedral, inverse, turn
from gigaxt.inference.scene_pass import TURNS, turned, turned_coords
from tiny_models import segmenter

Array = np.ndarray[Any, Any]


def noise(height: int, width: int, bands: int = 3, seed: int = 0) -> Array:
    return np.random.default_rng(seed).random((height, width, bands), np.float32)


def predicted(model: GigaXT, pixels: Array, folder: Path, **settings: Any) -> Array:
    """Probabilities (classes, height, width) as written; NaN where nothing is."""
    image = open_image(pixels, nodata=float("nan"))
    gigaxt.predict(model, image, folder / "mask.tif", probabilities="float32", **settings)
    return np.moveaxis(tifffile.imread(folder / "mask_probabilities.tif"), -1, 0)


def softmax(model: GigaXT, pixels: Array) -> Array:
    """Of the scene as a whole, in memory."""
    with torch.no_grad():
        result: Array = model([open_image(pixels, nodata=float("nan"))])[0].softmax(0).numpy()
    return result


@pytest.mark.parametrize("k", range(8))
def test_turned_as_numpy_turns(k: int) -> None:
    array = np.arange(2 * 3 * 5).reshape(2, 3, 5)
    expected = np.stack([turn(part, k) for part in array])
    np.testing.assert_array_equal(turned(torch.from_numpy(array), k).numpy(), expected)
    assert torch.equal(turned(turned(torch.from_numpy(array), k), inverse(k)), torch.from_numpy(array))


@pytest.mark.parametrize("k", range(8))
def test_turned_places_are_those_of_a_turned_scene(k: int) -> None:
    """A token lattice of 2 x 3 regions of 2 x 2 tokens: numbers go where their places say."""
    lattice = np.arange(4 * 6).reshape(4, 6)
    regions = lattice.reshape(2, 2, 3, 2).transpose(0, 2, 1, 3).reshape(6, 2, 2)
    rows, cols = np.divmod(regions, 6)
    coords = np.stack([rows, cols], -1).reshape(6, 4, 2).astype(np.float32)
    places = turned_coords(coords, (4, 6), k).long()
    tokens = turned(torch.from_numpy(regions), k).reshape(6, 4)
    found = np.full(turn(lattice, k).shape, -1)
    found[places[..., 0], places[..., 1]] = tokens
    np.testing.assert_array_equal(found, turn(lattice, k))


@pytest.mark.parametrize("elements", [4, 8])
@pytest.mark.parametrize("given", [{}, {"overview": [2]}, {"halo": 32}])
def test_averages_over_turned_scenes(tmp_path: Path, elements: int, given: dict[str, Any]) -> None:
    """Against the model on scenes that were turned as a whole; sides are multiples of the core, so grids coincide."""
    if "halo" in given:
        given = {**given, "region": 128}
    model, pixels = segmenter(**given), noise(128, 256)
    pixels[:64, 64:128] = np.nan  # a region is left out
    turns = TURNS[elements]
    answers = [turn(np.moveaxis(softmax(model, turn(pixels, k).copy()), 0, -1), inverse(k)) for k in turns]
    expected = np.moveaxis(np.mean(answers, axis=0), -1, 0)
    found = predicted(model, pixels, tmp_path, dihedral=elements)
    valid = ~np.isnan(pixels[..., 0])
    np.testing.assert_array_equal(np.isnan(found[0]), ~valid)
    np.testing.assert_allclose(found[:, valid], expected[:, valid], atol=2e-6)
    plain = predicted(model, pixels, tmp_path)
    assert np.abs(plain - found)[:, valid].max() > 1e-3


def test_turns_of_a_scene_that_does_not_fit_are_those_of_the_padded_one(tmp_path: Path) -> None:
    model, pixels = segmenter(), noise(100, 150)
    padded = np.full((128, 192, 3), np.nan, np.float32)
    padded[:100, :150] = pixels
    found = predicted(model, pixels, tmp_path, dihedral=8)
    np.testing.assert_allclose(found, predicted(model, padded, tmp_path, dihedral=8)[:, :100, :150], atol=2e-6)


@pytest.mark.parametrize("elements", [1, 8])
@pytest.mark.parametrize(("height", "width"), [(150, 200), (30, 20), (1, 300), (64, 65)])
def test_overlap_against_windows_cut_by_hand(tmp_path: Path, height: int, width: int, elements: int) -> None:
    model, pixels = segmenter(), noise(height, width)
    pixels[5:9, 5:9] = np.nan
    pixels[64:128, 64:128] = np.nan  # a region is left out, whose neighbours' windows find no token there
    found = predicted(model, pixels, tmp_path, overlap=32, dihedral=elements)
    expected = np.mean([_by_hand(model, pixels, k) for k in TURNS[elements]], axis=0)
    valid = ~np.isnan(pixels[..., 0])
    np.testing.assert_allclose(found[:, valid], expected[:, valid], atol=3e-6)


@torch.no_grad()
def _by_hand(model: GigaXT, pixels: Array, k: int) -> Array:
    """Windows of 64 px, 32 px apart, of a scene padded to whole regions; context by the model's own loop."""
    height, width = pixels.shape[:2]
    rows, cols = -(-height // 64), -(-width // 64)
    padded = np.full((rows * 64, cols * 64, 3), np.nan, np.float32)
    padded[:height, :width] = pixels
    batch = model.batch([dihedral(open_image(padded, nodata=float("nan")), k)])
    loaded = batch.load(batch.chunks(10**6)[0])
    tokens = model.encode(loaded)[0]
    down, across = (cols, rows) if k & 4 else (rows, cols)
    places = [(place.row, place.col) for _, _, place in batch.places]
    coords = torch.from_numpy(batch.scenes[0].grid.token_coords(2)).flatten(0, 1)[None]
    told = model.context(tokens.flatten(0, 1)[None], coords, batch.token_validity.flatten()[None])[0][0]
    lattice = torch.zeros(down * 2, across * 2, told.shape[-1])
    for (row, col), region in zip(places, told.view(len(places), 2, 2, -1), strict=True):
        lattice[2 * row : 2 * row + 2, 2 * col : 2 * col + 2] = region
    lattice = turned(lattice[None], inverse(k))[0]  # back into the scene's direction, where windows are cut
    around = np.pad(padded, ((0, 64), (0, 64), (0, 0)), constant_values=np.nan)
    lattice = nn.functional.pad(lattice, (0, 0, 0, 2, 0, 2))
    total, weights = np.zeros((4, *around.shape[:2])), np.zeros(around.shape[:2])
    rise = np.sin(np.pi / 64 * (np.arange(32) + 0.5)) ** 2
    shape = np.concatenate([rise, rise[::-1]])
    for y in range(0, max(1, height - 32), 32):
        for x in range(0, max(1, width - 32), 32):
            window = turn(around[y : y + 64, x : x + 64], k)
            valid = torch.from_numpy(~np.isnan(window).all(2))[None, ..., None]
            given = {name: value[:1] for name, value in loaded.items()}
            given |= {"pixels": torch.from_numpy(window.copy())[None], "valid": valid}
            context = lattice[y // 32 : y // 32 + 2, x // 32 : x // 32 + 2]
            logits = model.head(model.encode(given)[1], turned(context[None], k))
            answer = turned(logits.softmax(1), inverse(k), first=2)[0].numpy()
            total[:, y : y + 64, x : x + 64] += answer * np.outer(shape, shape)
            weights[y : y + 64, x : x + 64] += np.outer(shape, shape)
    return total[:, :height, :width] / weights[:height, :width]


class _PixelEncoder(nn.Module):
    """Maps: the pixels themselves. Tokens: means of 32 x 32 px."""

    dim, tokens_per_side, map_channels, map_strides = 2, 2, (2,), (1,)

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, pixels: Tensor) -> tuple[Tensor, list[Tensor]]:
        tokens = nn.functional.avg_pool2d(pixels, 32) * self.scale
        return tokens.permute(0, 2, 3, 1), [pixels * self.scale]


class _PixelHead(nn.Module):
    """Logits from a pixel and from the token above it."""

    def forward(self, maps: tuple[Tensor, ...], context: Tensor) -> Tensor:
        above = context.permute(0, 3, 1, 2).repeat_interleave(32, 2).repeat_interleave(32, 3)
        return torch.cat([maps[0], above[:, :1]], dim=1)

    def shapes(self, region_px: int) -> list[tuple[int, int, int]]:
        return [(3, region_px, region_px)]

    def loss_sums(self, *_: Any) -> Any:
        raise NotImplementedError

    loss = scores = as_target = loss_sums


@pytest.mark.parametrize(("height", "width"), [(150, 200), (40, 300)])
@pytest.mark.parametrize("overlap", [0, 32])
def test_an_equivariant_model_answers_the_same_whichever_way_it_is_turned(
    tmp_path: Path, height: int, width: int, overlap: int
) -> None:
    """On a numbered image, in float64: each pixel has an answer of its own, and gets it back."""
    config = {
        "region_encoder": {"name": "own", "region": 64, "in_channels": 2},
        "context": {"kind": "none", "dim": 2},
        "head": {"kind": "segment", "classes": 3},
    }
    model = gigaxt.build_model(
        ModelConfig.from_dict(config), region_encoder=_PixelEncoder(), head=_PixelHead()
    ).double()
    rows, cols = np.mgrid[:height, :width]
    pixels = np.stack([rows / 100, cols / 100], -1).astype(np.float32)
    plain = predicted(model.eval(), pixels, tmp_path, overlap=overlap)
    for elements in (4, 8):
        found = predicted(model, pixels, tmp_path, overlap=overlap, dihedral=elements)
        np.testing.assert_allclose(found, plain, atol=2e-7)
    logits = np.log(plain[0] / plain[1])
    np.testing.assert_allclose(logits, (rows - cols) / 100, atol=1e-5)


@pytest.mark.parametrize("elements", [2, 0, 3])
def test_other_numbers_of_turns_are_refused(tmp_path: Path, elements: int) -> None:
    with pytest.raises(ConfigError, match=f"dihedral: expected 1, 4 or 8, got {elements}"):
        predicted(segmenter(), noise(64, 64), tmp_path, dihedral=elements)


def test_overlap_ends_the_seams(tmp_path: Path) -> None:
    """A model trained to find where a smooth field is positive under noise, which needs a pixel's neighbours."""

    def scene(seed: int, side: int) -> tuple[Array, Array]:
        random = np.random.default_rng(seed)
        field = gaussian_filter(random.standard_normal((side, side)), 8, mode="wrap")
        noisy = field / field.std() + 0.5 * random.standard_normal((side, side))
        return noisy.astype(np.float32)[..., None], (field > 0).astype(np.uint8)

    model = segmenter(classes=2, bands=1, head={"dim": 16}).train()
    model.streaming = Streaming(budget_gib=1.0)  # nothing is computed twice
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(50):
        pixels, target = scene(1000 + step, 128)
        loss = model(torch.from_numpy(pixels).permute(2, 0, 1)[None], [target], seed=step)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    model.eval()

    def ratio(overlap: int) -> float:
        """Of the mean error within 2 px of a border of regions to that elsewhere."""
        errors = []
        for seed in range(3):
            pixels, target = scene(seed, 320)
            errors.append(np.abs(predicted(model, pixels, tmp_path, overlap=overlap)[1] - target)[8:-8, 8:-8])
        error, at = np.mean(errors, axis=0), np.arange(8, 312) % 64
        near = (at < 2) | (at >= 62)
        border = near[:, None] | near
        return float(error[border].mean() / error[~border].mean())

    assert ratio(0) > 1.25
    assert ratio(32) < 1.1
