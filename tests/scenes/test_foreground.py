from __future__ import annotations

import json
import pickle
import weakref
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as PillowImage

from array_image import ArrayImage
from gigaxt.augment import colour_augmented, dihedral, turn
from gigaxt.errors import ConfigError, DataError
from gigaxt.image.views import resample
from gigaxt.regions import lattice_edges
from gigaxt.scenes import foreground as module
from gigaxt.scenes.foreground import Foreground, area_between, otsu, tissue_mask, tissue_threshold


def slide(height: int, width: int, *, noise: int = 3) -> ArrayImage:
    """Bright glass with noise, a violet disc of tissue in the upper left quarter, textured."""
    rng = np.random.default_rng(0)
    pixels = np.full((height, width, 3), 240) + rng.integers(-noise, noise + 1, (height, width, 3))
    tissue = disc(height, width)
    pixels[tissue] = np.array([170, 90, 160]) + rng.integers(-40, 41, (int(tissue.sum()), 3))
    return ArrayImage(pixels.clip(0, 255).astype(np.uint8))


def disc(height: int, width: int) -> np.ndarray:
    row, col = np.mgrid[:height, :width]
    found: np.ndarray = np.hypot(row - height / 4, col - width / 4) < min(height, width) / 6
    return found


def any_in(mask: np.ndarray, core: int) -> np.ndarray:
    return fraction_in(mask, core) > 0


def fraction_in(mask: np.ndarray, core: int) -> np.ndarray:
    rows, cols = (lattice_edges(size, core) for size in mask.shape)
    area = np.add.reduceat(np.add.reduceat(mask, rows[:-1], axis=0, dtype=int), cols[:-1], axis=1)
    return area / np.outer(np.diff(rows), np.diff(cols))


def test_tissue_is_found_and_glass_left_out() -> None:
    image = slide(600, 800)
    expected = disc(600, 800)
    found = tissue_mask(image)
    assert found.shape == (600, 800)
    assert (found != expected).mean() < 0.005
    keep = Foreground.from_spec("tissue").keep(image, 64)
    fraction = fraction_in(expected, 64)
    assert keep[fraction > 0.02].all()
    assert not keep[any_in(np.pad(expected, 2)[4:, 4:], 64) < any_in(expected, 64)].any()
    assert not keep[:, 7:].any()
    assert not keep[7:].any()


def test_tissue_is_looked_for_at_a_low_level(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "THUMBNAIL_PX", 100)
    fine = slide(600, 800)
    image = ArrayImage(fine.arrays[0], fine.arrays[0][::2, ::2], fine.arrays[0][::9, ::9])
    assert tissue_mask(image).shape == (67, 89)
    assert {window[4] for window in image.windows} == {2}
    # A file without levels is averaged band by band.
    monkeypatch.setattr(module, "READ_BYTES", 100_000)
    found = tissue_mask(fine)
    assert found.shape == (75, 100)
    assert len(fine.windows) > 10
    assert (fine.times_read() == 1).all()
    assert (found != disc(600, 800)[4::8, 4::8]).mean() < 0.02


@pytest.mark.parametrize("noise", [0, 4])
def test_an_image_of_glass_only_is_refused_with_the_way_out(noise: int) -> None:
    rng = np.random.default_rng(0)
    glass = ArrayImage((240 + rng.integers(-noise, noise + 1, (100, 100, 3))).astype(np.uint8))
    assert not tissue_mask(glass).any()
    with pytest.raises(DataError, match=r"array: no region has enough foreground by tissue; .*`min_fraction`"):
        Foreground.from_spec("tissue").keep(glass, 64)


def test_no_image_is_held_for_the_sake_of_its_tissue() -> None:
    image = slide(512, 512)
    Foreground.from_spec("tissue").keep(image, 64)
    gone = weakref.ref(image)
    del image
    assert gone() is None


