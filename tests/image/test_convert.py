from __future__ import annotations

import io
import sys
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import tifffile
from numpy.typing import NDArray

from array_image import ArrayImage
from gigaxt.errors import ImageError
from gigaxt.image import jpeg_rows, png_rows
from gigaxt.image.base import Image
from gigaxt.image.convert import convert_image
from gigaxt.image.open import open_image

rasterio = pytest.importorskip("rasterio")
pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
RNG = np.random.default_rng(0)


def noise(h: int, w: int, c: int = 1, dtype: str = "uint8") -> NDArray[np.generic]:
    """Rough and smooth parts, so that an encoder picks all five filters."""
    smooth = np.add.outer(np.arange(h) * 3, np.arange(w) * 2)[..., None] + np.arange(c) * 40
    rough = RNG.integers(0, np.iinfo(dtype).max, (h, w, c))
    return np.where(np.arange(w)[None, :, None] < w // 2, smooth, rough).astype(dtype)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def pixels_of(path: Path) -> NDArray[np.generic]:
    with tifffile.TiffFile(path) as file:
        page = file.pages.first
        return page.asarray().reshape(page.imagelength, page.imagewidth, -1)


def save(path: Path, picture: PIL.Image.Image, **options: object) -> Path:
    picture.save(path, **options)
    return path


def pictures() -> dict[str, PIL.Image.Image]:
    h, w = 37, 53
    make = PIL.Image.fromarray
    gray = make(noise(h, w)[..., 0])
    return {
        "1": gray.convert("1"),
        "L": gray,
        "P": gray.convert("P"),
        "LA": make(noise(h, w, 2)),
        "RGB": make(noise(h, w, 3)),
        "RGBA": make(noise(h, w, 4)),
        "I;16": make(noise(h, w, 1, "uint16")[..., 0]),
        "one pixel": make(noise(1, 1, 3)),
        "one row": make(noise(1, 300, 3)),
        "one column": make(noise(300, 1)[..., 0]),
    }


@pytest.mark.parametrize("rows_at_once", [1, 3, 1000])
@pytest.mark.parametrize("kind", pictures())
def test_png_of_every_mode_equals_pillow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, rows_at_once: int
) -> None:
    picture = pictures()[kind]
    source = save(tmp_path / "a.png", picture)
    wanted = np.asarray(picture).astype(np.uint16 if kind == "I;16" else np.uint8)
    row_bytes = wanted.nbytes // wanted.shape[0]
    monkeypatch.setattr(png_rows, "_DECODED_BYTES", rows_at_once * (1 + row_bytes))
    monkeypatch.setattr(png_rows, "_FILE_BYTES", 100)
    convert_image(source, tmp_path / "a.tif", tile=16)
    np.testing.assert_array_equal(pixels_of(tmp_path / "a.tif"), wanted.reshape(*wanted.shape[:2], -1))
    np.testing.assert_array_equal(
        open_image(source).read(0, 0, picture.width, picture.height).squeeze(), wanted.squeeze()
    )
    with rasterio.open(tmp_path / "a.tif") as file:
        assert (file.colorinterp[-1].name == "alpha") == (kind in ("LA", "RGBA"))
        if kind == "P":
            palette = np.asarray(picture.getpalette()).reshape(-1, 3)
            assert [file.colormap(1)[i][:3] for i in range(len(palette))] == [tuple(row) for row in palette.tolist()]


@pytest.mark.parametrize("depth", [1, 2, 4])
@pytest.mark.parametrize("colour", [0, 3])
@pytest.mark.parametrize("width", [1, 29])
def test_png_of_few_bits_equals_pillow(tmp_path: Path, depth: int, colour: int, width: int) -> None:
    values = RNG.integers(0, 2**depth, (23, width)).astype(np.uint8)
    source = tmp_path / "a.png"
    source.write_bytes(few_bits(values, depth, colour))
    with PIL.Image.open(source) as picture:
        wanted = np.asarray(picture).astype(np.uint8)
    convert_image(source, tmp_path / "a.tif", tile=16)
    np.testing.assert_array_equal(pixels_of(tmp_path / "a.tif")[..., 0], wanted)


