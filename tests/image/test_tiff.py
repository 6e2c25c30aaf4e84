"""TIFF reading against tifffile's full decode, for every layout that is read."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile

from gigaxt.errors import ImageError
from gigaxt.image import open_image
from gigaxt.image.cache import SEGMENTS
from gigaxt.image.tiff import TiffImage

H, W = 150, 203  # no multiple of any tile


def noise(shape: tuple[int, ...], dtype: str, seed: int = 0) -> np.ndarray:
    """Smooth enough for lossy codecs, with every value of a class present."""
    rng = np.random.default_rng(seed)
    if np.dtype(dtype).kind == "f":
        return rng.normal(size=shape).astype(dtype)
    top = min(np.iinfo(dtype).max, 4000)
    low = -500 if np.dtype(dtype).kind == "i" else 0
    return rng.integers(low, top, shape).astype(dtype)


def full(path: Path, page: int = 0) -> np.ndarray:
    """What tifffile decodes, as (h, w, channels)."""
    with tifffile.TiffFile(path) as tiff:
        found = tiff.pages[page].asarray()
        planar = tiff.pages[page].planarconfig == 2 and found.ndim == 3
    return found[..., None] if found.ndim == 2 else np.moveaxis(found, 0, -1) if planar else found


def check_windows(image: Any, expected: np.ndarray) -> None:
    """The whole, and windows over every border, wholly outside, and of one pixel."""
    h, w = expected.shape[:2]
    np.testing.assert_array_equal(image.read(0, 0, w, h), expected)
    fill = 0 if image.nodata is None else image.nodata
    for x, y, ww, hh in [
        (5, 7, 64, 64),
        (60, 60, 80, 71),
        (-9, -4, 40, 33),
        (w - 20, h - 30, 50, 60),
        (-5, 20, w + 11, 3),
        (w, 0, 4, 4),
        (0, -10, 7, 10),
        (w - 1, h - 1, 1, 1),
    ]:
        wanted = np.full((hh, ww, expected.shape[2]), fill, expected.dtype)
        inside = expected[max(y, 0) : max(y + hh, 0), max(x, 0) : max(x + ww, 0)]
        top, left = max(-y, 0), max(-x, 0)
        wanted[top : top + inside.shape[0], left : left + inside.shape[1]] = inside
        got = image.read(x, y, ww, hh)
        assert got.dtype == expected.dtype
        assert got.flags.writeable
        np.testing.assert_array_equal(got, wanted, err_msg=f"window {x, y, ww, hh}")


LAYOUTS = [{"tile": (64, 48)}, {"rowsperstrip": 17}, {"rowsperstrip": H}]
CODECS: list[tuple[str, dict[str, Any]]] = [
    ("none", {}),
    ("lzw", {"compression": "lzw"}),
    ("deflate", {"compression": "zlib"}),
    ("zstd", {"compression": "zstd"}),
    ("packbits", {"compression": "packbits"}),
    ("lzma", {"compression": "lzma"}),
    ("lerc", {"compression": "lerc"}),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=["tiles", "strips", "one strip"])
@pytest.mark.parametrize(("name", "codec"), CODECS, ids=[name for name, _ in CODECS])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_codecs(tmp_path: Path, name: str, codec: dict[str, Any], layout: dict[str, Any], dtype: str) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, noise((H, W, 3), dtype), photometric="rgb", **codec, **layout)
    check_windows(open_image(path), full(path))


@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint16", "int16", "float16", "uint32", "int32", "float64"])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("layout", LAYOUTS[:2], ids=["tiles", "strips"])
@pytest.mark.parametrize("planar", ["contig", "separate"])
def test_dtypes_orders_and_planes(tmp_path: Path, dtype: str, order: str, layout: dict[str, Any], planar: str) -> None:
    path = tmp_path / "a.tif"
    data = noise((5, H, W) if planar == "separate" else (H, W, 5), dtype)
    bigtiff = dtype == "float16"
    options = {"planarconfig": planar, "photometric": "minisblack", "byteorder": order, "bigtiff": bigtiff}
    tifffile.imwrite(path, data, **options, **layout)
    image = open_image(path)
    assert image.channels == 5
    assert image.dtype == np.dtype(dtype)
    check_windows(image, np.moveaxis(data, 0, -1) if planar == "separate" else data)


@pytest.mark.parametrize("predictor", [2, 3])
@pytest.mark.parametrize("layout", LAYOUTS[:2], ids=["tiles", "strips"])
@pytest.mark.parametrize("planar", ["contig", "separate"])
@pytest.mark.parametrize("codec", ["zlib", "lzw", "zstd"])
@pytest.mark.parametrize("order", ["<", ">"])
def test_predictors(
    tmp_path: Path, predictor: int, layout: dict[str, Any], planar: str, codec: str, order: str
) -> None:
    for dtype in ("uint8", "uint16") if predictor == 2 else ("float16", "float32"):
        path = tmp_path / f"{dtype}.tif"
        data = noise((3, H, W) if planar == "separate" else (H, W, 3), dtype)
        options = {"planarconfig": planar, "photometric": "rgb", "byteorder": order}
        tifffile.imwrite(path, data, predictor=predictor, compression=codec, **options, **layout)
        check_windows(open_image(path), np.moveaxis(data, 0, -1) if planar == "separate" else data)


@pytest.mark.parametrize("codec", ["jpeg", "jpeg2000", "webp", "png"])
@pytest.mark.parametrize("layout", LAYOUTS[:2], ids=["tiles", "strips"])
@pytest.mark.parametrize("channels", [1, 3])
def test_picture_codecs(tmp_path: Path, codec: str, layout: dict[str, Any], channels: int) -> None:
    if (codec, channels) == ("webp", 1):
        pytest.skip("WebP has no grey pictures")
    path = tmp_path / "a.tif"
    y, x = np.mgrid[:H, :W]
    data = np.stack([x, y, (x + y) // 2], -1).astype(np.uint8)
    data = data if channels == 3 else data[..., 0]
    tifffile.imwrite(path, data, photometric="rgb" if channels == 3 else "minisblack", compression=codec, **layout)
    check_windows(open_image(path), full(path))


@pytest.mark.parametrize("subsampling", [(1, 1), (2, 1), (2, 2)])
def test_jpeg_ycbcr_with_subsampling(tmp_path: Path, subsampling: tuple[int, int]) -> None:
    path = tmp_path / "a.tif"
    options = {"photometric": "rgb", "compression": "jpeg", "subsampling": subsampling, "tile": (64, 64)}
    tifffile.imwrite(path, noise((H, W, 3), "uint8"), **options)
    check_windows(open_image(path), full(path))


def test_jpeg_of_bands_apart_called_rgb(tmp_path: Path) -> None:
    """GDAL's INTERLEAVE=BAND, which tifffile takes for pictures of three bands."""
    rasterio = pytest.importorskip("rasterio")
    path, data = tmp_path / "a.tif", noise((3, H, W), "uint8")
    profile = {"driver": "GTiff", "height": H, "width": W, "count": 3, "dtype": "uint8", "tiled": True}
    profile |= {"blockxsize": 64, "blockysize": 64, "compress": "jpeg", "interleave": "band"}
    with rasterio.open(path, "w", transform=rasterio.Affine(1, 0, 7, 0, -1, 7), **profile) as target:
        target.write(data)
    with rasterio.open(path) as source:
        check_windows(open_image(path), np.moveaxis(source.read(), 0, -1))


