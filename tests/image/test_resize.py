"""Whole images at another size: equal to Pillow, without seams, whatever is below."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as Pillow

from array_image import ArrayImage as Pyramid
from gigaxt.errors import ImageError
from gigaxt.image import Image, open_image, resize
from gigaxt.image.views import Cropped

SIZES = [((60, 80), (51, 51)), ((37, 90), (64, 20)), ((10, 5), (13, 20)), ((5, 7), (1, 1)), ((1, 1), (4, 3))]
"""(height, width) before, (width, height) after."""


def whole(image: Image) -> np.ndarray:
    return image.read(0, 0, image.width, image.height)


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)


@pytest.mark.parametrize(("before", "after"), SIZES)
@pytest.mark.parametrize("bands", [1, 2, 3, 5])
def test_equals_pillow(before: tuple[int, int], after: tuple[int, int], bands: int) -> None:
    pixels = noise(*before, bands)
    view = resize.resize(open_image(pixels), *after)
    bilinear = [np.asarray(Pillow.fromarray(pixels[..., k]).resize(after, resize.BILINEAR)) for k in range(bands)]
    assert (view.width, view.height, view.channels) == (*after, bands)
    np.testing.assert_array_equal(whole(view), np.stack(bilinear, axis=2))
    np.testing.assert_array_equal(whole(view.select([0])), bilinear[0][..., None])
    assert view.validity(0, 0, *after).all()


@pytest.mark.parametrize(("before", "after"), SIZES)
def test_window_by_window(before: tuple[int, int], after: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """What Pillow is not asked for is the same, to one grey level of rounding; floats are as Pillow's."""
    pixels = noise(*before, 3)
    at_once = whole(resize.resize(open_image(pixels), *after))
    monkeypatch.setattr(resize, "AT_ONCE", 0)
    view = resize.resize(open_image(pixels), *after)
    assert np.abs(whole(view).astype(int) - at_once).max() <= 1
    for x in range(0, view.width, 3):
        for y in range(0, view.height, 5):
            w, h = min(4, view.width - x), min(7, view.height - y)
            np.testing.assert_array_equal(view.read(x, y, w, h), whole(view)[y : y + h, x : x + w])
    floats = pixels.astype(np.float32)
    ours = whole(resize.resize(open_image(floats), *after))
    theirs = np.asarray(Pillow.fromarray(floats[..., 1]).resize(after, resize.BILINEAR))
    np.testing.assert_allclose(ours[..., 1], theirs, rtol=0, atol=1e-4)


def test_nodata_counts_for_nothing() -> None:
    pixels = np.full((40, 60, 1), 100, np.uint8)
    pixels[:, 30:] = 7
    view = resize.resize(open_image(pixels, nodata=7), 15, 10)
    values, valid = view.read_valid(0, 0, 15, 10)
    assert set(values[valid].ravel().tolist()) == {100}
    assert not valid[:, 9:].any()
    assert valid[:, :7].all()


def test_reads_the_next_finer_level() -> None:
    pyramid = Pyramid(noise(64, 64, 1), noise(32, 32, 1), noise(16, 16, 1))
    view = resize.resize(pyramid, 12, 12)
    theirs = Pillow.fromarray(pyramid.arrays[2][..., 0]).resize((12, 12), resize.BILINEAR)
    assert np.abs(whole(view)[..., 0].astype(int) - np.asarray(theirs)).max() <= 1
    assert {window[4] for window in pyramid.windows} == {2}


def test_place_and_size() -> None:
    image = open_image(noise(30, 40))
    assert resize.resize(image, 40, 30) is image
    image.transform, image.crs, image.mpp = (2.0, 0.0, 100.0, 0.0, -2.0, 50.0), "EPSG:32633", (0.5, 0.5)
    view = resize.resize(image, 20, 10)
    assert view.transform == (4.0, 0.0, 100.0, 0.0, -6.0, 50.0)
    assert view.mpp == (1.0, 1.5)
    classes = resize.resize(open_image(np.kron([[1, 9], [3, 7]], np.ones((8, 8), int))), 6, 6, nearest=True)
    assert set(np.unique(whole(classes))) == {1, 3, 7, 9}
    with pytest.raises(ImageError, match="expected at least 1 x 1 px to resize to, got 0 x 5"):
        resize.resize(image, 0, 5)


def test_survives_pickling(tmp_path: Path) -> None:
    Pillow.fromarray(noise(30, 40, 3)).save(tmp_path / "a.png")
    view = resize.resize(open_image(tmp_path / "a.png"), 20, 20)
    first = whole(view)
    data = pickle.dumps(view)
    assert len(data) < 1000  # a path and sizes, no pixels
    np.testing.assert_array_equal(whole(pickle.loads(data)), first)


def test_a_window_as_an_image() -> None:
    pixels = noise(30, 40, 2)
    pixels[10:14, 12:18] = 0
    image = open_image(pixels, nodata=0)
    image.transform = (2.0, 0.0, 100.0, 0.0, -2.0, 50.0)
    part = Cropped(image, 10, 5, 20, 12)
    np.testing.assert_array_equal(whole(part), pixels[5:17, 10:30])
    np.testing.assert_array_equal(part.validity(0, 0, 20, 12), (pixels[5:17, 10:30] != 0).any(axis=2))
    np.testing.assert_array_equal(part.select([1]).read(3, 2, 9, 4)[..., 0], pixels[7:11, 13:22, 1])
    assert part.transform == (2.0, 0.0, 120.0, 0.0, -2.0, 40.0)
    assert not part.read(-5, 0, 5, 3).any()  # outside is nodata, though the image goes on
    assert part.name != image.name
    for window in ((0, 0, 41, 5), (-1, 0, 5, 5), (0, 0, 0, 5), (35, 0, 6, 5)):
        with pytest.raises(ImageError, match="expected a window inside 40 x 30 px"):
            Cropped(image, *window)


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "P", "1", "CMYK"])
def test_pictures_as_rgb(tmp_path: Path, mode: str) -> None:
    picture = Pillow.fromarray(noise(9, 11, 3)).convert(mode)
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    picture.save(path, **({"transparency": b"\0\x80"} if mode == "P" else {}))
    image = open_image(path, rgb=True)
    assert (image.channels, image.dtype) == (3, np.uint8)
    with Pillow.open(path) as again:
        again.info.pop("transparency", None)
        np.testing.assert_array_equal(whole(image), np.asarray(again.convert("RGB")))
    np.testing.assert_array_equal(whole(pickle.loads(pickle.dumps(image))), whole(image))
    assert open_image(path).channels == len(picture.getbands())


def test_16_bits_stay_as_they_are(tmp_path: Path) -> None:
    Pillow.fromarray(noise(9, 11).astype(np.uint16) * 200).save(tmp_path / "a.png")
    image = open_image(tmp_path / "a.png", rgb=True)
    assert (image.channels, image.dtype) == (1, np.uint16)