def few_bits(values: NDArray[np.uint8], depth: int, colour: int) -> bytes:
    """A PNG of 1, 2 or 4 bits, each row with another filter."""
    bits = np.unpackbits(values[..., None], axis=2)[..., 8 - depth :].reshape(len(values), -1)
    packed = np.packbits(bits, axis=1)
    data, above = bytearray(), np.zeros(packed.shape[1], int)
    for y, row in enumerate(packed.astype(int)):
        left = np.concatenate([[0], row[:-1]])
        corner = np.concatenate([[0], above[:-1]])
        guess = left + above - corner
        distances = np.abs(guess - np.stack([left, above, corner]))
        paeth = np.choose(distances.argmin(0), [left, above, corner])
        predicted = [0 * row, left, above, (left + above) // 2, paeth][y % 5]
        data += bytes([y % 5]) + ((row - predicted) % 256).astype(np.uint8).tobytes()
        above = row
    header = values.shape[1].to_bytes(4) + len(values).to_bytes(4) + bytes([depth, colour, 0, 0, 0])
    palette = chunk(b"PLTE", bytes(range(3 * 2**depth))) if colour == 3 else b""
    return png(chunk(b"IHDR", header), palette, chunk(b"IDAT", zlib.compress(bytes(data))))


def chunk(kind: bytes, data: bytes) -> bytes:
    return len(data).to_bytes(4) + kind + data + zlib.crc32(kind + data).to_bytes(4)


def png(*chunks: bytes) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks) + chunk(b"IEND", b"")


@pytest.mark.parametrize("channels", [2, 3, 4])
def test_png_of_16_bits_is_exact(tmp_path: Path, channels: int) -> None:
    """Pillow reduces these to 8 bits."""
    imagecodecs = pytest.importorskip("imagecodecs")
    pixels = noise(41, 33, channels, "uint16")
    (tmp_path / "a.png").write_bytes(imagecodecs.png_encode(pixels))
    convert_image(tmp_path / "a.png", tmp_path / "a.tif", tile=16)
    np.testing.assert_array_equal(pixels_of(tmp_path / "a.tif"), pixels)


def test_real_png(tmp_path: Path, fixtures: Path) -> None:
    for source in (fixtures / "coco_images/terrain2.png", fixtures / "sar/vessel_crop_0_vv.png"):
        seen: list[tuple[int, int]] = []
        convert_image(source, tmp_path / "a.tif", progress=lambda *rows, seen=seen: seen.append(rows))
        with PIL.Image.open(source) as picture:
            wanted = np.asarray(picture)
        np.testing.assert_array_equal(pixels_of(tmp_path / "a.tif").squeeze(), wanted)
        assert seen[-1] == (len(wanted), len(wanted))


def test_png_transparency_and_orientation(tmp_path: Path) -> None:
    exif = PIL.Image.Exif()
    exif[0x0112] = 8
    save(tmp_path / "a.png", pictures()["L"], transparency=77, exif=exif)
    convert_image(tmp_path / "a.png", tmp_path / "a.tif", tile=16)
    image = open_image(tmp_path / "a.tif")
    assert (image.nodata, image.orientation) == (77, 8)
    save(tmp_path / "p.png", pictures()["P"], transparency=3)
    convert_image(tmp_path / "p.png", tmp_path / "p.tif", tile=16)
    assert open_image(tmp_path / "p.tif").nodata == 3


def broken_pngs() -> dict[str, tuple[bytes, str]]:
    file = io.BytesIO()
    pictures()["RGB"].save(file, "png")
    good = file.getvalue()
    at = good.index(b"IDAT")
    file = io.BytesIO()
    ihdr = good[8:33]
    wrong_filter = png(ihdr, chunk(b"IDAT", zlib.compress(bytes([9]) * 37 * (1 + 3 * 53))))
    huge = ihdr[:8] + (2**31 - 1).to_bytes(4) * 2 + ihdr[16:21]
    large = ihdr[:8] + (60_000).to_bytes(4) * 2 + ihdr[16:21]
    return {
        "cut": (good[: at + 200], "truncated"),
        "cut header": (good[:20], "truncated"),
        "flipped bit": (good[: at + 300] + bytes([good[at + 300] ^ 1]) + good[at + 301 :], "damaged"),
        "checksum": (good[:-20] + bytes([good[-20] ^ 1]) + good[-19:], "damaged"),
        "last checksum": (good[:-14] + bytes([good[-14] ^ 1]) + good[-13:], "checksum"),
        "cut end": (good[:-14], "checksum"),
        "filter 9": (wrong_filter, "damaged"),
        "too few rows": (png(ihdr, chunk(b"IDAT", zlib.compress(bytes(500)))), "fewer rows"),
        "no pixels": (png(ihdr), "without pixel data"),
        "random": (good[:50] + RNG.bytes(5000), "damaged"),
        "2^31 px": (png(chunk(b"IHDR", huge[8:]), good[33:]), "GiB"),
        "60,000 px": (png(chunk(b"IHDR", large[8:]), good[33:]), "fewer rows"),
    }