def test_an_image_full_of_tissue_is_kept_whole() -> None:
    rng = np.random.default_rng(0)
    uniform = np.full((90, 90, 3), (180, 100, 170), dtype=np.uint8)
    assert tissue_mask(ArrayImage(uniform)).all()
    varied = np.full((90, 90, 3), 200) - np.stack(
        [np.zeros((90, 90)), np.linspace(60, 150, 90)[None] + rng.integers(0, 9, (90, 90)), np.zeros((90, 90))], axis=-1
    )
    assert tissue_mask(ArrayImage(varied.astype(np.uint8))).all()


def test_black_and_nodata_are_no_tissue() -> None:
    image = slide(200, 300)
    image.arrays[0][:, 200:250] = (3, 0, 1)
    image.arrays[0][:, 250:] = 0
    image.nodata = 0
    found = tissue_mask(image)
    assert found[:, :200].any()
    assert not found[:, 202:].any()
    with pytest.raises(DataError, match="expects three bands"):
        tissue_mask(ArrayImage(np.zeros((9, 9, 1), dtype=np.uint8)))
    assert not tissue_mask(ArrayImage(np.zeros((9, 9, 3), dtype=np.uint8))).any()
    assert not tissue_mask(ArrayImage(np.zeros((9, 9, 3), dtype=np.uint8), nodata=0)).any()


def test_otsu_maximises_the_variance_between_classes() -> None:
    rng = np.random.default_rng(0)
    values = np.clip(np.concatenate([rng.normal(0.1, 0.04, 3000), rng.normal(0.5, 0.1, 1000)]), 0, 1)

    def between(threshold: float) -> float:
        low, high = values[values < threshold], values[values >= threshold]
        return float(len(low) * len(high) * (low.mean() - high.mean()) ** 2)

    best = max(between(t / 256) for t in range(20, 200))
    assert between(otsu(values)) == pytest.approx(best, rel=1e-3)
    assert otsu(np.array([0.1, 0.1, 0.9])) == pytest.approx(0.5, abs=0.01)
    assert 0 < otsu(np.full(10, 0.3)) <= 1
    assert tissue_threshold(np.full(10, 0.3)) == 0
    assert tissue_threshold(np.full(10, 0.03)) == 1


@pytest.mark.parametrize("k", range(8))
@pytest.mark.parametrize("halo", [0, 32])
def test_turned_images_keep_the_turned_foreground(k: int, halo: int) -> None:
    image = slide(300, 210)
    mask = np.zeros((300, 210), dtype=np.uint8)
    mask[17:140, 33:101] = 255
    mask[299, 209] = 1
    view = colour_augmented(dihedral(image, k), [1, 1, 1], [0, 0, 0])
    core = 96 - 2 * halo
    by_raster = Foreground.from_spec(ArrayImage(mask))
    np.testing.assert_array_equal(by_raster.keep(view, 96, halo), any_in(turn(mask, k), core))
    square = Foreground.from_spec([[(33, 17), (101, 17), (101, 140), (33, 140)], [(209, 299), (210, 299), (210, 300)]])
    np.testing.assert_array_equal(square.keep(view, 96, halo), any_in(turn(mask, k), core))
    np.testing.assert_array_equal(square.mask(view, 300), turn(mask, k) > 0)
    tissue = Foreground.from_spec("tissue")
    np.testing.assert_array_equal(tissue.keep(view, 96, halo), any_in(turn(tissue_mask(image), k), core))


def test_min_fraction() -> None:
    image = ArrayImage(np.zeros((128, 100), dtype=np.uint8))
    mask = np.zeros((128, 100), dtype=np.uint8)
    mask[:64, :32] = 1  # half of the first region, all of the small ones at the right border
    mask[:, 64:] = 1
    for least, expected in [
        (0.0, [[1, 1], [0, 1]]),
        (0.5, [[1, 1], [0, 1]]),
        (0.51, [[0, 1], [0, 1]]),
        (1, [[0, 1], [0, 1]]),
    ]:
        keep = Foreground.from_spec(ArrayImage(mask), min_fraction=least).keep(image, 64)
        assert keep.astype(int).tolist() == expected
    for wrong in (-0.1, 1.5):
        with pytest.raises(ConfigError, match="min_fraction: expected 0 to 1"):
            Foreground.from_spec("tissue", min_fraction=wrong)


