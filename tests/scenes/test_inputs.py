from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as Pillow

import gigaxt
from gigaxt.augment import ColourAugmented, colour_augmented, dihedral, draw_crop
from gigaxt.errors import ConfigError, DataError
from gigaxt.image import open_image
from gigaxt.image.views import Cropped
from gigaxt.scenes.inputs import InputConfig, resized, to_size
from gigaxt.targets.base import MaskTarget, as_mask
from tiny_models import classifier, segmenter, tiny_model

RGB = {"mean": [123.675, 116.28, 103.53], "std": [58.395, 57.12, 57.375]}


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)


@pytest.mark.parametrize(
    ("size", "side", "expected"),
    [
        ((800, 600), "both", (512, 512)),
        ((800, 600), "longest", (512, 384)),
        ((600, 800), "longest", (384, 512)),
        ((800, 600), "shortest", (683, 512)),
        ((333, 500), "shortest", (512, 769)),
        ((5000, 2), "longest", (512, 1)),
        ((1, 1), "longest", (512, 512)),
    ],
)
def test_sizes(size: tuple[int, int], side: Any, expected: tuple[int, int]) -> None:
    assert resized(*size, 512, side) == expected


def test_nothing_is_touched_without() -> None:
    image, target = open_image(noise(30, 40, 3)), as_mask(noise(30, 40))
    assert to_size(image, target, InputConfig()) == (image, target)
    same, moved = to_size(image, target, InputConfig(resize_px=40))  # it has that size
    assert isinstance(moved, MaskTarget)
    assert (same, moved.mask) == (image, target.mask)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"resize_px": 0}, "input.resize_px: expected at least 1, got 0"),
        ({"mpp": float("nan")}, "input.mpp: expected a positive number, got nan"),
        ({"gsd_m": -1.0}, "input.gsd_m: expected a positive number, got -1.0"),
        ({"mean": [float("nan")], "std": [1.0]}, "input.mean: expected finite numbers"),
        ({"mean": [0.0], "std": [float("inf")]}, "input.std: expected numbers above 0"),
        ({"halo": -32}, "input.halo: expected a multiple of 32 px from 0, got -32"),
        ({"resize_px": 512, "mpp": 0.5}, "`resize_px` and a pixel size .* exclude each other"),
        ({"resize_px": 512, "gsd_m": 10.0}, "`resize_px` and a pixel size .* exclude each other"),
    ],
)
def test_contradictions(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        InputConfig(**settings)


def test_colours_and_turns_stay_outermost() -> None:
    pixels = noise(30, 40, 3)
    turned = dihedral(colour_augmented(open_image(pixels), [2, 2, 2], [0, 0, 0]), 4)
    view, _ = to_size(turned, None, InputConfig(resize_px=20))
    assert isinstance(view, ColourAugmented)
    assert (view.width, view.height) == (15, 20)
    small = np.asarray(Pillow.fromarray(pixels).resize((20, 15), Pillow.Resampling.BILINEAR))
    np.testing.assert_array_equal(view.read(0, 0, 15, 20), np.swapaxes(small, 0, 1))


@pytest.mark.parametrize(("side", "size"), [("both", (128, 128)), ("longest", (128, 96)), ("shortest", (171, 128))])
def test_model_sees_what_pillow_makes(side: str, size: tuple[int, int]) -> None:
    """Streamed images equal the tensor of the resized picture, in a batch of several sizes too."""
    model = tiny_model({"kind": "classify", "classes": 3}, resize_px=128, resize_side=side, **RGB)
    picture = Pillow.fromarray(noise(60, 80, 3))
    small = np.asarray(picture.resize(size, Pillow.Resampling.BILINEAR), np.float32)
    tensor = torch.from_numpy((small - np.float32(RGB["mean"])) / np.float32(RGB["std"])).permute(2, 0, 1)
    expected = model(tensor[None])
    image, other = open_image(np.asarray(picture)), open_image(noise(50, 20, 3))
    torch.testing.assert_close(model([image]), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(model([other, image])[1:], expected, rtol=0, atol=1e-5)


def test_it_is_saved_with_the_model(tmp_path: Path) -> None:
    model = tiny_model({"kind": "classify", "classes": 3}, resize_px=96, resize_side="both", rgb=True, **RGB)
    model.save(tmp_path / "model")
    assert gigaxt.load(tmp_path / "model").config.input == model.config.input
    grey = tmp_path / "grey.jpg"
    Pillow.fromarray(noise(50, 70)).save(grey)
    gigaxt.predict(model, grey, tmp_path / "scores.csv")
    with pytest.raises(DataError, match=r"takes 3 bands, the image has 1; open it with rgb=True"):
        model([open_image(grey)])
    answer = model([open_image(grey, rgb=True)]).softmax(1)[0]
    written = [float(x) for x in (tmp_path / "scores.csv").read_text().splitlines()[1].split(",")[2:]]
    np.testing.assert_allclose(written, answer.tolist(), atol=1e-5)


def test_masks_are_resized_alike(tmp_path: Path) -> None:
    """Classes of blocks of 10 px; the model works at 64 px, where they are blocks of 8."""
    model = segmenter(resize_px=64, resize_side="longest")
    image, mask = open_image(noise(60, 80, 3)), np.kron(noise(6, 8) % 4, np.ones((10, 10), np.uint8))
    small = np.kron(noise(6, 8) % 4, np.ones((8, 8), np.uint8))
    resized_image, _ = to_size(image, None, model.config.input)
    plain = segmenter()
    plain.load_state_dict(model.state_dict())
    expected = plain.evaluate([resized_image], [open_image(small)])
    found = model.evaluate([image], [open_image(mask)])
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])
    written = open_image(gigaxt.predict(model, image, tmp_path / "mask.tif"))
    assert (written.height, written.width) == (48, 64)


def test_a_crop_is_resized_as_a_picture_of_its_own() -> None:
    """A random crop and `resize_px` are timm's random resized crop."""
    model = classifier()
    model.config.input.resize_px, model.config.input.resize_side = 64, "both"
    pixels = noise(90, 120, 3)
    for seed in range(5):
        part = Cropped(open_image(pixels), *draw_crop(*pixels.shape[:2], seed, 0.08))
        cut = part.read(0, 0, part.width, part.height)
        torch.testing.assert_close(model([part]), model([open_image(cut)]), rtol=0, atol=0)
