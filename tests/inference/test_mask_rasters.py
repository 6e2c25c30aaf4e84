from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch

import gigaxt
from gigaxt import ConfigError, open_image
from gigaxt.inference.masks import probabilities_path
from tiny_models import classifier, segmenter


def scene(path: Path, height: int = 150, width: int = 200) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3)).astype(np.uint8)
    tifffile.imwrite(path, pixels, tile=(64, 64), photometric="rgb")
    return path


@pytest.mark.parametrize("dtype", ["uint8", "float16", "float32"])
@pytest.mark.parametrize(("height", "width"), [(150, 200), (1, 90), (90, 1), (20, 30)])
def test_probabilities_are_the_softmax_of_the_whole_scene(tmp_path: Path, dtype: Any, height: int, width: int) -> None:
    model, path = segmenter(), scene(tmp_path / "scene.tif", height, width)
    with torch.no_grad():
        expected = model([open_image(path)])[0].softmax(0).permute(1, 2, 0).numpy()
    out = gigaxt.predict(model, path, tmp_path / "mask.tif", probabilities=dtype)
    found = tifffile.imread(probabilities_path(out))
    assert (found.dtype, found.shape) == (np.dtype(dtype), (height, width, 4))
    if dtype == "uint8":
        np.testing.assert_allclose(found / 254, expected, atol=0.51 / 254)
    else:
        np.testing.assert_allclose(found, expected, atol=1e-3 if dtype == "float16" else 1e-6)
    assert (tifffile.imread(out) == expected.argmax(2)).mean() > 0.999


