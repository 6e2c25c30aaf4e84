"""PNG, JPEG, BMP and WebP through Pillow."""

from __future__ import annotations

import pickle
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import imagecodecs
import numpy as np
import PIL.Image
import pytest

from gigaxt.errors import ImageError
from gigaxt.image import open_image

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 255, (40, 52, 3), dtype=np.uint8)


@pytest.mark.parametrize("suffix", ["png", "bmp", "webp"])
def test_lossless(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    PIL.Image.fromarray(RGB).save(path, **({"lossless": True} if suffix == "webp" else {}))
    image = open_image(path)
    assert (image.height, image.width, image.channels, image.dtype) == (40, 52, 3, np.uint8)
    np.testing.assert_array_equal(image.read(-2, 30, 20, 20)[:10, 2:], RGB[30:, :18])
    image.read(0, 0, 9, 9)[...] = 0  # the kept pixels are not handed out
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(image)).read(0, 0, 52, 40), RGB)
    np.testing.assert_array_equal(image.read(0, 0, 52, 40), RGB)


def test_jpeg_with_orientation(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    exif = PIL.Image.Exif()
    exif[274] = 6
    PIL.Image.fromarray(RGB).save(path, exif=exif)
    image = open_image(path)
    assert image.orientation == 6
    np.testing.assert_array_equal(image.read(0, 0, 52, 40), np.asarray(PIL.Image.open(path)))


@pytest.mark.parametrize(
    ("mode", "channels", "dtype"),
    [("1", 1, "uint8"), ("L", 1, "uint8"), ("LA", 2, "uint8"), ("RGBA", 4, "uint8"), ("I;16", 1, "uint16")],
)
def test_png_modes(tmp_path: Path, mode: str, channels: int, dtype: str) -> None:
    path = tmp_path / "a.png"
    if mode == "I;16":
        picture = PIL.Image.fromarray(RNG.integers(0, 60_000, (40, 52)).astype(np.uint16))
    else:
        picture = PIL.Image.fromarray(RGB).convert(mode)
    picture.save(path)
    image = open_image(path)
    assert (image.channels, image.dtype) == (channels, np.dtype(dtype))
    expected = np.asarray(picture).reshape(40, 52, channels).astype(dtype)
    np.testing.assert_array_equal(image.read(0, 0, 52, 40), expected)


@pytest.mark.parametrize("channels", [2, 3, 4])
def test_deep_colour_stays_deep(tmp_path: Path, channels: int) -> None:
    path, data = tmp_path / "a.png", RNG.integers(0, 60_000, (40, 52, channels)).astype(np.uint16)
    path.write_bytes(imagecodecs.png_encode(data))
    image = open_image(path)
    assert image.dtype == np.uint16
    np.testing.assert_array_equal(image.read(0, 0, 52, 40), data)


def test_palette_gives_indices(tmp_path: Path) -> None:
    path, classes = tmp_path / "mask.png", RNG.integers(0, 5, (40, 52), dtype=np.uint8)
    picture = PIL.Image.frombytes("P", (52, 40), classes.tobytes())
    picture.putpalette(bytes(range(255, 240, -1)))
    picture.save(path)
    np.testing.assert_array_equal(open_image(path).read(0, 0, 52, 40)[..., 0], classes)


def header_only_png(width: int, height: int) -> bytes:
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))


@pytest.mark.parametrize(("width", "height"), [(8001, 8000), (60_000, 60_000), (2**31 - 1, 2**31 - 1)])
def test_too_large_names_the_command(tmp_path: Path, width: int, height: int) -> None:
    path = tmp_path / "big.png"
    path.write_bytes(header_only_png(width, height))
    with pytest.raises(ImageError, match="expected at most 64000000 px") as caught:
        open_image(path)
    assert f"gigaxt convert {path} {tmp_path / 'big.tif'}" in str(caught.value)
    path = tmp_path / "big.jpg"
    PIL.Image.fromarray(RGB).save(path)
    with pytest.raises(ImageError, match="gigaxt convert"):
        open_image(path, max_pixels=2000)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp"])
def test_truncated_and_random(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    PIL.Image.fromarray(RGB).save(path)
    data = path.read_bytes()
    for length in range(1, len(data) - 2, max(1, len(data) // 60)):
        path.write_bytes(data[:length])
        with pytest.raises(ImageError) as caught:
            open_image(path).read(0, 0, 52, 40)
        assert "\n" not in str(caught.value)
    for _ in range(60):
        broken = bytearray(data)
        for place in RNG.integers(0, len(data), 3):
            broken[place] = RNG.integers(0, 256)
        path.write_bytes(broken)
        try:
            image = open_image(path)
            image.read(0, 0, image.width, image.height)
        except ImageError:
            continue


def test_threads_decode_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.png"
    PIL.Image.fromarray(RGB).save(path)
    image = open_image(path)
    decoded = []
    decode = type(image)._decode
    monkeypatch.setattr(type(image), "_decode", lambda self: decoded.append(1) or decode(self))
    with ThreadPoolExecutor(8) as pool:
        parts = list(pool.map(lambda x: image.read(x, 0, 10, 40), range(40)))
    assert all(np.array_equal(part, RGB[:, x : x + 10]) for x, part in enumerate(parts))
    assert len(decoded) == 1