@pytest.mark.parametrize("outer", ["deflate", "zstd"])
def test_lerc_inside_another_codec(tmp_path: Path, outer: str) -> None:
    rasterio = pytest.importorskip("rasterio")
    path, data = tmp_path / "a.tif", noise((2, H, W), "float32")
    profile = {"driver": "GTiff", "height": H, "width": W, "count": 2, "dtype": "float32", "tiled": True}
    profile |= {"blockxsize": 64, "blockysize": 64, "compress": f"lerc_{outer}", "max_z_error": 0}
    profile |= {"crs": "EPSG:32633", "transform": rasterio.Affine(10, 0, 5e5, 0, -10, 5e6)}
    with rasterio.open(path, "w", **profile) as target:
        target.write(data)
    check_windows(open_image(path), np.moveaxis(data, 0, -1))


@pytest.mark.parametrize("bits", [1, 4])
def test_packed_samples(tmp_path: Path, bits: int) -> None:
    rasterio = pytest.importorskip("rasterio")
    path, data = tmp_path / "a.tif", noise((H, W), "uint8") % 2**bits
    profile = {"driver": "GTiff", "height": H, "width": W, "count": 1, "dtype": "uint8", "nbits": bits}
    with rasterio.open(path, "w", transform=rasterio.Affine(1, 0, 7, 0, -1, 7), **profile) as target:
        target.write(data, 1)
    check_windows(open_image(path), data[..., None])