def test_area_between_is_exact_for_lines_that_cut_pixels() -> None:
    mask = np.random.default_rng(0).random((7, 9)) < 0.5
    fine = np.kron(mask, np.ones((4, 4), dtype=int))
    rows, cols = np.array([-2, 0, 1.25, 1.5, 4, 7.0]), np.array([0.75, 3, 8.5, 12])

    def summed(r0: float, r1: float, c0: float, c1: float) -> float:
        r0, r1, c0, c1 = (max(0, round(4 * line)) for line in (r0, r1, c0, c1))
        return float(fine[r0:r1, c0:c1].sum() / 16)

    expected = [[summed(r0, r1, c0, c1) for c0, c1 in pairwise(cols)] for r0, r1 in pairwise(rows)]
    np.testing.assert_allclose(area_between(mask, rows, cols), expected, atol=1e-12)


@pytest.mark.parametrize("read_bytes", [1, 3000, 10**9])
def test_a_raster_of_another_size_is_stretched(read_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "READ_BYTES", read_bytes)
    small = np.random.default_rng(0).random((30, 50)) < 0.1
    image = ArrayImage(np.zeros((300, 500), dtype=np.uint8))
    raster = ArrayImage(small.astype(np.float32))
    keep = Foreground.from_spec(raster).keep(image, 32)
    np.testing.assert_array_equal(keep, any_in(np.kron(small, np.ones((10, 10))) > 0, 32))
    assert (raster.times_read() == 1).all()
    large = np.random.default_rng(1).random((600, 1000)) < 0.002
    keep = Foreground.from_spec(ArrayImage(large.astype(np.uint8))).keep(image, 32)
    np.testing.assert_array_equal(keep, any_in(large, 64))
    with pytest.raises(DataError, match=r"proportions of array \(500 x 300 px\), got 30 x 50 px"):
        Foreground.from_spec(ArrayImage(small.T.astype(np.uint8))).keep(image, 32)


def test_nan_nodata_and_alpha_are_not_foreground() -> None:
    image = ArrayImage(np.zeros((64, 96), dtype=np.uint8))
    values = np.array([[np.nan, -1, 0], [0, 0, 7]], dtype=np.float32)
    assert Foreground.from_spec(ArrayImage(values)).keep(image, 32).tolist() == [[0, 1, 0], [0, 0, 1]]
    assert Foreground.from_spec(ArrayImage(values, nodata=7)).keep(image, 32).tolist() == [[0, 1, 0], [0, 0, 0]]
    with_alpha = np.stack([np.nan_to_num(values), np.ones((2, 3))], axis=-1)
    assert Foreground.from_spec(ArrayImage(with_alpha)).keep(image, 32).tolist() == [[0, 1, 0], [0, 0, 1]]


def test_a_raster_with_a_crs_lies_where_its_transform_says() -> None:
    image = ArrayImage(np.zeros((192, 256), dtype=np.uint8))
    image.crs, image.transform = "EPSG:32633", (10, 0, 500_000, 0, -10, 5_000_000)
    # 20 m pixels, south up, one region east of the image's corner; beyond the image on the right.
    land = np.zeros((100, 200), dtype=np.uint8)
    land[:48, :16] = 1
    raster = ArrayImage(land)
    raster.crs, raster.transform = "EPSG:32633", (20, 0, 500_000 + 640, 0, 20, 5_000_000 - 1920)
    keep = Foreground.from_spec(raster).keep(image, 64)
    assert keep.astype(int).tolist() == [[0, 0, 0, 0], [0, 1, 0, 0], [0, 1, 0, 0]]
    raster.transform = (20, 0, 900_000, 0, 20, 5_000_000 - 1920)
    with pytest.raises(DataError, match="no region has enough foreground"):
        Foreground.from_spec(raster).keep(image, 64)
    raster.transform = (20, 3, 500_000, 3, 20, 5_000_000 - 1920)
    with pytest.raises(DataError, match="turned raster; use gdalwarp"):
        Foreground.from_spec(raster).keep(image, 64)
    raster.crs = "EPSG:32634"
    with pytest.raises(DataError, match="expected the CRS EPSG:32633 of array, got EPSG:32634"):
        Foreground.from_spec(raster).keep(image, 64)


