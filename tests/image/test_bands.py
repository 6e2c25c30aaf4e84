"""Several files as bands of one image."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import tifffile

from gigaxt.errors import ImageError
from gigaxt.image import open_bands, open_image

RNG = np.random.default_rng(0)


def write(path: Path, data: np.ndarray, gsd: float, x: float = 6e5, y: float = 42e5, **options: object) -> Path:
    tags = [(33550, "d", 3, (gsd, gsd, 0.0), True), (33922, "d", 6, (0.0, 0.0, 0.0, x, y, 0.0), True)]
    tags.append((34735, "H", 12, (1, 1, 0, 2, 1024, 0, 1, 1, 3072, 0, 1, 32630), True))
    if "nodata" in options:
        tags.append((42113, "s", 0, str(options["nodata"]), True))
    tifffile.imwrite(path, data, extratags=tags, metadata=None, photometric="minisblack")
    return path


def test_bands_of_one_size(tmp_path: Path) -> None:
    data = RNG.integers(0, 3000, (3, 50, 60)).astype(np.uint16)
    paths = [write(tmp_path / f"B0{band}.tif", data[band], 10) for band in range(3)]
    image = open_bands(paths)
    assert image.band_names == ("B00", "B01", "B02")
    assert image.gsd_m == (10, 10)
    assert image.all_valid
    np.testing.assert_array_equal(image.read(-3, 5, 40, 50)[:45, 3:], np.moveaxis(data, 0, -1)[5:, :37])
    np.testing.assert_array_equal(image.select(["B02", "B00"]).read(0, 0, 60, 50), np.moveaxis(data[[2, 0]], 0, -1))
    again = pickle.loads(pickle.dumps(image))
    np.testing.assert_array_equal(again.read(0, 0, 60, 50), image.read(0, 0, 60, 50))


def test_bands_of_several_sizes_as_in_sentinel_2(tmp_path: Path) -> None:
    """10 m, 20 m and 60 m bands on the 20 m grid: the mean of the finer, an interpolation of the coarser."""
    fine = RNG.integers(0, 3000, (120, 120)).astype(np.uint16)
    middle, coarse = fine[::2, ::2].copy(), np.full((20, 20), 5, np.uint16)
    coarse[:, 10:] = 105
    paths = [write(tmp_path / "B02.tif", fine, 10), write(tmp_path / "B11.tif", middle, 20)]
    paths.append(write(tmp_path / "B09.tif", coarse, 60))
    image = open_bands(paths, grid="B11", names=["blue", "swir", "vapour"])
    assert (image.width, image.height) == (60, 60)
    pixels = image.read(0, 0, 60, 60)
    np.testing.assert_array_equal(pixels[..., 0], np.rint(fine.reshape(60, 2, 60, 2).mean((1, 3), dtype=np.float32)))
    np.testing.assert_array_equal(pixels[..., 1], middle)
    assert pixels[7, 27:33, 2].tolist() == [5, 5, 38, 72, 105, 105]
    np.testing.assert_array_equal(image.read(11, 13, 20, 9), pixels[13:22, 11:31])
    nearest = open_bands(paths, grid=1, resampling="nearest").read(0, 0, 60, 60)
    np.testing.assert_array_equal(nearest[..., 2], coarse.repeat(3, 0).repeat(3, 1))


def test_a_pixel_is_valid_where_every_band_is(tmp_path: Path) -> None:
    one, two = np.ones((2, 40, 40), np.float32)
    one[:10], two[:, :10] = -1, -9
    paths = [write(tmp_path / "one.tif", one, 10, nodata=-1), write(tmp_path / "two.tif", two, 10, nodata=-9)]
    image = open_bands(paths)
    expected = np.ones((40, 40), bool)
    expected[:10], expected[:, :10] = False, False
    assert not image.all_valid
    assert image.nodata is None
    np.testing.assert_array_equal(image.validity(0, 0, 40, 40), expected)
    np.testing.assert_array_equal(image.select(["two"]).validity(0, 0, 40, 40), two != -9)


def test_arrays_by_ratio_of_sizes() -> None:
    image = open_bands([np.zeros((40, 60, 2), np.uint8), np.full((21, 30), 4, np.uint16)])
    assert image.band_names == ("array 0_1", "array 0_2", "array 1")
    assert image.dtype == np.uint16
    assert image.read(0, 0, 60, 40)[3, 3].tolist() == [0, 0, 4]


def test_levels_are_those_of_the_grid(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    data = RNG.integers(0, 255, (128, 128), dtype=np.uint8)
    with tifffile.TiffWriter(path) as tiff:
        tiff.write(data, tile=(32, 32), metadata=None)
        tiff.write(data[::2, ::2], tile=(32, 32), subfiletype=1, metadata=None)
    other = RNG.integers(0, 255, (64, 64), dtype=np.uint8)
    image = open_bands([path, other])
    assert len(image.levels) == 2
    np.testing.assert_array_equal(image.read(0, 0, 64, 64, 1), np.stack([data[::2, ::2], other], -1))
    np.testing.assert_array_equal(image.select([1]).read(5, 5, 20, 20, 1)[..., 0], other[5:25, 5:25])


def test_real_xview3_bands(fixtures: Path) -> None:
    """512 px of 10 m and 11 px of 500 m, which reach 380 m further: less than one of their px."""
    folder = next((fixtures / "xview3_mini_scene" / "validation").iterdir())
    image = open_bands([folder / f"{name}.tif" for name in ("VH_dB", "VV_dB", "bathymetry")])
    assert image.band_names == ("VH_dB", "VV_dB", "bathymetry")
    pixels, mask = image.read_valid(0, 0, 512, 512)
    vh = open_image(folder / "VH_dB.tif")
    np.testing.assert_array_equal(pixels[..., 0], vh.read(0, 0, 512, 512)[..., 0].astype(np.float32))
    bathymetry = open_image(folder / "bathymetry.tif").read(0, 0, 11, 11)[..., 0]
    assert pixels[25, 75, 2] == pytest.approx(0.5 * (bathymetry[0, 1] + bathymetry[0, 1]), abs=2)
    assert not (mask & ~vh.validity(0, 0, 512, 512)).any()


@pytest.mark.parametrize(
    ("gsd", "x", "cause"),
    [(10, 6e5 + 300, "of which the grid covers -30.0 to 20.0"), (20, 6e5, "of which the grid covers 0.0 to 25.0")],
)
def test_other_extents_are_refused(tmp_path: Path, gsd: float, x: float, cause: str) -> None:
    data = np.zeros((50, 50), np.uint8)
    paths = [write(tmp_path / "a.tif", data, 10), write(tmp_path / "b.tif", data, gsd, x)]
    with pytest.raises(ImageError, match=f"b.tif: expected the extent of .*a.tif, got .*{cause}"):
        open_bands(paths)


def test_wrong_arguments() -> None:
    one = np.zeros((8, 8), np.uint8)
    with pytest.raises(ImageError, match="expected the extent of"):
        open_bands([np.zeros((40, 60), np.uint8), np.zeros((40, 30), np.uint8)])
    with pytest.raises(ImageError, match="expected 2 different band names, got a, a"):
        open_bands([one, one], names=["a", "a"])
    with pytest.raises(ImageError, match="expected grid to be one of array 0, array 1, got 'x'"):
        open_bands([one, one], grid="x")
    with pytest.raises(ImageError, match="expected grid from 0 to 0, got 1"):
        open_bands([one], grid=1)
    with pytest.raises(ImageError, match="at least one source"):
        open_bands([])
    with pytest.raises(ImageError, match="expected resampling 'bilinear' or 'nearest', got 'cubic'"):
        open_bands([one], resampling="cubic")
