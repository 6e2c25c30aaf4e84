"""Regions of one image and their validity, against what is written by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tifffile

from gigaxt.image import Image, open_image
from gigaxt.image.base import Mask, Pixels
from gigaxt.scenes.batch import SceneBatch
from gigaxt.scenes.inputs import InputConfig
from gigaxt.scenes.region_pixels import read_regions, stack_masks

H, W = 70, 110
WINDOWS = [(0, 0, 32, 32), (40, 10, 32, 32), (-8, 20, 32, 32), (90, 50, 32, 32), (64, 32, 32, 32), (96, -32, 32, 32)]


def read(image: Image) -> tuple[list[Pixels], list[Mask | None]]:
    out = [np.full((h, w, image.channels), 99, image.dtype) for _, _, w, h in WINDOWS]
    return out, read_regions(image, WINDOWS, out)


def expected(pixels: np.ndarray, valid: np.ndarray, fill: float = 0) -> tuple[list[np.ndarray], list[np.ndarray]]:
    far = ((50, 50), (50, 50), (0, 0))
    pixels, valid = np.pad(pixels, far, constant_values=fill), np.pad(valid, far)
    places = [(slice(y + 50, y + 50 + h), slice(x + 50, x + 50 + w)) for x, y, w, h in WINDOWS]
    return [pixels[place] for place in places], [valid[place] for place in places]


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
@pytest.mark.parametrize("nodata", [None, 0])
@pytest.mark.parametrize("of_file", [True, False])
def test_pixels_and_validity(tmp_path: Path, dtype: type, nodata: int | None, of_file: bool) -> None:
    pixels = np.random.default_rng(0).integers(1, 200, (H, W, 2)).astype(dtype)
    pixels[40:60, 50:80] = 0
    pixels[12, 50, 1] = 0  # one band alone is nodata there: told of floating point only
    if dtype is np.float32:
        pixels[15, 45, 0] = np.inf
    path = tmp_path / "a.tif"
    tags = [] if nodata is None else [(42113, "s", 0, str(nodata), True)]
    tifffile.imwrite(path, pixels, tile=(16, 32), compression="zlib", extratags=tags, planarconfig="contig")
    image = open_image(path) if of_file else open_image(pixels, nodata=nodata)
    valid = np.ones((H, W, 1), bool) if nodata is None else (pixels != 0).any(axis=2, keepdims=True)
    if dtype is np.float32:
        valid = valid & np.isfinite(pixels) & (True if nodata is None else pixels != 0)
    right, masks = expected(pixels, valid)
    out, found = read(image)
    for one, other in zip(out, right, strict=True):
        np.testing.assert_array_equal(one, other)
    for mask, other in zip(found, masks, strict=True):
        assert mask is not None or other.all()
        assert mask is None or not mask.all()
        np.testing.assert_array_equal(True if mask is None else mask, other)
    stacked = stack_masks(found, (32, 32)).numpy()
    np.testing.assert_array_equal(stacked, np.broadcast_to(np.stack(masks), stacked.shape))


def test_a_chunk_of_scenes_of_several_dtypes_and_overviews() -> None:
    rng = np.random.default_rng(0)
    arrays = [rng.integers(0, 200, (64, 96, 1), dtype=np.uint8), rng.random((96, 33, 1), dtype=np.float32)]
    images = [open_image(array) for array in arrays]
    config = InputConfig(mean=[0.0], std=[1.0], overview=[2])
    batch = SceneBatch(images, config, region=32, channels=1, tokens_per_core=2)
    rows = rng.permutation(len(batch.places)).tolist()
    (chunk,) = batch.picked(rows, 99)
    loaded = batch.load(chunk)
    assert loaded["pixels"].numpy().dtype == np.float32
    for at, (scene, _, place) in enumerate(chunk.places):
        level = batch.scenes[scene].levels[place.level]
        assert isinstance(level, Image)
        window = batch.scenes[scene].grid.window_xywh(place)
        pixels, mask = level.read_valid(*window)
        np.testing.assert_array_equal(loaded["pixels"][at], pixels)
        np.testing.assert_array_equal(loaded["valid"][at, ..., 0], mask)
        cells = mask.reshape(2, 16, 2, 16).any(axis=(1, 3)).ravel()
        np.testing.assert_array_equal(batch.token_validity[chunk.rows[at]], cells)
