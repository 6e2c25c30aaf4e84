"""openslide and rasterio: the formats behind the extras, and what is said without them."""

from __future__ import annotations

import os
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tifffile

from gigaxt.errors import ImageError
from gigaxt.image import open_image
from gigaxt.image.raster import RasterImage
from gigaxt.image.slide import SlideImage, _over_white

RNG = np.random.default_rng(0)


@pytest.fixture
def jp2(tmp_path: Path) -> tuple[Path, np.ndarray]:
    rasterio = pytest.importorskip("rasterio")
    path, data = tmp_path / "a.dat", RNG.integers(0, 4000, (3, 150, 200)).astype(np.uint16)
    profile = {"driver": "JP2OpenJPEG", "height": 150, "width": 200, "count": 3, "dtype": "uint16"}
    profile |= {"crs": "EPSG:32633", "transform": rasterio.Affine(10, 0, 5e5, 0, -10, 5e6)}
    with rasterio.open(path, "w", QUALITY=100, REVERSIBLE="YES", YCBCR420="NO", **profile) as target:
        target.write(data)
    return path, np.moveaxis(data, 0, -1)


def test_jpeg2000(jp2: tuple[Path, np.ndarray]) -> None:
    path, data = jp2
    image = open_image(path)
    assert isinstance(image, RasterImage)
    assert image.crs == "EPSG:32633"
    assert image.gsd_m == (10, 10)
    np.testing.assert_array_equal(image.read(-3, 100, 60, 80)[:50, 3:], data[100:, :57])
    np.testing.assert_array_equal(image.select([2, 0]).read(0, 0, 200, 150), data[..., [2, 0]])
    again = pickle.loads(pickle.dumps(image))
    np.testing.assert_array_equal(again.read(0, 0, 200, 150), data)


def test_jpeg2000_in_threads_and_children(jp2: tuple[Path, np.ndarray]) -> None:
    path, data = jp2
    image = open_image(path)

    def right(seed: int) -> bool:
        x, y = np.random.default_rng(seed).integers(0, 100, 2)
        return bool(np.array_equal(image.read(int(x), int(y), 50, 50), data[y : y + 50, x : x + 50]))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(right, range(12)))
    children = []
    for seed in range(2):
        child = os.fork()
        if not child:
            os._exit(0 if right(seed) else 1)
        children.append(child)
    assert right(5)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0]


def test_broken_jpeg2000(jp2: tuple[Path, np.ndarray]) -> None:
    path, _ = jp2
    content = path.read_bytes()
    for length in (20, 100, 500):
        path.write_bytes(content[:length])
        with pytest.raises(ImageError, match="GDAL cannot"):
            open_image(path).read(0, 0, 200, 150)


def test_nitf(tmp_path: Path) -> None:
    rasterio = pytest.importorskip("rasterio")
    path, data = tmp_path / "a.ntf", RNG.integers(0, 255, (2, 50, 60), dtype=np.uint8)
    profile = {"driver": "NITF", "height": 50, "width": 60, "count": 2, "dtype": "uint8", "ICORDS": "G"}
    profile |= {"crs": "EPSG:4326", "transform": rasterio.Affine(0.1, 0, 10, 0, -0.1, 50)}
    with rasterio.open(path, "w", **profile) as target:
        target.write(data)
    np.testing.assert_array_equal(open_image(path).read(0, 0, 60, 50), np.moveaxis(data, 0, -1))


def test_slide(tmp_path: Path) -> None:
    """A generic tiled TIFF, which openslide reads too, stands in for a vendor's slide."""
    pytest.importorskip("openslide")
    path, data = tmp_path / "a.tif", RNG.integers(0, 255, (300, 400, 3), dtype=np.uint8)
    with tifffile.TiffWriter(path) as tiff:
        options = {"tile": (64, 64), "photometric": "rgb", "metadata": None, "resolutionunit": "CENTIMETER"}
        tiff.write(data, resolution=(40_000, 40_000), **options)
        tiff.write(data[::2, ::2], subfiletype=1, **options)
    image = SlideImage(path)
    assert (image.height, image.width, image.channels) == (300, 400, 3)
    assert len(image.levels) == 2
    assert image.mpp is None or image.mpp == (0.25, 0.25)
    np.testing.assert_array_equal(image.read(50, 60, 100, 90), data[60:150, 50:150])
    np.testing.assert_array_equal(image.read(-5, 60, 50, 90, 1)[:, 5:], data[::2, ::2][60:150, :45])
    assert image.validity(390, 290, 20, 20).sum() == 100
    assert not image.all_valid
    np.testing.assert_array_equal(image.select([2]).read(0, 0, 9, 9), data[:9, :9, 2:])
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(image)).read(0, 0, 9, 9), data[:9, :9])


def test_slide_with_huge_tiles_does_not_end_the_process(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, np.zeros((64, 64), np.uint8), tile=(64, 64))
    data = path.read_bytes()
    with tifffile.TiffFile(path) as tiff:
        places = [tiff.pages[0].tags[code].offset for code in (322, 323)]
    for place in places:
        data = data[: place + 2] + b"\x04\x00\x01\x00\x00\x00" + (65_520).to_bytes(4, "little") + data[place + 12 :]
    path.write_bytes(data)
    with pytest.raises(ImageError, match="expected tiles of at most"):
        SlideImage(path)


def test_transparent_pixels_lie_on_white() -> None:
    rgba = np.array([[[10, 20, 30, 255], [10, 20, 30, 0], [0, 0, 0, 128]]], np.uint8)
    assert _over_white(rgba).tolist() == [[[10, 20, 30], [255, 255, 255], [127, 127, 127]]]


def test_missing_extras_say_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rasterio", None)
    monkeypatch.setitem(sys.modules, "openslide", None)
    (tmp_path / "a").write_bytes(b"\xff\x4f\xff\x51" + bytes(300))
    with pytest.raises(ImageError, match=r"need rasterio: pip install 'gigaxt\[geo\]'$"):
        open_image(tmp_path / "a")
    (tmp_path / "b").write_bytes(bytes(128) + b"DICM" + bytes(300))
    with pytest.raises(ImageError, match=r"need openslide: pip install 'gigaxt\[wsi\]'$"):
        open_image(tmp_path / "b")


def test_broken_slides(tmp_path: Path) -> None:
    pytest.importorskip("openslide")
    for content in (bytes(128) + b"DICM" + bytes(300), b"SQLite format 3\0" + bytes(300), b"ZISRAWFILE" + bytes(300)):
        (tmp_path / "a").write_bytes(content)
        with pytest.raises(ImageError, match="openslide cannot open it"):
            open_image(tmp_path / "a")
