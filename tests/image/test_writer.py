from __future__ import annotations

import os
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray

from array_image import ArrayImage
from gigaxt.errors import ConfigError, ImageError
from gigaxt.image.part_file import PartFile
from gigaxt.image.reduce import halve
from gigaxt.image.tiff_geo import is_geographic
from gigaxt.image.writer import TiffWriter

rasterio = pytest.importorskip("rasterio")
pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")


def scene(h: int, w: int, c: int = 1, dtype: str = "uint8", seed: int = 0) -> NDArray[np.generic]:
    """Smooth, so that predictors matter, with both ends of the range of integers."""
    rng = np.random.default_rng(seed)
    rows, cols = np.mgrid[:h, :w]
    values = (rows[..., None] * 3 + cols[..., None] * 2 + np.arange(c) * 17 + rng.integers(0, 9, (h, w, c))) % 251
    if np.dtype(dtype).kind == "f":
        return ((values - 100) / 7).astype(dtype)
    info = np.iinfo(dtype)
    values = values * ((info.max - info.min) // 251) + info.min
    values.flat[:2] = info.min, info.max
    return values.astype(dtype)


def windows(h: int, w: int, size: int, seed: int | None = None) -> list[tuple[int, int]]:
    places = [(x, y) for y in range(0, h, size) for x in range(0, w, size)]
    if seed is not None:
        np.random.default_rng(seed).shuffle(places)
    return places


def write(path: Path, pixels: NDArray[np.generic], size: int = 48, seed: int | None = None, **options: object) -> None:
    h, w, c = pixels.shape
    options = {"tile": 64, **options}
    with TiffWriter(path, h, w, c, pixels.dtype, **options) as writer:
        for x, y in windows(h, w, size, seed):
            writer.write(x, y, pixels[y : y + size, x : x + size])


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def read_levels(path: Path) -> list[NDArray[np.generic]]:
    with tifffile.TiffFile(path) as file:
        pages = [page.aspage() for page in file.pages]
        if min(pages[-1].shape[:2]) > 1:  # tifffile counts levels of one pixel's width as series
            assert [level.keyframe.index for level in file.series[0].levels] == list(range(len(pages)))
        return [page.asarray().reshape(page.imagelength, page.imagewidth, -1) for page in pages]


def overviews(pixels: NDArray[np.generic], tile: int) -> Iterator[NDArray[np.generic]]:
    """Plain reference: the mean of each 2 x 2 block, blocks at the border as they are."""
    while max(pixels.shape[:2]) > tile:
        h, w, c = pixels.shape
        half = np.empty((-(-h // 2), -(-w // 2), c))
        for row in range(half.shape[0]):
            for col in range(half.shape[1]):
                half[row, col] = pixels[2 * row : 2 * row + 2, 2 * col : 2 * col + 2].astype(float).mean((0, 1))
        pixels = (half if pixels.dtype.kind == "f" else np.floor(half + 0.5)).astype(pixels.dtype)
        yield pixels


@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float16", "float32"])
@pytest.mark.parametrize("compression", ["deflate", "zstd", None])
def test_every_reader_returns_what_was_written(
    tmp_path: Path, channels: int, dtype: str, compression: str | None
) -> None:
    pixels, path = scene(150, 211, channels, dtype), tmp_path / "a.tif"
    write(path, pixels, compression=compression)
    levels = read_levels(path)
    assert levels[0].dtype == pixels.dtype
    np.testing.assert_array_equal(levels[0], pixels)
    with rasterio.open(path) as file:
        np.testing.assert_array_equal(np.moveaxis(file.read(), 0, 2), pixels)
        assert file.overviews(1) == [2, 4]
        assert file.profile["tiled"]
    for level in (1, 2):
        with rasterio.open(path, overview_level=level - 1) as file:
            np.testing.assert_array_equal(np.moveaxis(file.read(), 0, 2), levels[level])
    assert [p.name for p in tmp_path.iterdir()] == ["a.tif"]


@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (300, 1), (64, 64), (65, 64), (63, 129), (200, 333)])
@pytest.mark.parametrize("dtype", ["uint8", "int16", "float32"])
def test_overviews_are_means(tmp_path: Path, shape: tuple[int, int], dtype: str) -> None:
    pixels, path = scene(*shape, 2, dtype), tmp_path / "a.tif"
    write(path, pixels, seed=3)
    levels = read_levels(path)
    expected = [pixels, *overviews(pixels, 64)]
    assert [level.shape for level in levels] == [level.shape for level in expected]
    for level, wanted in zip(levels, expected, strict=True):
        np.testing.assert_allclose(level, wanted, rtol=1e-6, atol=1e-5 if dtype == "float32" else 0)


def test_nodata_is_left_out_of_means() -> None:
    pixels = np.array([[[7, 7], [0, 7]], [[7, 7], [4, 3]], [[7, 7], [7, 7]]], np.uint8)  # 3 x 2 px, 2 bands
    np.testing.assert_array_equal(halve(pixels, 7, categorical=False), [[[2, 5]], [[7, 7]]])
    clash = np.array([[[6], [8]], [[7], [7]]], np.uint8)
    assert halve(clash, 7, categorical=False).item() == 8  # a mean of real pixels must not become a hole
    assert halve(np.array([[[254], [255]], [[255], [255]]], np.uint8), 255, categorical=False).item() == 254
    nan = np.array([[[np.nan, 1], [2, np.nan]], [[4, 3], [np.nan, np.nan]]], np.float32)
    np.testing.assert_array_equal(halve(nan, np.nan, categorical=False), [[[3, 2]]])
    assert np.isnan(halve(nan, None, categorical=False)).all()


def test_classes_vote() -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 4, (41, 37, 1)).astype(np.uint8)
    for nodata in (None, 3):
        found = halve(pixels, nodata, categorical=True)
        for row, col in np.ndindex(found.shape[:2]):
            block = pixels[2 * row : 2 * row + 2, 2 * col : 2 * col + 2].ravel().tolist()
            votes = [value for value in block if value != nodata] or block
            assert found[row, col, 0] == max(votes, key=votes.count)


def test_many_threads_in_random_order(tmp_path: Path) -> None:
    pixels, path = scene(700, 650, 3), tmp_path / "a.tif"
    with TiffWriter(path, 700, 650, 3, tile=64) as writer, ThreadPoolExecutor(4) as pool:
        for x, y in windows(700, 650, 40, seed=1):
            pool.submit(writer.write, x, y, pixels[y : y + 40, x : x + 40])
    write(tmp_path / "b.tif", pixels)
    for level, wanted in zip(read_levels(path), read_levels(tmp_path / "b.tif"), strict=True):
        np.testing.assert_array_equal(level, wanted)


def test_pixel_by_pixel(tmp_path: Path) -> None:
    pixels = scene(33, 17)
    write(tmp_path / "a.tif", pixels, size=1, seed=0, tile=16)
    np.testing.assert_array_equal(read_levels(tmp_path / "a.tif")[0], pixels)


def test_windows_outside_are_clipped_and_large_ones_are_split(tmp_path: Path) -> None:
    pixels, path = scene(150, 130), tmp_path / "a.tif"
    around = np.pad(pixels, ((20, 30), (10, 40), (0, 0)), constant_values=99)
    with TiffWriter(path, 150, 130, tile=64) as writer:
        writer.write(-10, -20, around[..., 0])
        writer.write(500, 0, around)
        writer.write(0, -400, around)
    np.testing.assert_array_equal(read_levels(path)[0], pixels)


@pytest.mark.parametrize(("dtype", "nodata"), [("uint8", None), ("uint8", 255), ("int16", -9999), ("float32", np.nan)])
def test_pixels_never_written_are_nodata(tmp_path: Path, dtype: str, nodata: float | None) -> None:
    path, fill = tmp_path / "a.tif", 0 if nodata is None else nodata
    expected = np.full((300, 400, 1), fill, dtype)
    expected[70:80, 100:120] = 5
    with TiffWriter(path, 300, 400, 1, dtype, tile=64, nodata=nodata) as writer:
        writer.write(100, 70, expected[70:80, 100:120])
    np.testing.assert_array_equal(read_levels(path)[0], expected)
    with rasterio.open(path) as file:
        np.testing.assert_array_equal(file.read(1), expected[..., 0])
        np.testing.assert_equal(file.nodata, nodata)
        if nodata is not None:
            assert (file.read_masks(1) > 0).sum() == 200
    with rasterio.open(path, overview_level=0) as file:
        np.testing.assert_array_equal(file.read(1)[35:40, 50:60], np.full((5, 10), 5))
    assert path.stat().st_size < 8000  # 35 tiles of level 0 share one
    with tifffile.TiffFile(path) as tif:
        assert all(min(page.databytecounts) > 0 for page in tif.pages)


@pytest.mark.parametrize("epsg", [32633, 4326, 3857, 6318, 4087, 7844, 2180, 4647])
def test_crs_and_transform(tmp_path: Path, epsg: int) -> None:
    like = ArrayImage(scene(100, 90))
    like.crs, like.transform = f"EPSG:{epsg}", (0.5, 0, 20, 0, -0.25, 50)
    write(tmp_path / "a.tif", scene(100, 90), like=like)
    with rasterio.open(tmp_path / "a.tif") as file:
        assert file.crs.to_epsg() == epsg
        assert tuple(file.transform)[:6] == like.transform
        assert file.tags()["AREA_OR_POINT"] == "Area"
        kind, key = (2, 2048) if file.crs.is_geographic else (1, 3072)
    with tifffile.TiffFile(tmp_path / "a.tif") as tif:
        assert tif.pages.first.tags[34735].value == (1, 1, 0, 3, 1024, 0, 1, kind, 1025, 0, 1, 1, key, 0, 1, epsg)


def test_wkt_and_rotation(tmp_path: Path) -> None:
    wkt = rasterio.crs.CRS.from_string("+proj=laea +lat_0=52 +lon_0=11 +x_0=1 +y_0=2 +datum=WGS84 +units=m").to_wkt()
    like = ArrayImage(scene(100, 90))
    like.crs, like.transform = wkt, (0.5, 0.1, 20, 0.2, -0.25, 50)
    write(tmp_path / "a.tif", scene(100, 90), like=like)
    with rasterio.open(tmp_path / "a.tif") as file:
        assert file.crs == rasterio.crs.CRS.from_wkt(wkt)
        assert tuple(file.transform)[:6] == like.transform


def test_geographic_codes_agree_with_proj() -> None:
    with rasterio.Env(OSR_USE_NON_DEPRECATED="NO"):  # else old geocentric codes turn into geographic ones
        for code in [*range(3815, 3830), *range(4000, 5000, 7), *range(5000, 11000, 91), 26918, 32767]:
            try:
                crs = rasterio.crs.CRS.from_epsg(code)
            except rasterio.errors.CRSError:
                continue
            if not crs.wkt.startswith(("GEOCCS", "COMPD_CS")) and (crs.is_geographic or crs.is_projected):
                assert is_geographic(code) == crs.is_geographic, code


def test_pixel_size_names_orientation_and_colours(tmp_path: Path) -> None:
    like = ArrayImage(scene(100, 90))
    like.mpp, like.orientation = (0.2513, 0.5), 6
    colormap = [(0, 0, 0), (255, 10, 20), (0, 255, 1)]
    write(tmp_path / "a.tif", scene(100, 90), like=like, colormap=colormap, nodata=2, band_names=['<sea> & "land"'])
    with rasterio.open(tmp_path / "a.tif") as file:
        assert [file.colormap(1)[i][:3] for i in range(3)] == colormap
        assert file.colorinterp[0].name == "palette"
        assert file.descriptions == ('<sea> & "land"',)
        assert file.nodata == 2
        assert file.tags()["TIFFTAG_RESOLUTIONUNIT"] == "3 (pixels/cm)"
        assert 1e4 / float(file.tags()["TIFFTAG_XRESOLUTION"]) == pytest.approx(0.2513, rel=1e-5)
    with tifffile.TiffFile(tmp_path / "a.tif") as tif:
        assert tif.pages.first.tags["Orientation"].value == 6
        assert tif.series[0].levels[1].keyframe.colormap.T[1].tolist() == [255 * 257, 10 * 257, 20 * 257]


def test_alpha_and_extra_bands(tmp_path: Path) -> None:
    write(tmp_path / "a.tif", scene(20, 30, 4))
    write(tmp_path / "b.tif", scene(20, 30, 4), alpha=True)
    with rasterio.open(tmp_path / "a.tif") as plain, rasterio.open(tmp_path / "b.tif") as clear:
        assert "alpha" not in [kind.name for kind in plain.colorinterp]
        assert [kind.name for kind in clear.colorinterp] == ["red", "green", "blue", "alpha"]


@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg(tmp_path: Path, channels: int) -> None:
    rows, cols = np.mgrid[:150, :200]
    pixels = np.stack([100 + 50 * np.sin(rows / 20 + k) + 40 * np.cos(cols / 30) for k in range(channels)], 2)
    write(tmp_path / "a.tif", pixels.astype(np.uint8), compression="jpeg")
    assert np.abs(read_levels(tmp_path / "a.tif")[0] - pixels).mean() < 2.5
    with rasterio.open(tmp_path / "a.tif") as file:
        assert np.abs(np.moveaxis(file.read(), 0, 2) - pixels).mean() < 3
        assert file.compression.name == "jpeg"


def test_openslide_sees_the_levels(tmp_path: Path) -> None:
    openslide = pytest.importorskip("openslide")
    like = ArrayImage(scene(200, 300, 3))
    like.mpp = (0.25, 0.25)
    write(tmp_path / "a.tif", like.arrays[0], like=like)
    with openslide.OpenSlide(tmp_path / "a.tif") as slide:
        assert slide.level_dimensions == ((300, 200), (150, 100), (75, 50), (38, 25))
        read = np.asarray(slide.read_region((0, 0), 0, (300, 200)))[..., :3]
        np.testing.assert_array_equal(read, like.arrays[0])
        assert float(slide.properties["openslide.mpp-x"]) == pytest.approx(0.25)


def test_memory_is_a_row_of_tiles(tmp_path: Path) -> None:
    """Raster order holds two rows of tiles, Hilbert order next to nothing, however high the image."""
    tile, w = 128, 4096
    region = np.arange(64 * 64, dtype=np.uint8).reshape(64, 64)

    def peak(h: int, places: list[tuple[int, int]]) -> int:
        tracemalloc.start()
        with TiffWriter(tmp_path / "a.tif", h, w, tile=tile) as writer:
            for x, y in places:
                writer.write(x, y, region)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    raster = [peak(h, windows(h, w, 64)) for h in (1024, 2048)]
    assert max(raster) < 2.2 * w * tile
    z_order = sorted(windows(2048, w, 64), key=lambda place: _interleave(place[0] // 64, place[1] // 64))
    assert peak(2048, z_order) < 0.6 * w * tile


def _interleave(x: int, y: int) -> int:
    return sum((x >> bit & 1) << 2 * bit | (y >> bit & 1) << 2 * bit + 1 for bit in range(12))


def test_left_out_windows_wait_for_nothing(tmp_path: Path) -> None:
    with TiffWriter(tmp_path / "a.tif", 512, 512, tile=64, nodata=9) as writer:
        writer.write(0, 0, np.ones((50, 50), np.uint8))
        writer.leave_out(50, 0, 462, 50)
        writer.leave_out(0, 50, 900, 900)
        assert not any(level.pending for level in writer._levels)
    assert (read_levels(tmp_path / "a.tif")[0] == 9).sum() == 512 * 512 - 2500


@pytest.mark.parametrize(
    ("window", "message"),
    [
        (np.zeros((4, 4, 2), np.uint8), "expected pixels (h, w, 3) of uint8, got (4, 4, 2) of uint8"),
        (np.zeros((4, 4), np.uint8), "expected pixels (h, w, 3) of uint8, got (4, 4) of uint8"),
        (np.zeros((4, 4, 3), np.int64), "got (4, 4, 3) of int64"),
    ],
)
def test_wrong_pixels_are_refused(tmp_path: Path, window: NDArray[np.generic], message: str) -> None:
    with pytest.raises(ImageError) as caught, TiffWriter(tmp_path / "a.tif", 40, 40, 3) as writer:
        writer.write(8, 0, window)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_pixel_written_twice_is_refused(tmp_path: Path) -> None:
    with TiffWriter(tmp_path / "a.tif", 40, 40) as writer:
        writer.write(0, 0, np.zeros((40, 40), np.uint8))
        with pytest.raises(ImageError, match="written twice"):
            writer.write(8, 8, np.zeros((1, 1), np.uint8))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "complex64"}, "dtype"),
        ({"dtype": "float64"}, "dtype"),
        ({"tile": 100}, "multiple of 16"),
        ({"compression": "lzw"}, "compression"),
        ({"compression": "jpeg", "dtype": "uint16"}, "JPEG"),
        ({"compression": "jpeg", "colormap": [(0, 0, 0)]}, "JPEG"),
        ({"colormap": [(0, 0, 0)], "channels": 3}, "colormap"),
        ({"nodata": -1}, "nodata"),
        ({"nodata": np.nan}, "nodata"),
        ({"band_names": ["a", "b"]}, "band names"),
        ({"like": ArrayImage(np.zeros((5, 5)))}, "size"),
        ({"height": 0}, "size"),
    ],
)
def test_contradictions_are_refused(tmp_path: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TiffWriter(tmp_path / "a.tif", **{"height": 10, "width": 10, **options})
    assert not list(tmp_path.iterdir())


def test_an_exception_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    path.write_bytes(b"old")
    writer = TiffWriter(path, 100, 100, tile=16)

    def interrupted() -> None:
        with writer:
            writer.write(0, 0, np.ones((50, 50), np.uint8))
            assert names(tmp_path) == ["a.tif", "a.tif.part"]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["a.tif"]
    with pytest.raises(ImageError, match="complete or given up"):
        writer.write(50, 50, np.ones((50, 50), np.uint8))


def test_a_forgotten_writer_leaves_nothing(tmp_path: Path) -> None:
    writer = TiffWriter(tmp_path / "a.tif", 100, 100, tile=16)
    writer.write(0, 0, np.ones((50, 50), np.uint8))
    del writer
    assert not names(tmp_path)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="make it first"):
        TiffWriter(tmp_path / "no" / "a.tif", 10, 10)


