"""Broken and hostile files: an ImageError or pixels, in bounded memory; nothing else, and no crash."""

from __future__ import annotations

import contextlib
import struct
import subprocess
import sys
import tracemalloc
import warnings
from collections.abc import Callable
from pathlib import Path

import imagecodecs
import numpy as np
import PIL.Image
import pytest
import tifffile

from gigaxt.errors import ImageError
from gigaxt.image import Image, open_image
from gigaxt.image.tiff import TiffImage

PIXELS = np.random.default_rng(0).integers(0, 255, (70, 90, 3), dtype=np.uint8)


def tiff(path: Path, **options: object) -> bytes:
    settings: dict[str, object] = {"photometric": "rgb", "tile": (32, 32)} | options
    tifffile.imwrite(path, PIXELS, **settings)
    return path.read_bytes()


def read_all(path: Path) -> np.ndarray | None:
    """The pixels, or None for an ImageError; any other exception fails the test."""
    message = ""
    try:
        image = open_image(path, max_pixels=1 << 24, max_tile_bytes=1 << 22)
        for level, size in enumerate(image.levels):
            image.validity(0, 0, min(size.width, 200), min(size.height, 200), level)
        return image.read(0, 0, min(image.width, 200), min(image.height, 200))
    except ImageError as error:
        message = str(error)
    assert "\n" not in message
    assert str(path) in message
    return None


MAKERS: dict[str, Callable[[Path], bytes]] = {
    "jpeg": lambda path: tiff(path, compression="jpeg"),
    "zstd": lambda path: tiff(path, compression="zstd"),
    "lzw strips": lambda path: tiff(path, tile=None, rowsperstrip=8, compression="lzw", predictor=True),
    "raw strips": lambda path: tiff(path, tile=None, rowsperstrip=8),
    "big": lambda path: tiff(path, bigtiff=True, compression="jpeg2000"),
}


@pytest.mark.parametrize("maker", MAKERS.values(), ids=MAKERS.keys())
def test_cut_anywhere(tmp_path: Path, maker: Callable[[Path], bytes]) -> None:
    path = tmp_path / "a.tif"
    data = maker(path)
    step = max(1, len(data) // 120)
    for length in [*range(0, min(len(data), 60)), *range(60, len(data), step)]:
        path.write_bytes(data[:length])
        read_all(path)
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ImageError, match=r"truncated|cut off|no image"):
        open_image(path)


@pytest.mark.parametrize("maker", MAKERS.values(), ids=MAKERS.keys())
def test_random_bytes(tmp_path: Path, maker: Callable[[Path], bytes]) -> None:
    path = tmp_path / "a.tif"
    data = maker(path)
    rng = np.random.default_rng(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for number in range(150):
            broken = bytearray(data)
            if number % 3:  # some bytes of the header and directories
                for place in rng.integers(0, min(len(data), 600), rng.integers(1, 5)):
                    broken[place] = rng.integers(0, 256)
            else:  # a stretch of the pixels
                start = int(rng.integers(8, len(data)))
                broken[start : start + 40] = rng.bytes(len(broken[start : start + 40]))
            path.write_bytes(broken)
            read_all(path)


@pytest.mark.parametrize("codec", ["jpeg", "zstd", "zlib", "lzw", "jpeg2000", "webp", "png"])
def test_random_bytes_inside_a_tile_are_noticed(tmp_path: Path, codec: str) -> None:
    path = tmp_path / "a.tif"
    data = bytearray(tiff(path, compression=codec))
    image = open_image(path)
    assert isinstance(image, TiffImage)
    plane = image._planes[0][0]
    start, count = int(plane.offsets[4]), int(plane.counts[4])
    data[start : start + count] = np.random.default_rng(1).bytes(count)
    path.write_bytes(data)
    broken = open_image(path)
    np.testing.assert_array_equal(broken.read(0, 0, 32, 32), image.read(0, 0, 32, 32))  # the others still read
    with pytest.raises(ImageError, match=r"\(level 0, tile at x 32, y 32, 32 x 32 px\): \w+: "):
        broken.read(20, 20, 30, 30)


def patched(data: bytes, code: int, value: int) -> bytes:
    """A little-endian classic TIFF with another (LONG, inline) value of a tag in its first directory."""
    (offset,) = struct.unpack_from("<I", data, 4)
    (count,) = struct.unpack_from("<H", data, offset)
    for at in range(offset + 2, offset + 2 + 12 * count, 12):
        if struct.unpack_from("<H", data, at)[0] == code:
            return data[: at + 2] + struct.pack("<HII", 4, 1, value) + data[at + 12 :]
    raise AssertionError(f"no tag {code}")


@pytest.mark.parametrize(
    ("values", "cause"),
    [
        ({256: 2**31 - 1, 257: 2**31 - 1}, "expected at most 17179869184 px, got 2147483647 x 2147483647"),
        ({256: 131_072, 257: 131_072}, "expected 16777216 tiles or strips, its table has 9"),
        ({322: 65_520, 323: 65_520}, "expected tiles of at most 67108864 bytes, got 65520 x 65520 px"),
        ({322: 8192, 323: 8192}, "expected tiles of at most 67108864 bytes decoded, got 201326592"),
        ({322: 0}, "flat image|tiles or strips of 1 px|cannot be read|table has"),
        ({256: 0}, "expected a flat image, got 0 x 70"),
    ],
)
def test_absurd_headers(tmp_path: Path, values: dict[int, int], cause: str) -> None:
    path = tmp_path / "a.tif"
    data = tiff(path, compression="jpeg")
    for code, value in values.items():
        data = patched(data, code, value)
    path.write_bytes(data)
    with pytest.raises(ImageError, match=cause):
        open_image(path)


def test_byte_counts_beyond_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, PIXELS[:32, :32], photometric="rgb", tile=(32, 32), compression="jpeg")
    path.write_bytes(patched(path.read_bytes(), 325, 2**31))
    with pytest.raises(ImageError, match="a tile or strip of 2147483648 bytes for 3072: the file is corrupt"):
        open_image(path)