def test_palette_gives_indices(tmp_path: Path) -> None:
    path, data = tmp_path / "a.tif", noise((H, W), "uint8") % 7
    colours = np.arange(768, dtype=np.uint16).reshape(3, 256)
    tifffile.imwrite(path, data, photometric="palette", colormap=colours, tile=(64, 64))
    check_windows(open_image(path), data[..., None])


def test_pyramid_in_sub_directories_and_pages(tmp_path: Path) -> None:
    data = noise((300, 402, 3), "uint8")
    for kind in ("sub", "pages"):
        path = tmp_path / f"{kind}.tif"
        with tifffile.TiffWriter(path) as tiff:
            options = {"photometric": "rgb", "tile": (64, 64), "compression": "zlib"}
            tiff.write(data, subifds=2 if kind == "sub" else 0, **options)
            tiff.write(data[::2, ::2], subfiletype=1, **options)
            tiff.write(data[::4, ::4][:, :100], subfiletype=1, **options)
        image = open_image(path)
        assert [level[:2] for level in image.levels] == [(402, 300), (201, 150), (100, 75)]
        assert image.levels[2].downsample_x == 4.02
        np.testing.assert_array_equal(image.read(50, 40, 160, 120, 1)[:110, :151], data[::2, ::2][40:, 50:])
        np.testing.assert_array_equal(image.read(0, 0, 100, 75, 2), data[::4, ::4][:, :100])
        with pytest.raises(ImageError, match="expected a level from 0 to 2, got 3"):
            image.read(0, 0, 1, 1, 3)


def test_ome_channels_in_pages_with_levels(tmp_path: Path) -> None:
    path, data = tmp_path / "a.ome.tif", noise((2, 3, 120, 90), "uint16")  # z, c
    meta = {"axes": "ZCYX", "Channel": {"Name": ["DAPI", "FITC", "Cy5"]}}
    meta |= {"PhysicalSizeX": 0.5, "PhysicalSizeXUnit": "µm", "PhysicalSizeY": 600, "PhysicalSizeYUnit": "nm"}
    with tifffile.TiffWriter(path, ome=True) as tiff:
        tiff.write(data, subifds=1, metadata=meta, tile=(64, 64), photometric="minisblack")
        tiff.write(data[..., ::2, ::2], subfiletype=1, tile=(64, 64), photometric="minisblack")
    image = open_image(path)
    assert image.band_names == ("DAPI", "FITC", "Cy5")
    assert image.mpp == (0.5, pytest.approx(0.6))
    check_windows(image, np.moveaxis(data[0], 0, -1))
    np.testing.assert_array_equal(image.read(0, 0, 45, 60, 1), np.moveaxis(data[0, :, ::2, ::2], 0, -1))
    np.testing.assert_array_equal(image.select(["Cy5", 0]).read(3, 4, 50, 60), image.read(3, 4, 50, 60)[..., [2, 0]])


def test_ome_rgb_samples(tmp_path: Path) -> None:
    path, data = tmp_path / "a.ome.tif", noise((H, W, 3), "uint8")
    tifffile.imwrite(path, data, ome=True, photometric="rgb", metadata={"axes": "YXS"}, rowsperstrip=16)
    check_windows(open_image(path), data)