CHILD = """
import os, resource, signal, sys
import numpy as np
from gigaxt.errors import ImageError
from gigaxt.image.writer import TiffWriter
what, path = sys.argv[1:]
if what == "limit":
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
pixels = np.random.default_rng(0).integers(0, 255, (2048, 256)).astype(np.uint8)
try:
    with TiffWriter(path, 2048, 2048, tile=128) as writer:
        for x in range(0, 2048, 256):
            writer.write(x, 0, pixels)
            if what == "kill" and x == 1024:
                os.kill(os.getpid(), signal.SIGKILL)
except ImageError as error:
    print(error)
"""


def child(what: str, path: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", CHILD, what, str(path)], capture_output=True, text=True, timeout=60)


def test_a_killed_process_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    path.write_bytes(b"old")
    assert child("kill", path).returncode == -9
    assert path.read_bytes() == b"old"
    write(path, scene(50, 50))  # the .part that was left is in nobody's way
    assert names(tmp_path) == ["a.tif"]


def test_the_limit_on_file_size(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    path.write_bytes(b"old")
    done = child("limit", path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{path}: cannot be written (File too large)\n"
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["a.tif"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("only root can mount a small disk")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_full_disk(small_disk: Path) -> None:
    path = small_disk / "a.tif"
    path.write_bytes(b"old")
    done = child("full", path)
    assert done.stdout.startswith(f"{path}: disk full after ")
    assert "more were needed" in done.stdout
    assert done.stdout.count("\n") == 1
    assert path.read_bytes() == b"old"
    assert names(small_disk) == ["a.tif"]


def test_full_disk_in_one_of_many_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when the caller swallows the error: leaving the `with` raises it again."""
    real, written = os.pwrite, 0

    def pwrite(fd: int, data: memoryview, offset: int) -> int:
        nonlocal written
        before, written = written, written + len(data)
        if before <= 100_000 < written:  # once: then there is room again, but a tile is lost
            raise OSError(28, "No space left on device")
        return real(fd, data[:1000], offset)  # and never all at once

    monkeypatch.setattr(os, "pwrite", pwrite)
    pixels = np.random.default_rng(0).integers(0, 255, (1024, 1024)).astype(np.uint8)
    writer = TiffWriter(tmp_path / "a.tif", 1024, 1024, tile=64)

    def swallowing() -> None:
        with writer, ThreadPoolExecutor(16) as pool:
            futures = [pool.submit(writer.write, x, 0, pixels[:, :64]) for x in range(0, 1024, 64)]
            failed.extend(future.exception() for future in futures)

    failed: list[BaseException | None] = []
    with pytest.raises(ImageError, match="disk full"):
        swallowing()
    assert all(isinstance(error, ImageError) for error in failed if error is not None)
    assert any(failed)
    assert not names(tmp_path)


def test_a_forked_child_does_not_remove_the_file(tmp_path: Path) -> None:
    code = f"""
import os, sys
import numpy as np
from gigaxt.image.writer import TiffWriter
with TiffWriter({str(tmp_path / "a.tif")!r}, 64, 64, tile=64) as writer:
    if os.fork() == 0:
        sys.exit(0)  # runs the exit hooks
    os.wait()
    writer.write(0, 0, np.ones((64, 64), np.uint8))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert read_levels(tmp_path / "a.tif")[0].min() == 1


def test_a_name_that_is_too_long_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"cannot be created \(File name too long\)"):
        PartFile(tmp_path / ("x" * 300 + ".geojson"))