@pytest.mark.parametrize("length", [1, 2, 150])
def test_loop_of_directories(tmp_path: Path, length: int) -> None:
    path = tmp_path / "a.tif"
    with tifffile.TiffWriter(path) as writer:
        for _ in range(length):
            writer.write(PIXELS[:16, :16], photometric="rgb", metadata=None)
    with tifffile.TiffFile(path) as read:
        first, last = read.pages[0].offset, read.pages[len(read.pages) - 1].offset
    data = bytearray(path.read_bytes())
    (count,) = struct.unpack_from("<H", data, last)
    struct.pack_into("<I", data, last + 2 + 12 * count, first)
    path.write_bytes(data)
    with pytest.raises(ImageError, match="leads back to an earlier one"):
        open_image(path)


def replaced_tile(path: Path, stream: bytes, **options: object) -> Image:
    """A file whose only tile is `stream`."""
    tifffile.imwrite(path, PIXELS[:32, :32], photometric="rgb", tile=(32, 32), **options)
    with tifffile.TiffFile(path) as read:
        offset, count_tag = read.pages[0].dataoffsets[0], 325
    data = path.read_bytes()
    end = len(data)
    path.write_bytes(patched(patched(data, 324, end), count_tag, len(stream)) + stream)
    assert offset
    return open_image(path)


@pytest.mark.parametrize("codec", ["jpeg8", "jpeg2k", "png", "webp", "zlib", "zstd", "lzw", "lzma"])
def test_streams_that_decode_to_much_more(tmp_path: Path, codec: str) -> None:
    """A tile of 32 px whose stream holds 4096 px: refused before it is decoded, or cut while it is."""
    huge = np.zeros((4096, 4096, 3), np.uint8)
    name = {"jpeg8": "jpeg", "jpeg2k": "jpeg2000"}.get(codec, codec)
    encode = getattr(imagecodecs, f"{codec}_encode")
    stream = encode(huge if codec in ("jpeg8", "png", "webp", "jpeg2k") else huge.tobytes())
    image = replaced_tile(tmp_path / "a.tif", stream, compression=name)
    tracemalloc.start()
    if codec in ("jpeg8", "jpeg2k", "png", "webp"):  # these would believe the stream
        with pytest.raises(ImageError, match="expected at most 32 x 32 x 3, its stream says 4096 x 4096"):
            image.read(0, 0, 32, 32)
    else:
        with contextlib.suppress(ImageError):
            image.read(0, 0, 32, 32)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20


HUGE_SCRIPT = """
import resource, struct, sys
from gigaxt.errors import ImageError
from gigaxt.image import open_image
base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sys.argv[1:]:
    try:
        open_image(path)
        print("opened", path)
    except ImageError as error:
        print(error)
print("KiB", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base)
"""