def test_ome_of_several_files_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.ome.tif"
    tifffile.imwrite(path, noise((2, 20, 20), "uint8"), ome=True, metadata={"axes": "CYX"}, photometric="minisblack")
    with tifffile.TiffFile(path) as tiff:
        before, *_, after = tiff.pages[0].description.split("<TiffData")
    blocks = [
        f'<TiffData FirstC="{band}" IFD="0"><UUID FileName="{name}">urn:uuid:1</UUID></TiffData>'
        for band, name in enumerate((path.name, "b.ome.tif"))
    ]
    xml = before + "".join(blocks) + after.split("/>", 1)[1]
    for pages, cause in [(1, "promises 2 bands, this file holds 1"), (2, "band 1 of its OME-XML is not in this file")]:
        with tifffile.TiffWriter(path) as writer:
            for page in range(pages):
                writer.write(noise((20, 20), "uint8"), description=None if page else xml, metadata=None)
        with pytest.raises(ImageError, match=cause):
            open_image(path)


def write_svs(path: Path, data: np.ndarray) -> None:
    """Aperio's layout: full size, thumbnail in strips, levels, label and macro."""
    text = "Aperio Image Library v11\n402x300 |AppMag = 40|MPP = 0.2520|Left = 1"
    with tifffile.TiffWriter(path) as tiff:
        options = {"photometric": "rgb", "metadata": None}
        tiff.write(data, tile=(64, 64), compression="jpeg", description=text, **options)
        tiff.write(data[::3, ::3], rowsperstrip=16, description="Aperio thumbnail", **options)
        tiff.write(data[::4, ::4][:, :100], tile=(64, 64), compression="jpeg", description=text, **options)
        tiff.write(data[:40, :60], subfiletype=1, description="Aperio label 60x40", **options)
        tiff.write(data[:75, :100], subfiletype=9, description="Aperio macro 100x75", **options)


def test_aperio(tmp_path: Path) -> None:
    path = tmp_path / "a.svs"
    write_svs(path, noise((300, 402, 3), "uint8"))
    image = open_image(path)
    assert image.mpp == (0.252, 0.252)
    assert [level[:2] for level in image.levels] == [(402, 300), (100, 75)]
    np.testing.assert_array_equal(image.read(0, 0, 100, 75, 1), full(path, 2))


def test_nodata_and_validity(tmp_path: Path) -> None:
    path, data = tmp_path / "a.tif", noise((H, W, 2), "int16")
    data[10:20, 30:50] = -999
    data[40:50, :, 0] = -999  # one band only: still a pixel
    tag = (42113, "s", 0, "-999", True)
    tifffile.imwrite(path, data, planarconfig="contig", photometric="minisblack", extratags=[tag], tile=(64, 64))
    image = open_image(path)
    assert image.nodata == -999
    assert not image.all_valid
    expected = np.ones((H, W), bool)
    expected[10:20, 30:50] = False
    np.testing.assert_array_equal(image.validity(0, 0, W, H), expected)
    pixels, mask = image.read_valid(-3, -3, 10, 10)
    assert (pixels[:3] == -999).all()
    assert mask.sum() == 49


@pytest.mark.parametrize(
    ("text", "dtype", "expected"),
    [
        ("nan", "float32", np.nan),
        ("nan", "uint8", None),
        ("300", "uint8", None),
        ("-32768", "float16", -32768),
        ("1e39", "float32", None),
        ("-3.4028234663852886e+38", "float32", -3.4028234663852886e38),
        ("x", "uint8", None),
    ],
)
def test_nodata_texts(tmp_path: Path, text: str, dtype: str, expected: float | None) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, noise((8, 8), dtype), extratags=[(42113, "s", 0, text, True)])
    image = open_image(path)
    assert image.nodata == pytest.approx(expected, nan_ok=True) if expected is not None else image.nodata is None