@pytest.mark.parametrize("what", broken_pngs())
def test_broken_png(tmp_path: Path, what: str) -> None:
    data, message = broken_pngs()[what]
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(ImageError, match=message) as caught:
        convert_image(tmp_path / "a.png", tmp_path / "a.tif")
    assert "\n" not in str(caught.value)
    assert names(tmp_path) == ["a.png"]


def test_interlaced_png_is_refused(tmp_path: Path) -> None:
    header = bytearray(chunk(b"IHDR", (8).to_bytes(4) * 2 + bytes([8, 0, 0, 0, 1])))
    (tmp_path / "a.png").write_bytes(png(bytes(header), chunk(b"IDAT", b"")))
    with pytest.raises(ImageError, match="interlaced"):
        convert_image(tmp_path / "a.png", tmp_path / "a.tif")


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("kind", ["L", "RGB"])
def test_jpeg_equals_pillow(tmp_path: Path, kind: str, progressive: bool) -> None:
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    picture = pictures()[kind].resize((300, 200))
    source = save(tmp_path / "a.jpg", picture, quality=90, progressive=progressive, exif=exif)
    with PIL.Image.open(source) as again:
        wanted = np.asarray(again).reshape(200, 300, -1).astype(int)
    convert_image(source, tmp_path / "a.tif", tile=64)
    np.testing.assert_array_equal(pixels_of(tmp_path / "a.tif"), wanted)
    assert open_image(tmp_path / "a.tif").orientation == 6
    if progressive:  # 2 bytes a coefficient: needs more than is allowed here
        with pytest.raises(ImageError, match=r"progressive JPEG.*jpegtran"):
            jpeg_rows.jpeg_rows(source, 16, 100_000)
    budget = (260_000 if kind == "RGB" else 180_000) if progressive else 0
    rows = jpeg_rows.jpeg_rows(source, 16, budget).bands(64)  # through rasterio, band by band
    found = np.concatenate(list(rows))
    assert np.abs(found - wanted).mean() < 2.5  # rasterio 1.4 brings a libjpeg that rounds otherwise