@pytest.mark.parametrize(
    ("name", "dtype"), [("RGB.byte.tif", "uint8"), ("RGB.byte.tif", "float32"), ("cogeo.tif", "uint8")]
)
def test_probabilities_as_rasterio_reads_them(fixtures: Path, tmp_path: Path, name: str, dtype: Any) -> None:
    rasterio = pytest.importorskip("rasterio")
    model = segmenter(head={"class_names": ["sea & sand", "land", "<ice>", "town"]})
    path = fixtures / "geotiff" / name
    out = gigaxt.predict(model, path, tmp_path / "mask.tif", probabilities=dtype)
    image = open_image(path)
    valid = image.validity(0, 0, image.width, image.height)
    with rasterio.open(path) as source, rasterio.open(probabilities_path(out)) as found:
        assert found.crs == source.crs
        assert found.transform.almost_equals(source.transform)
        assert (found.height, found.width, found.count) == (source.height, source.width, 4)
        assert found.descriptions == ("sea & sand", "land", "<ice>", "town")
        assert found.profile["tiled"]
        assert found.overviews(1) == [2 ** (i + 1) for i in range(len(found.overviews(1)))]
        assert len(found.overviews(1)) == int(np.ceil(np.log2(max(found.height, found.width) / 512)))
        np.testing.assert_array_equal(found.dataset_mask() > 0, valid)
        values = found.read(masked=True) * np.array(found.scales)[:, None, None]
        np.testing.assert_allclose(values.sum(0).compressed(), 1, atol=0.01)
        assert found.scales == ((1 / 254,) * 4 if dtype == "uint8" else (1.0,) * 4)
        coarse = found.read(1, out_shape=(found.height // 2, found.width // 2), masked=True)
        assert np.isfinite(coarse.compressed()).all()


def test_pixel_size_and_levels(tmp_path: Path) -> None:
    path = tmp_path / "scene.ome.tif"
    pixels = np.random.default_rng(0).integers(0, 256, (300, 600, 3)).astype(np.uint8)
    micrometres = {"PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5, "PhysicalSizeXUnit": "µm", "PhysicalSizeYUnit": "µm"}
    tifffile.imwrite(path, pixels, photometric="rgb", metadata={"axes": "YXS", **micrometres})
    out = gigaxt.predict(segmenter(), path, tmp_path / "mask.tif", probabilities="uint8", overlap=32)
    for written in (out, probabilities_path(out)):
        image = open_image(written)
        assert [(level.width, level.height) for level in image.levels] == [(600, 300), (300, 150)]
        assert image.mpp == pytest.approx((0.5, 0.5), rel=1e-3)


def test_overlapping_windows_leave_no_pixel_out(tmp_path: Path) -> None:
    """Also where regions lack data, whose pixels the windows of their neighbours cover."""
    pixels = np.random.default_rng(0).random((200, 260, 3), np.float32)
    pixels[60:140, 64:200] = np.nan
    image = open_image(pixels, nodata=float("nan"))
    out = gigaxt.predict(segmenter(), image, tmp_path / "mask.tif", overlap=32, probabilities="float32")
    empty = np.isnan(pixels[..., 0])
    np.testing.assert_array_equal(tifffile.imread(out) == 255, empty)
    found = tifffile.imread(probabilities_path(out))
    np.testing.assert_array_equal(np.isnan(found).all(2), empty)
    np.testing.assert_array_equal(np.isnan(found).any(2), empty)
    np.testing.assert_allclose(found[~empty].sum(1), 1, atol=1e-5)


def test_what_foreground_leaves_out_stays_empty(tmp_path: Path) -> None:
    foreground = np.zeros((192, 256), np.uint8)
    foreground[64:128, 64:256] = 1
    tifffile.imwrite(tmp_path / "foreground.tif", foreground)
    model = segmenter(foreground=str(tmp_path / "foreground.tif"))
    path = scene(tmp_path / "scene.tif", 192, 256)
    mask = tifffile.imread(gigaxt.predict(model, path, tmp_path / "mask.tif", overlap=32))
    np.testing.assert_array_equal(mask != 255, foreground > 0)


def test_float64_stays_exact(tmp_path: Path) -> None:
    model, path = segmenter().double(), scene(tmp_path / "scene.tif")
    with torch.no_grad():
        expected = model([open_image(path)])[0].softmax(0).permute(1, 2, 0).numpy()
    gigaxt.predict(model, path, tmp_path / "mask.tif", probabilities="float32")
    np.testing.assert_array_equal(tifffile.imread(tmp_path / "mask_probabilities.tif"), expected.astype(np.float32))


def test_settings_of_a_segmentation_only(tmp_path: Path) -> None:
    path = scene(tmp_path / "scene.tif")
    for settings in ({"overlap": 0}, {"dihedral": 8}, {"probabilities": "uint8"}):
        with pytest.raises(ConfigError, match="for models that segment"):
            gigaxt.predict(classifier(), path, tmp_path / "scores.csv", **settings)
    with pytest.raises(ConfigError, match="expected uint8, float16, float32, got 'int8'"):
        gigaxt.predict(segmenter(), path, tmp_path / "mask.tif", probabilities="int8")


@pytest.mark.parametrize("target", ["multi", "regression"])
def test_labels_and_numbers_are_blended_and_turned(tmp_path: Path, target: str) -> None:
    head = {"target": target, "class_names": ["a", "b"]}
    numbers = {"target_mean": [5.0, -3.0], "target_std": [2.0, 4.0]} if target == "regression" else {}
    model, path = segmenter(classes=2, head={**head, **numbers}), scene(tmp_path / "scene.tif")
    with torch.no_grad():
        answers = model([open_image(path)])[0].permute(1, 2, 0)
    expected = answers.numpy() if target == "regression" else (answers.sigmoid() > 0.5).numpy()
    out = gigaxt.predict(model, path, tmp_path / "mask.tif", probabilities=None if target == "regression" else "uint8")
    np.testing.assert_allclose(tifffile.imread(out), expected, atol=1e-4)
    gigaxt.predict(model, path, tmp_path / "mask.tif", overlap=32, dihedral=4)
    blended = tifffile.imread(out)
    assert 0 < np.abs(blended - expected.astype(float)).mean() < 0.5 * np.abs(expected).mean() + 0.5
    if target == "regression":
        with pytest.raises(ConfigError, match="which have none"):
            gigaxt.predict(model, path, tmp_path / "mask.tif", probabilities="uint8")