def test_missing_tiles_are_nodata(tmp_path: Path) -> None:
    rasterio = pytest.importorskip("rasterio")
    path, data = tmp_path / "a.tif", noise((64, 64), "uint8")
    profile = {"driver": "GTiff", "height": 200, "width": 130, "count": 1, "dtype": "uint8", "sparse_ok": True}
    profile |= {"tiled": True, "blockxsize": 64, "blockysize": 64, "compress": "deflate", "nodata": 9}
    profile |= {"crs": "EPSG:32633", "transform": rasterio.Affine(10, 0, 5e5, 0, -10, 5e6)}
    with rasterio.open(path, "w", **profile) as target:
        target.write(data, 1, window=rasterio.windows.Window(64, 64, 64, 64))
    expected = np.full((200, 130, 1), 9, np.uint8)
    expected[64:128, 64:128, 0] = data
    image = open_image(path)
    check_windows(image, expected)
    assert not image.validity(0, 0, 64, 64).any()


def test_internal_mask_per_level(tmp_path: Path) -> None:
    path, data = tmp_path / "a.tif", noise((128, 160, 3), "uint8")
    mask = np.zeros((128, 160), bool)
    mask[20:100, 30:150] = True
    with tifffile.TiffWriter(path) as tiff:
        options = {"tile": (64, 64), "compression": "zlib", "metadata": None}
        tiff.write(data, photometric="rgb", **options)
        tiff.write(mask, photometric="mask", subfiletype=4, **options)
        tiff.write(data[::2, ::2], photometric="rgb", subfiletype=1, **options)
        tiff.write(mask[::2, ::2], photometric="mask", subfiletype=5, **options)
        tiff.write(data[::4, ::4], photometric="rgb", subfiletype=1, **options)  # without a mask: not offered
    image = open_image(path)
    assert len(image.levels) == 2
    assert not image.all_valid
    np.testing.assert_array_equal(image.validity(0, 0, 160, 128), mask)
    np.testing.assert_array_equal(image.validity(5, 6, 70, 50, 1), mask[::2, ::2][6:56, 5:75])
    assert not image.validity(-4, 0, 4, 4).any()


def test_georeference_as_rasterio_reads_it(tmp_path: Path) -> None:
    rasterio = pytest.importorskip("rasterio")
    profile = {"driver": "GTiff", "height": 8, "width": 9, "count": 2, "dtype": "uint8"}
    cases = [
        ("EPSG:32633", rasterio.Affine(10, 0, 5e5, 0, -10, 5e6), {}),
        ("EPSG:4326", rasterio.Affine(0.1, 0, 5, 0, -0.1, 50), {"AREA_OR_POINT": "Point"}),
        ("EPSG:2263", rasterio.Affine(3, 1, 5e5, 1, -3, 5e6), {}),  # New York, US feet, rotated
    ]
    for number, (crs, transform, tags) in enumerate(cases):
        path = tmp_path / f"{number}.tif"
        with rasterio.open(path, "w", crs=crs, transform=transform, **profile) as target:
            target.update_tags(**tags)
            target.set_band_description(1, "red")
            target.set_band_description(2, "nir")
        image = open_image(path)
        with rasterio.open(path) as source:
            assert image.crs == crs
            assert image.transform == pytest.approx(tuple(source.transform)[:6])
            assert image.band_names == ("red", "nir")
            assert image.mpp is None
            unit = source.crs.linear_units_factor[1] if source.crs.is_projected else None
        expected = None if unit is None else np.hypot(transform.a, transform.d) * unit
        assert image.gsd_m == (None if expected is None else pytest.approx((expected, expected)))


