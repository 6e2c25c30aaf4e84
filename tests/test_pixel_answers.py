"""What labels and numbers become on disk and in pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gigaxt import GigaXT, open_image, predict
from gigaxt.image.memory import ArrayImage
from gigaxt.nn.heads import SegmentConfig
from gigaxt.pixel_answers import answer_raster, as_probabilities, over_picture
from tiny_models import tiny_model

UNITS = {"target_mean": [20.0], "target_std": [4.0]}


def model_of(**head: Any) -> GigaXT:
    return tiny_model({"kind": "segment", "dim": 8, **head})


def image() -> ArrayImage:
    pixels = np.random.default_rng(0).integers(1, 255, (100, 150, 3)).astype(np.uint8)
    pixels[10:20, 30:90] = 0
    return ArrayImage(pixels, nodata=0)


def test_numbers_are_written_as_one_band_of_float32(tmp_path: Path) -> None:
    model = model_of(classes=1, target="regression", class_names=["height"], **UNITS)
    written = open_image(predict(model, image(), tmp_path / "heights.tif"))
    assert (written.channels, written.dtype.name, written.height, written.width) == (1, "float32", 100, 150)
    assert np.isnan(written.nodata)
    with torch.no_grad():
        expected = model([image()])[0].numpy()
    pixels, valid = written.read_valid(0, 0, 150, 100)
    np.testing.assert_array_equal(valid, image().validity(0, 0, 150, 100))
    np.testing.assert_allclose(pixels[valid], expected.transpose(1, 2, 0)[valid], rtol=1e-5)
    assert np.isnan(pixels[~valid]).all()


def test_labels_are_written_as_bands_of_zero_and_one(tmp_path: Path) -> None:
    model = model_of(classes=3, target="multi", class_names=["roof", "tree", "car"])
    with torch.no_grad():
        model.head.classifier.shared.bias -= model([image()])[0].mean((1, 2))
    written = open_image(predict(model, image(), tmp_path / "labels.tif"))
    assert (written.channels, written.dtype.name, written.nodata) == (3, "uint8", 255)
    assert written.band_names == ("roof", "tree", "car")
    with torch.no_grad():
        expected = (model([image()])[0] > 0).numpy().transpose(1, 2, 0)
    pixels, valid = written.read_valid(0, 0, 150, 100)
    np.testing.assert_array_equal(pixels[valid], expected[valid])
    assert set(np.unique(pixels[valid])) == {0, 1}
    assert (pixels[~valid] == 255).all()


@pytest.mark.parametrize("target", ["single", "multi", "regression"])
def test_shares_of_one_region_and_of_many(target: Any) -> None:
    head = SegmentConfig(classes=3, target=target)
    answers = torch.randn(2, 3, 4, 5)
    found = as_probabilities(head, answers)
    torch.testing.assert_close(found[1], as_probabilities(head, answers[1]))
    if target == "single":
        torch.testing.assert_close(found.sum(1), torch.ones(2, 4, 5))
    if target == "regression":
        assert torch.equal(found, answers)
    assert answer_raster(head).encode(found[0], np.ones((4, 5), bool)).shape == (4, 5, 1 if target == "single" else 3)


def test_pictures() -> None:
    picture = np.full((4, 6, 3), 100, np.uint8)
    classes = np.zeros((4, 6), np.uint8)
    classes[1, 2] = 1
    drawn = over_picture(picture, open_image(classes), SegmentConfig(classes=2))
    assert np.argwhere((drawn != 100).any(axis=2)).tolist() == [[1, 2]]
    labels = np.zeros((4, 6, 2), np.uint8)
    labels[0, 1, 0], labels[3, 5, 1], labels[2, 2] = 1, 1, 255
    drawn = over_picture(picture, open_image(labels), SegmentConfig(classes=2, target="multi"))
    assert np.argwhere((drawn != 100).any(axis=2)).tolist() == [[0, 1], [3, 5]]
    assert (drawn[0, 1] != drawn[3, 5]).any()
    heights = np.full((4, 6), np.nan, np.float32)
    heights[0, 0], heights[1, 1], heights[2, 2] = 12, 20, 28
    drawn = over_picture(picture, open_image(heights), SegmentConfig(classes=1, target="regression", **UNITS))
    assert np.argwhere((drawn != 100).any(axis=2)).tolist() == [[0, 0], [1, 1], [2, 2]]
    assert drawn[0, 0, 2] > drawn[0, 0, 0]  # low is blue, high is yellow
    assert drawn[2, 2, 0] > drawn[2, 2, 2]