def test_absurd_headers_in_a_fresh_process(tmp_path: Path) -> None:
    """No crash of the process, nothing on stderr, and no memory to speak of."""
    data = tiff(tmp_path / "good.tif", compression="jpeg")
    files = {
        "tiles.tif": patched(patched(data, 322, 65_520), 323, 65_520),
        "size.tif": patched(patched(data, 256, 2**31 - 1), 257, 2**31 - 1),
        "zero.tif": b"",
        "random.tif": b"II*\0" + np.random.default_rng(0).bytes(5000),
        "cut.tif": data[:2000],
        "huge.png": imagecodecs.png_encode(np.zeros((1, 1), np.uint8)).replace(
            struct.pack(">II", 1, 1), struct.pack(">II", 2**31 - 1, 2**31 - 1)
        ),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    command = [sys.executable, "-c", HUGE_SCRIPT, *(str(tmp_path / name) for name in files)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    lines = done.stdout.strip().splitlines()
    assert done.stderr == ""
    assert len(lines) == len(files) + 1
    assert not any(line.startswith("opened") for line in lines)
    assert int(lines[-1].split()[1]) < 30_000


def test_told_by_bytes_not_by_name(tmp_path: Path) -> None:
    path = tmp_path / "picture.tif"
    PIL.Image.fromarray(PIXELS).save(path, format="PNG")
    np.testing.assert_array_equal(open_image(path).read(0, 0, 90, 70), PIXELS)
    path = tmp_path / "scene.png"
    tiff(path)
    np.testing.assert_array_equal(open_image(path).read(0, 0, 90, 70), PIXELS)


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (b"", "got an empty file"),
        (b"image,label\na.tif,1\n", "got text"),
        (b"\xc8\xc9" * 99, "got a file that starts with"),
        (b"II*\0", "expected a TIFF file, got 4 bytes"),
        (b"\x89HDF\r\n\x1a\n" + bytes(500), "got hdf5"),
    ],
)
def test_no_image(tmp_path: Path, content: bytes, cause: str) -> None:
    path = tmp_path / "a.tif"
    path.write_bytes(content)
    with pytest.raises(ImageError, match=cause):
        open_image(path)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="cannot be opened: No such file"):
        open_image(tmp_path / "missing.tif")
    with pytest.raises(ImageError, match="a folder that is no OME-Zarr"):
        open_image(tmp_path)
    with pytest.raises(ImageError, match="expected a path, an array, a tensor or an Image"):
        open_image(42)


def test_file_that_shrinks_after_opening(tmp_path: Path) -> None:
    for options in ({"compression": "zlib"}, {"tile": None, "rowsperstrip": 8}):
        path = tmp_path / "a.tif"
        data = tiff(path, **options)
        image = open_image(path)
        with path.open("r+b") as file:
            file.truncate(len(data) // 3)
        with pytest.raises(ImageError, match="it is truncated"):
            image.read(0, 0, 90, 70)


def test_paths_that_cannot_be_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that no file can have; a folder that may not be read, which to root would be like any other."""
    with pytest.raises(ImageError, match="cannot be opened: File name too long"):
        open_image(tmp_path / ("x" * 300 + ".tif"))
    with pytest.raises(ImageError, match="cannot be opened: embedded null byte"):
        open_image("a\0b.tif")

    def denied(path: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "is_file", denied)
    with pytest.raises(ImageError, match=f"{tmp_path}: cannot be opened: Permission denied"):
        open_image(tmp_path)


@pytest.mark.parametrize("share", [0.5, 0.9])
def test_a_jpeg_tile_without_its_end_is_refused(tmp_path: Path, share: float) -> None:
    """libjpeg would fill up what is missing, and say so to nobody."""
    path = tmp_path / "cut.tif"
    tiff(path, compression="jpeg")
    with tifffile.TiffFile(path, mode="r+b") as file:
        counts = list(file.pages[0].databytecounts)
        counts[4] = int(share * counts[4])
        file.pages[0].tags["TileByteCounts"].overwrite(counts)
    image = open_image(path)
    image.read(0, 0, 32, 32)
    with pytest.raises(ImageError, match="cut short: it has no end"):
        image.read(32, 32, 32, 32)


def test_a_jpeg_tile_may_be_filled_up(tmp_path: Path) -> None:
    """As writers do that give each tile the same room."""
    path = tmp_path / "filled.tif"
    tiles = [imagecodecs.jpeg8_encode(PIXELS[:32, :32], level=90) + bytes(500)]
    tifffile.imwrite(
        path, iter(tiles), shape=(32, 32, 3), dtype=np.uint8, tile=(32, 32), photometric="ycbcr", compression="jpeg"
    )
    expected = imagecodecs.jpeg8_decode(tiles[0])
    np.testing.assert_array_equal(open_image(path).read(0, 0, 32, 32), expected)