def test_files_are_told_by_their_ending(tmp_path: Path) -> None:
    image = ArrayImage(np.zeros((100, 130), dtype=np.uint8))
    mask = np.zeros((50, 65), dtype=np.uint8)
    mask[3:9, 40:44] = 255
    PillowImage.fromarray(mask).save(tmp_path / "mask.png")
    corners = [[80.0, 6.0], [88.0, 6.0], [88.0, 18.0], [80.0, 18.0], [80.0, 6.0]]
    (tmp_path / "mask.geojson").write_text(json.dumps({"type": "Polygon", "coordinates": [corners]}))
    expected = any_in(np.kron(mask, np.ones((2, 2))) > 0, 32)
    for name in ("mask.png", "mask.geojson"):
        found = pickle.loads(pickle.dumps(Foreground.from_spec(tmp_path / name)))
        np.testing.assert_array_equal(found.keep(image, 32), expected)
        assert found.name.endswith(name)
    with pytest.raises(DataError, match='expected "tissue", a raster, a GeoJSON file or polygons, got no file tisue'):
        Foreground.from_spec("tisue")


def test_polygons_in_the_crs_of_the_image(tmp_path: Path) -> None:
    image = ArrayImage(np.zeros((100, 130), dtype=np.uint8))
    corners = [[500_400.0, 4_999_900.0], [500_500.0, 4_999_900.0], [500_500.0, 4_999_800.0]]
    path = tmp_path / "land.json"
    path.write_text(json.dumps({"type": "Polygon", "coordinates": [corners]}))
    with pytest.raises(DataError, match=r"expected polygons on array \(130 x 100 px\), got x 500400 to 500500"):
        Foreground.from_spec(str(path)).keep(image, 32)
    path.write_text(json.dumps({"type": "Polygon", "coordinates": [corners], "crs": "EPSG:32633"}))
    found = Foreground.from_spec(str(path))
    with pytest.raises(DataError, match="has no CRS to place it by"):
        found.keep(image, 32)
    image.crs, image.transform = "EPSG:32633", (10, 0, 500_000, 0, -10, 5_000_000)
    assert np.argwhere(found.keep(image, 32)).tolist() == [[0, 1]]
    # A list of arrays is in pixels, whatever the CRS.
    in_pixels = Foreground.from_spec([np.array([[40, 10], [50, 10], [50, 20]])])
    assert np.argwhere(in_pixels.keep(image, 32)).tolist() == [[0, 1]]
    for nothing in ([], [[(0, 0), (1, 1)]]):
        with pytest.raises(DataError, match="polygon"):
            Foreground.from_spec(nothing)


def test_pixel_polygons_are_those_of_the_file_where_the_image_is_resampled() -> None:
    image = ArrayImage(np.zeros((200, 256, 2), dtype=np.uint8))
    found = Foreground.from_spec([[(130, 70), (190, 70), (190, 120), (130, 120)]])
    assert np.argwhere(found.keep(image, 64)).tolist() == [[1, 2]]
    view = dihedral(resample(image, 2).select([1]), 1)
    assert np.argwhere(found.keep(view, 32)).tolist() == [[1, 1]]


def test_the_drawn_mask_shows_what_is_kept() -> None:
    image = ArrayImage(np.zeros((200, 1000), dtype=np.uint8))
    mask = Foreground.from_spec([[(500, 100), (1000, 100), (1000, 200), (500, 200)]]).mask(image, max_side_px=50)
    assert mask.shape == (10, 50)
    np.testing.assert_array_equal(mask, np.outer(np.arange(10) >= 5, np.arange(50) >= 25))
    assert Foreground.from_spec([[(0, 0), (1, 0), (1, 1)]]).mask(ArrayImage(np.zeros((1, 3000)))).shape == (1, 1024)