def test_resolution_tags(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    for resolution, unit, expected in [
        ((40000, 20000), "CENTIMETER", (0.25, 0.5)),
        ((101600, 101600), "INCH", (0.25, 0.25)),
        ((72, 72), "INCH", None),
        ((1, 1), None, None),
    ]:
        tifffile.imwrite(path, noise((8, 8), "uint8"), resolution=resolution, resolutionunit=unit)
        assert open_image(path).mpp == expected


def test_orientation_is_reported_not_applied(tmp_path: Path) -> None:
    path, data = tmp_path / "a.tif", noise((20, 30), "uint8")
    tifffile.imwrite(path, data, extratags=[(274, "H", 1, 6, True)])
    image = open_image(path)
    assert image.orientation == 6
    np.testing.assert_array_equal(image.read(0, 0, 30, 20)[..., 0], data)


def test_large_strips(tmp_path: Path) -> None:
    path, data = tmp_path / "a.tif", noise((64, 512, 1), "uint16")[..., 0]
    tifffile.imwrite(path, data, rowsperstrip=64, compression="zlib")
    with pytest.raises(ImageError, match="expected strips of at most 10000 bytes decoded, got 65536"):
        TiffImage(path, max_tile_bytes=10_000)
    tifffile.imwrite(path, data, rowsperstrip=64)  # read by row: any size
    image = TiffImage(path, max_tile_bytes=10_000)
    check_windows(image, data[..., None])


@pytest.mark.parametrize("width", [300, 40_000], ids=["rows read in one piece", "rows read one by one"])
def test_raw_strips_read_only_the_window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    path, data = tmp_path / "a.tif", noise((40, width, 2), "float32")
    tifffile.imwrite(path, data, rowsperstrip=11, planarconfig="contig", photometric="minisblack")
    image = open_image(path)
    counted = 0
    pread, preadv = os.pread, os.preadv

    def counting_pread(number: int, count: int, offset: int) -> bytes:
        nonlocal counted
        counted += count
        return pread(number, count, offset)

    def counting_preadv(number: int, buffers: list[memoryview], offset: int) -> int:
        nonlocal counted
        counted += len(buffers[0])
        return preadv(number, buffers, offset)

    monkeypatch.setattr(os, "pread", counting_pread)
    monkeypatch.setattr(os, "preadv", counting_preadv)
    np.testing.assert_array_equal(image.read(100, 5, 64, 30), data[5:35, 100:164])
    wanted = 30 * 64 * 8
    assert wanted <= counted <= (wanted if width > 1000 else 30 * width * 8)


def test_planar_bands_apart_are_read_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, data = tmp_path / "a.tif", noise((6, H, W), "uint16")
    tifffile.imwrite(path, data, planarconfig="separate", photometric="minisblack", compression="zlib", tile=(64, 64))
    image = open_image(path)
    decoded = []
    plane_class = type(image._planes[0][0])
    decode = plane_class.decode
    monkeypatch.setattr(plane_class, "decode", lambda self, d, i: decoded.append(i) or decode(self, d, i))
    np.testing.assert_array_equal(image.select([4, 1]).read(0, 0, W, H), np.moveaxis(data[[4, 1]], 0, -1))
    assert len(decoded) == 2 * 12


@pytest.fixture
def tiled(tmp_path: Path) -> tuple[Path, np.ndarray]:
    path, data = tmp_path / "a.tif", noise((300, 310, 3), "uint8")
    tifffile.imwrite(path, data, photometric="rgb", compression="zlib", predictor=True, tile=(64, 64))
    return path, data


def some_reads(image: Any, data: np.ndarray, seed: int) -> bool:
    rng = np.random.default_rng(seed)
    for x, y in rng.integers(0, 240, (20, 2)):
        if not np.array_equal(image.read(int(x), int(y), 60, 50), data[y : y + 50, x : x + 60]):
            return False
    return True


def test_threads_share_an_image(tiled: tuple[Path, np.ndarray]) -> None:
    image = open_image(tiled[0])
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(lambda seed: some_reads(image, tiled[1], seed), range(24)))


def test_forked_children_read(tiled: tuple[Path, np.ndarray]) -> None:
    image = open_image(tiled[0])
    assert some_reads(image, tiled[1], 0)
    children = []
    for seed in range(3):
        child = os.fork()
        if not child:
            os._exit(0 if some_reads(image, tiled[1], seed) else 1)
        children.append(child)
    assert some_reads(image, tiled[1], 9)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0, 0]