def test_jpeg_of_real_size(tmp_path: Path, fixtures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = fixtures / "geotiff/389225main_sw_1965_1024.jpg"
    convert_image(source, tmp_path / "a.tif", compression="jpeg")
    with PIL.Image.open(source) as picture:
        wanted = np.asarray(picture).astype(int)
    assert np.abs(pixels_of(tmp_path / "a.tif").squeeze() - wanted.squeeze()).mean() < 3
    monkeypatch.setitem(sys.modules, "rasterio", None)
    with pytest.raises(ImageError, match=r"pip install 'gigaxt\[geo\]'"):
        jpeg_rows.jpeg_rows(source, 16, 1000)


@pytest.mark.parametrize("careful", [True, False])
def test_truncated_jpeg(tmp_path: Path, careful: bool) -> None:
    source = save(tmp_path / "a.jpg", pictures()["RGB"].resize((300, 200)), quality=90)
    good = source.read_bytes()
    source.write_bytes(good[:9000])
    with pytest.raises(ImageError, match=r"truncated|Premature") as caught:
        list(jpeg_rows.jpeg_rows(source, 16, 10**9 if careful else 0).bands(16))
    assert "\n" not in str(caught.value)
    if careful:  # GDAL does not notice
        source.write_bytes(good[:3000] + RNG.bytes(5000) + good[8000:])
        with pytest.raises(ImageError, match="damaged"):
            list(jpeg_rows.jpeg_rows(source, 16, 10**9).bands(16))


@pytest.mark.parametrize("data", [b"\xff\xd8\xff", b"\xff\xd8\xff\xe0\0\x10", b"\xff\xd8\xff\xda\0\x08" + bytes(50)])
def test_jpeg_without_header(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.jpg").write_bytes(data)
    with pytest.raises(ImageError, match="damaged or truncated"):
        convert_image(tmp_path / "a.jpg", tmp_path / "a.tif")


def test_cmyk_jpeg_is_refused(tmp_path: Path) -> None:
    source = save(tmp_path / "a.jpg", pictures()["RGB"].convert("CMYK"))
    with pytest.raises(ImageError, match="1 or 3 bands"):
        convert_image(source, tmp_path / "a.tif")


@pytest.mark.parametrize("name", ["RGB.byte.tif", "RGBA.uint16.tif", "cogeo.tif", "float_nan.tif", "all-nodata.tif"])
def test_geotiffs_keep_pixels_and_place(tmp_path: Path, fixtures: Path, name: str) -> None:
    source, target = fixtures / "geotiff" / name, tmp_path / "a.tif"
    convert_image(source, target, tile=128, compression="zstd")
    with rasterio.open(source) as before, rasterio.open(target) as after:
        if name == "cogeo.tif":  # JPEG, which rasterio 1.4 decodes less exactly
            np.testing.assert_array_equal(pixels_of(target), pixels_of(source))
        else:
            np.testing.assert_array_equal(after.read(), before.read())
        np.testing.assert_equal(after.nodata, before.nodata)
        assert after.crs == before.crs
        np.testing.assert_allclose(after.transform, before.transform)
        assert after.profile["tiled"]
        assert after.descriptions == before.descriptions


def test_overviews_open_as_levels(tmp_path: Path) -> None:
    pixels = noise(300, 200, 3)
    convert_image(ArrayImage(pixels), tmp_path / "a.tif", tile=64)
    image = open_image(tmp_path / "a.tif")
    assert [level[:2] for level in image.levels] == [(200, 300), (100, 150), (50, 75), (25, 38)]
    means = pixels.reshape(150, 2, 100, 2, 3).astype(int).sum((1, 3))
    np.testing.assert_array_equal(image.read(0, 0, 100, 150, level=1), (means + 2) // 4)


def test_bands_are_read_once(tmp_path: Path) -> None:
    image = ArrayImage(noise(300, 200, 5, "uint16"))
    image.band_names, image.mpp = ("a", "b", "c", "d", "e"), (0.5, 0.5)
    convert_image(image, tmp_path / "a.tif", tile=64)
    assert image.times_read().min() == image.times_read().max() == 1
    assert {window[1] % 64 for window in image.windows} == {0}
    np.testing.assert_array_equal(pixels_of(tmp_path / "a.tif"), image.arrays[0])
    with rasterio.open(tmp_path / "a.tif") as file:
        assert file.descriptions == image.band_names
    assert open_image(tmp_path / "a.tif").mpp == pytest.approx((0.5, 0.5))


def test_masks_become_nodata(tmp_path: Path) -> None:
    mask = np.ones((100, 80), bool)
    mask[10:20, 30:40] = False
    image: Image = ArrayImage(noise(100, 80, 3), masks=(mask,))
    with pytest.raises(ImageError, match="nodata"):
        convert_image(image, tmp_path / "a.tif", tile=64)
    assert not names(tmp_path)
    convert_image(image, tmp_path / "a.tif", tile=64, nodata=255)
    assert not open_image(tmp_path / "a.tif").validity(0, 0, 80, 100)[~mask].any()
    image = ArrayImage(noise(100, 80).astype(np.float32), masks=(mask,))
    convert_image(image, tmp_path / "b.tif", tile=64)
    np.testing.assert_array_equal(open_image(tmp_path / "b.tif").validity(0, 0, 80, 100), mask)


def test_the_source_is_not_overwritten(tmp_path: Path) -> None:
    source = save(tmp_path / "a.png", pictures()["L"])
    before = source.read_bytes()
    with pytest.raises(ImageError, match="same file"):
        convert_image(source, source)
    assert source.read_bytes() == before


def test_missing_source(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="cannot be opened"):
        convert_image(tmp_path / "no.png", tmp_path / "a.tif")


def test_memory_of_a_large_png(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """24 MB of pixels in less than the stated four rows of tiles."""
    w, h, tile = 2000, 4000, 64
    first = bytes([1]) + bytes(range(256)) * (3 * w // 256 + 1)
    data = zlib.compress(first[: 1 + 3 * w] + (bytes([2]) + bytes(3 * w)) * (h - 1), 1)
    header = w.to_bytes(4) + h.to_bytes(4) + bytes([8, 2, 0, 0, 0])
    (tmp_path / "a.png").write_bytes(png(chunk(b"IHDR", header), chunk(b"IDAT", data)))
    monkeypatch.setattr(png_rows, "_DECODED_BYTES", 1 << 16)
    tracemalloc.start()
    convert_image(tmp_path / "a.png", tmp_path / "a.tif", tile=tile)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * w * tile * 3 + (1 << 20)
    last = pixels_of(tmp_path / "a.tif")[-1].ravel()
    np.testing.assert_array_equal(last[3:] - last[:-3], np.frombuffer(first, np.uint8)[1:][3 : 3 * w])
    with pytest.raises(ImageError, match="allow more, or use smaller tiles"):
        convert_image(tmp_path / "a.png", tmp_path / "a.tif", max_memory_gib=0.001)
