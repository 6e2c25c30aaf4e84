"""Masks cut to windows, against masks of the whole image."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from shapely import Polygon, contains_xy
from torch.nn import functional as F

from gigaxt import DataError, open_image
from gigaxt.augment import dihedral
from gigaxt.image.views import resample
from gigaxt.shapes.crops import Crop, outlines, painted
from gigaxt.targets.boxes import BoxTarget
from gigaxt.targets.instances import InstanceTarget, as_instances

HEIGHT, WIDTH = 37, 53


def whole(crop: Crop, height: int, width: int) -> NDArray[np.bool_]:
    canvas = np.zeros((height, width), np.bool_)
    h, w = crop.pixels.shape
    canvas[crop.y : crop.y + h, crop.x : crop.x + w] = crop.pixels
    return canvas


def crops() -> list[Crop]:
    """Two whose windows touch borders, one inside."""
    random = np.random.default_rng(0)
    return [
        Crop(0, 5, random.random((12, 9)) > 0.4),
        Crop(20, 11, random.random((7, 16)) > 0.4),
        Crop(40, 30, random.random((7, 13)) > 0.4),
    ]


def target() -> InstanceTarget:
    boxes = [[c.x, c.y, c.x + c.pixels.shape[1], c.y + c.pixels.shape[0]] for c in crops()]
    return InstanceTarget(BoxTarget(boxes, [0, 1, 2], [False, False, True], size_px=(HEIGHT, WIDTH)), crops())


@pytest.mark.parametrize("k", range(8))
def test_turned_as_the_image(k: int) -> None:
    turned = target().turned(k)
    for before, after in zip(crops(), turned.crops, strict=True):
        image = dihedral(open_image(whole(before, HEIGHT, WIDTH).astype(np.uint8)), k)
        expected = image.read(0, 0, image.width, image.height)[..., 0] > 0
        np.testing.assert_array_equal(whole(after, image.height, image.width), expected)
    for crop, box in zip(turned.crops, turned.boxes.boxes_xyxy, strict=True):
        assert box.tolist() == [crop.x, crop.y, crop.x + crop.pixels.shape[1], crop.y + crop.pixels.shape[0]]


def test_cropped_as_the_image() -> None:
    """One is cut, one is left out, as its box is."""
    cut = target().cropped(24, 9, 20, 25)
    assert len(cut.crops) == len(cut.boxes.classes) == 2
    for before, after in zip(crops()[1:], cut.crops, strict=True):
        np.testing.assert_array_equal(whole(after, 25, 20), whole(before, HEIGHT, WIDTH)[9:34, 24:44])
    assert cut.boxes.classes.tolist() == [1, 2]


@pytest.mark.parametrize("scale", [0.5, 2.0, 1.7])
def test_resampled_as_the_image(scale: float) -> None:
    resampled = target().resampled(scale, scale)
    for before, after in zip(crops(), resampled.crops, strict=True):
        image = resample(open_image(whole(before, HEIGHT, WIDTH).astype(np.uint8)), scale, nearest=True)
        expected = image.read(0, 0, image.width, image.height)[..., 0] > 0
        found = whole(after.cut(0, 0, image.width, image.height), image.height, image.width)
        if scale == 1.7:  # resampling images rounds their size, and with it the place of a few pixels
            assert (found != expected).mean() < 0.02
        else:
            np.testing.assert_array_equal(found, expected)


def test_painted_where_the_chance_is_even_or_more() -> None:
    chances = np.random.default_rng(1).random((4, 4)).astype(np.float32)
    box = (3.3, 5.1, 25.9, 16.4)
    crop = painted(chances, box, 30, 30)
    found, padded = whole(crop, 30, 30), np.pad(chances, 1)
    for row, col in np.ndindex(30, 30):
        x, y = (col + 0.5 - box[0]) / 22.6 * 4 + 0.5, (row + 0.5 - box[1]) / 11.3 * 4 + 0.5  # in cells of the padded
        if not (0 <= x <= 5 and 0 <= y <= 5):
            assert not found[row, col]
            continue
        i, j = min(int(y), 4), min(int(x), 4)
        a, b = y - i, x - j
        upper, lower = (padded[k, j] * (1 - b) + padded[k, j + 1] * b for k in (i, i + 1))
        chance = upper * (1 - a) + lower * a
        if abs(chance - 0.5) > 1e-5:
            assert found[row, col] == (chance > 0.5)
    assert found.any()


def test_painted_beyond_the_image_is_cut() -> None:
    crop = painted(np.ones((28, 28), np.float32), (-5.0, 20.0, 8.0, 99.0), 30, 30)
    assert crop.pixels.all()
    assert (crop.x, crop.y, crop.pixels.shape) == (0, 20, (10, 8))
    assert painted(np.ones((28, 28), np.float32), (40, 40, 50, 50), 30, 30).pixels.size == 0


def test_outlines_hold_what_is_painted() -> None:
    """A ring and a dot: two polygons, one with a hole."""
    y, x = np.mgrid[:28, :28]
    far = np.hypot(y - 11, x - 11)
    shape = ((far > 4) & (far < 9)) | (np.hypot(y - 24, x - 24) < 3)
    smooth = F.avg_pool2d(torch.from_numpy(shape)[None].float(), 3, 1, 1)[0].numpy()
    box = (10.0, 20.0, 150.0, 104.0)
    found = outlines(smooth, box)
    assert sorted(len(rings) for rings in found) == [1, 2]
    pixels = whole(painted(smooth, box, 130, 160), 130, 160)
    rows, cols = np.mgrid[:130, :160] + 0.5
    inside = np.zeros((130, 160), np.bool_)
    for outline, *holes in found:
        np.testing.assert_array_equal(outline[0], outline[-1])
        inside |= contains_xy(Polygon(outline, holes), cols, rows)
    assert (inside != pixels).sum() < 0.03 * pixels.sum()  # straight between the crossings of the grid's lines
    assert outlines(np.zeros((28, 28), np.float32), box) == []


def test_targets_as_torchvision_takes_them() -> None:
    masks = torch.zeros(2, HEIGHT, WIDTH, dtype=torch.uint8)
    masks[0, 2:9, 3:8] = 1
    given = {"boxes": torch.tensor([[3, 2, 8, 9], [0, 0, 5, 5]]), "labels": torch.tensor([1, 0]), "masks": masks}
    found = as_instances(given, 2)
    np.testing.assert_array_equal(whole(found.crops[0], HEIGHT, WIDTH), masks[0] > 0)
    found.check(open_image(np.zeros((HEIGHT, WIDTH, 3), np.uint8)))
    for wrong, message in (
        ({**given, "masks": masks[:1]}, "a mask for each of 2 boxes, got 1"),
        ({**given, "masks": masks.float()}, "masks \\(n, height, width\\) of whole numbers"),
        ({"boxes": [], "labels": []}, "with `boxes`, `labels` and `masks`, got dict"),
        ({**given, "labels": [0, 2]}, "class 2 is out of range"),
        (target().boxes, "got BoxTarget"),
    ):
        with pytest.raises(DataError, match=message):
            as_instances(wrong, 2)
    with pytest.raises(DataError, match="boxes of an image of 53 x 37 px"):
        found.check(open_image(np.zeros((HEIGHT, WIDTH + 1, 3), np.uint8)))
