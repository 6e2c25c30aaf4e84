"""Arrays and tensors as images."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

from gigaxt.errors import ImageError
from gigaxt.image import open_image
from gigaxt.image.base import Mask
from gigaxt.image.memory import ArrayImage
from gigaxt.scenes.region_pixels import read_regions


def test_arrays() -> None:
    data = np.arange(24, dtype=np.uint16).reshape(4, 6)
    image = open_image(data)
    assert (image.height, image.width, image.channels, image.dtype) == (4, 6, 1, np.uint16)
    np.testing.assert_array_equal(image.read(0, 0, 6, 4)[..., 0], data)
    image.read(0, 0, 6, 4)[...] = 0
    assert data[3, 5] == 23
    assert open_image(image) is image
    swapped = open_image(data.astype(">u2"))
    assert swapped.read(1, 1, 1, 1).dtype.isnative
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(image)).read(0, 0, 6, 4), image.read(0, 0, 6, 4))
    assert open_image(np.ones((2, 2), bool)).dtype == np.uint8


def test_nodata() -> None:
    data = np.array([[np.nan, 1], [2, np.nan]], np.float32)
    assert open_image(data, nodata=np.nan).validity(0, 0, 2, 2).tolist() == [[False, True], [True, False]]
    assert open_image(data).all_valid
    with pytest.raises(ImageError, match="nodata= is for arrays"):
        open_image("a.tif", nodata=0)


def test_tensors() -> None:
    tensor = torch.arange(24.0).reshape(2, 3, 4).requires_grad_()
    image = open_image(tensor)
    assert (image.height, image.width, image.channels) == (3, 4, 2)
    np.testing.assert_array_equal(image.read(0, 0, 4, 3), tensor.detach().numpy().transpose(1, 2, 0))
    assert open_image(torch.zeros(3, 4, dtype=torch.uint8)).channels == 1
    with pytest.raises(ImageError, match=r"tensor.float\(\)"):
        open_image(torch.zeros(3, 4, dtype=torch.bfloat16))
    with pytest.raises(ImageError, match="expected a tensor of shape"):
        open_image(torch.zeros(1, 3, 4, 4))


def test_refused_arrays() -> None:
    for array in (np.zeros(3), np.zeros((0, 3)), np.zeros((2, 2, 2, 2))):
        with pytest.raises(ImageError, match="expected shape"):
            open_image(array)
    with pytest.raises(ImageError, match="expected integers or floats, got complex64"):
        open_image(np.zeros((2, 2), np.complex64))


@pytest.mark.parametrize("bands", [1, 2, 3, 16, 17, 40])
@pytest.mark.parametrize("nodata", [0.0, 3.0, np.nan])
def test_nodata_of_every_number_of_bands(bands: int, nodata: float) -> None:
    rng = np.random.default_rng(bands)
    data = rng.integers(0, 9, (7, 5, bands)).astype(np.float32)
    data[rng.random((7, 5)) < 0.5] = nodata
    data[0, 0], data[0, 1] = nodata, 5
    data[0, 2] = nodata
    data[0, 2, -1] = 5  # one band, the last, is enough
    expected = [[any(not (v == nodata or v != v) for v in pixel) for pixel in row] for row in data]
    assert expected[0][:3] == [False, True, True]
    assert open_image(data, nodata=nodata).validity(0, 0, 5, 7).tolist() == expected


def test_windows() -> None:
    image = open_image(np.ones((4, 6), np.uint8))
    with pytest.raises(ImageError, match="expected a window of at least 1 x 1 px, got 0 x 3"):
        image.read(0, 0, 0, 3)
    with pytest.raises(ImageError, match="expected a level from 0 to 0, got -1"):
        image.read(0, 0, 1, 1, level=-1)
    pixels, mask = image.read_valid(-1, -1, 9, 9)
    assert pixels.sum() == mask.sum() == 24


def test_an_image_with_a_mask_of_its_own_is_not_taken_for_valid() -> None:
    """Whoever writes a reader with a mask need not know of `all_valid`."""

    class Masked(ArrayImage):
        def _valid_inside(self, x: int, y: int, w: int, h: int, level: int) -> Mask:
            return np.zeros((h, w), np.bool_)

    image = Masked(np.ones((64, 64, 3), np.uint8))
    assert not image.all_valid
    (valid,) = read_regions(image, [(0, 0, 32, 32)], [np.empty((32, 32, 3), np.uint8)])
    assert valid is not None
    assert not valid.any()