def test_fork_while_another_thread_holds_the_locks(tiled: tuple[Path, np.ndarray]) -> None:
    image = open_image(tiled[0])
    with SEGMENTS._store.get().lock:  # as if a thread were inside `get` at the moment of the fork
        child = os.fork()
        if not child:
            signal.alarm(30)  # a deadlock ends the child, and so the test
            os._exit(0 if some_reads(image, tiled[1], 1) else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def _spawned(image: Any, data: np.ndarray, queue: Any) -> None:
    queue.put(some_reads(image, data, 3))


def test_pickle_and_spawn(tiled: tuple[Path, np.ndarray]) -> None:
    image = TiffImage(tiled[0], max_tile_bytes=1 << 20)
    state = pickle.dumps(image)
    assert len(state) < 400  # path and options only
    again = pickle.loads(state)
    assert again._options["max_tile_bytes"] == 1 << 20
    assert some_reads(again, tiled[1], 2)
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_spawned, args=(image, tiled[1], queue))
    process.start()
    assert queue.get(timeout=60)
    process.join()


def test_store_of_tiles_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, data = tmp_path / "a.tif", noise((300, 310, 3), "uint8")
    tifffile.imwrite(path, data, photometric="rgb", compression="zlib", rowsperstrip=10)
    image = open_image(path)
    monkeypatch.setattr(SEGMENTS, "limit", 50_000)
    SEGMENTS.clear()
    for x in range(0, 300, 30):
        np.testing.assert_array_equal(image.read(x, 0, 30, 300)[:, :10], data[:, x : x + 10])
        assert SEGMENTS.bytes <= 50_000
    SEGMENTS.clear()


def test_unusual_pixels_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, np.zeros((8, 8), np.complex64))
    with pytest.raises(ImageError, match="expected integer or float pixels, got complex64"):
        open_image(path)
    tifffile.imwrite(path, np.zeros((4, 16, 16), np.uint8), volumetric=True, tile=(2, 16, 16), photometric="minisblack")
    with pytest.raises(ImageError, match="expected a flat image"):
        open_image(path)
    tifffile.imwrite(path, np.zeros((64, 64), np.uint8), compression="jpegxl")
    with pytest.raises(ImageError, match="compression 50002 is not read"):
        open_image(path)


REAL = ["RGB.byte.tif", "RGBA.uint16.tif", "all-nodata.tif", "cogeo.tif", "float_nan.tif"]


@pytest.mark.parametrize("name", REAL)
def test_real_files(fixtures: Path, name: str) -> None:
    path = fixtures / "geotiff" / name
    image, expected = open_image(path), full(path)
    np.testing.assert_array_equal(image.read(0, 0, image.width, image.height), expected)
    rng = np.random.default_rng(0)
    for _ in range(20):
        x, y = int(rng.integers(0, image.width)), int(rng.integers(0, image.height))
        got = image.read(x, y, 300, 300)[: image.height - y, : image.width - x]
        np.testing.assert_array_equal(got, expected[y : y + 300, x : x + 300])
    rasterio = pytest.importorskip("rasterio")
    with rasterio.open(path) as source:
        assert image.transform == pytest.approx(tuple(source.transform)[:6])
        assert image.crs == (f"EPSG:{source.crs.to_epsg()}" if source.crs else None)
        assert len(image.levels) == 1 + len(source.overviews(1))
        if name != "RGBA.uint16.tif":  # GDAL takes its alpha band for a mask; here a band is a band
            np.testing.assert_array_equal(image.validity(0, 0, image.width, image.height), source.dataset_mask() > 0)


def test_real_scene_of_xview3(fixtures: Path) -> None:
    paths = sorted((fixtures / "xview3_mini_scene").rglob("*.tif"))
    assert len(paths) == 7
    for path in paths:
        image = open_image(path)
        np.testing.assert_array_equal(image.read(0, 0, image.width, image.height), full(path))
        assert image.nodata == -32768
        assert image.gsd_m in ((10, 10), (500, 500))


def test_real_corrupt_file(fixtures: Path) -> None:
    with pytest.raises(ImageError, match=r"corrupt.tif: tile or strip 3 of 4 ends at byte 307086, .* it is truncated"):
        open_image(fixtures / "geotiff" / "corrupt.tif")
