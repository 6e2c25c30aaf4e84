"""Resampled and band-selecting views: right values, right validity, and no seams."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import tifffile

from gigaxt.errors import ImageError
from gigaxt.image import Image, Level, open_image
from gigaxt.image.memory import ArrayImage
from gigaxt.image.taps import Axis
from gigaxt.image.views import Resampled, resample, true_factors

RNG = np.random.default_rng(0)
SCALES = [0.5, 0.73, 1.0, 1.3, 2.0, 2.5, 3.0, 7.9]


def whole(image: Image) -> np.ndarray:
    return image.read(0, 0, image.width, image.height)


def check_seams(image: Image) -> None:
    """Any window equals that part of the whole, pixels and validity, to the last bit."""
    pixels, mask = image.read_valid(0, 0, image.width, image.height)
    np.testing.assert_array_equal(whole(image), pixels)
    rng = np.random.default_rng(1)
    for _ in range(25):
        x, y = int(rng.integers(0, image.width)), int(rng.integers(0, image.height))
        w, h = int(rng.integers(1, image.width - x + 1)), int(rng.integers(1, image.height - y + 1))
        part, valid = image.read_valid(x, y, w, h)
        np.testing.assert_array_equal(part, pixels[y : y + h, x : x + w])
        np.testing.assert_array_equal(valid, mask[y : y + h, x : x + w])
        np.testing.assert_array_equal(image.read(x, y, w, h), part)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", ["uint8", "float32"])
@pytest.mark.parametrize("nodata", [None, 7.0])
def test_no_seams(scale: float, dtype: str, nodata: float | None) -> None:
    data = RNG.integers(0, 12, (61, 83, 2)).astype(dtype)
    data[10:30, 20:60] = 7
    check_seams(resample(ArrayImage(data, nodata=nodata), scale, scale * 1.1))


def test_no_seams_with_nan() -> None:
    data = RNG.normal(size=(61, 83, 2)).astype(np.float32)
    data[RNG.random((61, 83)) < 0.3] = np.nan
    for nodata in (None, np.nan):
        check_seams(resample(ArrayImage(data, nodata=nodata), 2.5))
    view = resample(ArrayImage(data, nodata=np.nan), 2.5)
    assert np.isfinite(whole(view)[view.validity(0, 0, view.width, view.height)]).all()


def test_nan_does_not_reach_pixels_beside_it() -> None:
    data = np.array([[1, 1, np.nan, 1, 1, 1]], np.float32)
    assert np.isnan(whole(resample(ArrayImage(data), 2, 1))[0, :, 0]).tolist() == [False, True, False]
    assert np.isnan(whole(resample(ArrayImage(data), 0.5, 1))[0, :, 0]).sum() == 4  # its own two, and one on each side


def test_no_seams_between_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    image = ArrayImage(RNG.integers(0, 255, (120, 150, 3), dtype=np.uint8))
    expected = whole(resample(image, 3.7))
    monkeypatch.setattr("gigaxt.image.views._BLOCK", 500)
    np.testing.assert_array_equal(whole(resample(image, 3.7)), expected)
    nodata = ArrayImage(image._array, nodata=3)
    check_seams(resample(nodata, 3.7))


def test_shrinking_is_the_mean() -> None:
    data = RNG.normal(size=(60, 90, 3))
    view = resample(ArrayImage(data), 3)
    np.testing.assert_allclose(whole(view), data.reshape(20, 3, 30, 3, 3).mean((1, 3)))
    rounded = resample(ArrayImage(np.array([[0, 1], [1, 1]], np.uint8)), 2)
    assert whole(rounded).tolist() == [[[1]]]


def test_shrinking_by_a_fraction_weighs_by_area() -> None:
    view = resample(ArrayImage(np.arange(10.0)[None].repeat(2, 0)), 2.5, 2)
    np.testing.assert_allclose(
        whole(view)[0, :, 0], np.array([0 + 1 + 2 / 2, 2 / 2 + 3 + 4, 5 + 6 + 7 / 2, 7 / 2 + 8 + 9]) / 2.5
    )


def test_growing_is_bilinear() -> None:
    view = resample(ArrayImage(np.array([[0.0, 4.0]])), 0.25, 1)
    np.testing.assert_allclose(whole(view)[0, :, 0], [0, 0, 0.5, 1.5, 2.5, 3.5, 4, 4])


def test_nearest_keeps_classes() -> None:
    data = RNG.integers(0, 5, (40, 44), dtype=np.uint8)
    np.testing.assert_array_equal(whole(resample(ArrayImage(data), 4, nearest=True))[..., 0], data[2::4, 2::4])
    np.testing.assert_array_equal(
        whole(resample(ArrayImage(data), 0.5, nearest=True))[..., 0], data.repeat(2, 0).repeat(2, 1)
    )
    check_seams(resample(ArrayImage(data, nodata=2), 1.7, nearest=True))


def test_only_valid_pixels_count() -> None:
    data = np.array([[10, 0, 0, 0], [20, 0, 0, 0]], np.uint8)
    view = resample(ArrayImage(data, nodata=0), 2)
    pixels, mask = view.read_valid(0, 0, 2, 1)
    assert pixels[..., 0].tolist() == [[15, 0]]
    assert mask.tolist() == [[True, False]]
    grown = resample(ArrayImage(data, nodata=0), 0.5)  # valid where the nearest pixel is; its value, not half of it
    pixels, mask = grown.read_valid(0, 0, 8, 4)
    assert mask[:, :2].all()
    assert not mask[:, 2:].any()
    assert pixels[0, :4, 0].tolist() == [10, 10, 0, 0]


@pytest.mark.parametrize("size", [(1, 1), (1, 70), (3, 5), (100, 1)])
@pytest.mark.parametrize("scale", [0.3, 1.9, 8, 64])
def test_tiny_images(size: tuple[int, int], scale: float) -> None:
    view = resample(ArrayImage(np.full((*size, 1), 9, np.uint8)), scale)
    assert (view.height, view.width) == tuple(max(1, round(side / scale)) for side in size)
    assert (whole(view) == 9).all()
    assert view.validity(0, 0, view.width, view.height).all()


def test_taps_add_up_to_one_for_any_grid() -> None:
    for scale in [*SCALES, 1 / 3, 5.5]:
        for offset in (0.0, -0.7, 0.4, 30.0):
            taps = Axis(20, scale, offset).taps(-1, 30)
            np.testing.assert_allclose(taps.weight.sum(1), 1)
            assert taps.index.min() >= 0
            assert taps.index.max() < 20


@pytest.fixture
def pyramid(tmp_path: Path) -> Path:
    """Levels that tell which one was read: level n is all 10 * n."""
    path = tmp_path / "a.tif"
    with tifffile.TiffWriter(path) as tiff:
        for level, (h, w) in enumerate([(301, 405), (150, 202), (76, 102)]):  # sizes rounded down, then up
            options = {"tile": (64, 64), "photometric": "minisblack", "resolutionunit": "CENTIMETER"}
            tiff.write(
                np.full((h, w), 10 * level, np.uint8),
                subfiletype=int(level > 0),
                resolution=(40_000, 40_000),
                metadata=None,
                **options,
            )
    return path


@pytest.mark.parametrize(
    ("mpp", "value", "size"),
    [
        (0.125, 0, (810, 602)),
        (0.25, 0, (405, 301)),
        (0.4, 0, (253, 188)),
        (0.5, 10, (202, 150)),
        (0.4999, 10, (203, 151)),
        (0.9, 10, (112, 84)),
        (1.0, 20, (101, 75)),
        (3.0, 20, (34, 25)),
    ],
)
def test_reads_from_the_next_finer_level(pyramid: Path, mpp: float, value: int, size: tuple[int, int]) -> None:
    image = open_image(pyramid, mpp=mpp)
    assert (image.width, image.height) == size
    assert image.mpp == pytest.approx((mpp, mpp))
    assert (whole(image) == value).all()


def test_coarser_levels_of_a_view_are_the_files(pyramid: Path) -> None:
    view = open_image(pyramid, mpp=0.4)
    assert [level[:2] for level in view.levels] == [(253, 188), (102, 76)]
    assert view.levels[1].downsample_x == pytest.approx(253 / 102)
    assert (view.read(0, 0, 102, 76, 1) == 20).all()


def test_true_factors() -> None:
    image = ArrayImage(np.zeros((301, 405, 1), np.uint8))
    sizes = [(405, 301), (202, 150), (102, 76), (90, 70), (7, 5)]
    image.levels = tuple(Level(w, h, 405 / w, 301 / h) for w, h in sizes)
    assert [true_factors(image, level) for level in range(5)] == [(1, 1), (2, 2), (4, 4), (4.5, 4.3), (60, 60)]


def test_place_follows_the_pixels() -> None:
    image = ArrayImage(np.zeros((10, 10, 1), np.uint8))
    image.transform, image.crs, image.mpp = (10.0, 0.0, 500.0, 0.0, -10.0, 900.0), "EPSG:32633", (0.5, 0.5)
    view = resample(image, 2, 4)
    assert view.transform == (20, 0, 500, 0, -40, 900)
    assert view.mpp == (1, 2)
    assert view.gsd_m == (20, 40)
    assert open_image(image, gsd_m=25).width == 4
    assert open_image(image, gsd_m=10.001) is image
    shifted = Resampled(image, 4, 4, (2.0, 2.0), (1.0, 3.0))
    assert shifted.transform == (20, 0, 510, 0, -20, 870)


def test_no_pixel_size_to_resample_by() -> None:
    with pytest.raises(ImageError, match=r"cannot be resampled to mpp=0\.5: it does not say its own mpp"):
        open_image(np.zeros((4, 4), np.uint8), mpp=0.5)
    with pytest.raises(ImageError, match="expected mpp= or gsd_m=, got both"):
        open_image(np.zeros((4, 4), np.uint8), mpp=0.5, gsd_m=1)
    with pytest.raises(ImageError, match="expected a positive scale"):
        resample(ArrayImage(np.zeros((4, 4), np.uint8)), 0)


def test_select() -> None:
    data = RNG.integers(0, 9, (20, 30, 4), dtype=np.uint8)
    data[:5, :, :2] = 0
    image = ArrayImage(data, nodata=0)
    image.band_names = ("blue", "green", "red", "nir")
    view = image.select(["nir", 0])
    assert view.band_names == ("nir", "blue")
    np.testing.assert_array_equal(view.read(-2, 3, 10, 5)[:, 2:], data[3:8, :8][..., [3, 0]])
    np.testing.assert_array_equal(view.select(["blue"]).read(0, 0, 30, 20), data[..., :1])
    first = image.select([0, 1])  # validity by the bands that are there
    np.testing.assert_array_equal(first.validity(0, 0, 30, 20), (data[..., :2] != 0).any(2))
    coarse = resample(image, 2).select(["red"])
    np.testing.assert_array_equal(whole(coarse), whole(resample(image.select(["red"]), 2)))
    with pytest.raises(ImageError, match="no band 'gren'; did you mean `green`"):
        image.select(["gren"])
    with pytest.raises(ImageError, match="expected a band from 0 to 3, got 4"):
        image.select([4])
    with pytest.raises(ImageError, match="at least one band"):
        image.select([])


def test_views_pickle(pyramid: Path) -> None:
    view = open_image(pyramid, mpp=0.4).select([0])
    again = pickle.loads(pickle.dumps(view))
    assert len(pickle.dumps(view)) < 2000
    np.testing.assert_array_equal(whole(again), whole(view))
    assert again.mpp == view.mpp
