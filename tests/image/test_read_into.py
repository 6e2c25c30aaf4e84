"""Many windows read at once against the numbers of an image whose pixels are all different."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tifffile

from gigaxt.augment import colour_augmented, dihedral
from gigaxt.errors import ImageError
from gigaxt.image import Image, open_bands, open_image
from gigaxt.image.base import Window, copy_pixels
from gigaxt.image.cache import FETCHED, SEGMENTS
from gigaxt.image.tiff_index import Plane
from gigaxt.image.views import Cropped, resample

TILE, H, W = 32, 200, 330
NUMBERS = np.arange(H * W * 3, dtype=np.uint32).reshape(H, W, 3)
ALIGNED = [(col * TILE, row * TILE, TILE, TILE) for row in range(5) for col in range(9)]
HALOS = [(x - 8, y - 8, 48, 48) for x, y, _, _ in ALIGNED]
ODD = [(3, 5, 1, 1), (31, 31, 2, 2), (0, 0, W, H), (100, 7, 33, 90), (64, 32, 32, 64), (3, 5, 40, 7)]
BORDER = [(-7, -9, 30, 20), (W - 5, H - 3, 32, 32), (W - 20, 40, 64, 32), (-50, 0, 20, 20), (-10, -10, W + 20, H + 20)]
WINDOWS = {"aligned": ALIGNED, "halo": HALOS, "odd": ODD, "border": BORDER, "none": []}


@pytest.fixture(autouse=True)
def _forget() -> None:
    SEGMENTS.clear()
    FETCHED.clear()


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of each segment that is decoded."""
    found: list[int] = []
    decode = Plane.decode

    def counting(plane: Plane, data: bytes, index: int) -> np.ndarray:
        found.append(index)
        return decode(plane, data, index)

    monkeypatch.setattr(Plane, "decode", counting)
    return found


def stored(path: Path, pixels: np.ndarray = NUMBERS, **options: object) -> Image:
    tifffile.imwrite(path, pixels, **({"tile": (TILE, TILE), "compression": "zlib", "photometric": "rgb"} | options))
    return open_image(path)


def read_all(image: Image, windows: list[Window], level: int = 0) -> list[np.ndarray]:
    out = [np.full((h, w, image.channels), 77, image.dtype) for _, _, w, h in windows]
    image.read_into(out, windows, level)
    return out


def part_of(pixels: np.ndarray, x: int, y: int, w: int, h: int, fill: float = 0) -> np.ndarray:
    far = 400
    padded = np.pad(pixels, ((far, far), (far, far), (0, 0)), constant_values=fill)
    return padded[y + far : y + far + h, x + far : x + far + w]


@pytest.mark.parametrize("windows", WINDOWS.values(), ids=WINDOWS.keys())
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"planarconfig": "separate"},
        {"compression": None},
        {"tile": None, "rowsperstrip": 7},
        {"tile": None, "compression": None},
        {"tile": None, "compression": None, "byteorder": ">"},
        {"tile": None, "compression": None, "planarconfig": "separate"},
    ],
)
def test_every_layout(tmp_path: Path, options: dict[str, object], windows: list[Window]) -> None:
    pixels = np.moveaxis(NUMBERS, 2, 0) if options.get("planarconfig") else NUMBERS
    image = stored(tmp_path / "a.tif", pixels, **options)
    for found, window in zip(read_all(image, windows), windows, strict=True):
        np.testing.assert_array_equal(found, part_of(NUMBERS, *window))


VIEWS: dict[str, Callable[[Image], Image]] = {
    "bands": lambda image: image.select([2, 0]),
    "bands of bands": lambda image: image.select([2, 0]).select([1]),
    "crop": lambda image: Cropped(image, 33, 21, 250, 130),
    "smaller": lambda image: resample(image, 1.5),
    "colour": lambda image: colour_augmented(image, [1, 1, 1], [0, 0, 0]),
    "turned crop of bands": lambda image: dihedral(Cropped(image.select([1, 2]), 33, 21, 250, 130), 5),
    "bands of a turn": lambda image: dihedral(image, 6).select([1]),
    "stacked": lambda image: open_bands([image, image.select([1])], names=list("abcd")),
    **{f"turn {k}": (lambda image, k=k: dihedral(image, k)) for k in range(1, 8)},
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS.keys())
@pytest.mark.parametrize("of_file", [True, False])
def test_views(tmp_path: Path, view: Callable[[Image], Image], of_file: bool) -> None:
    image = view(stored(tmp_path / "a.tif") if of_file else open_image(NUMBERS))
    whole = image.read(0, 0, image.width, image.height)
    assert len(np.unique(whole[..., 0])) > whole[..., 0].size / 2
    windows = [*HALOS, *ODD[:2], *BORDER]
    for found, window in zip(read_all(image, windows), windows, strict=True):
        np.testing.assert_array_equal(found, part_of(whole, *window))


def test_levels_and_nodata(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    numbers, below = NUMBERS[..., 0].astype(np.float32), NUMBERS[::2, ::2, 0].astype(np.float32)
    with tifffile.TiffWriter(path) as tiff:
        nodata = [(42113, "s", 0, "-9999.5", True)]
        tiff.write(numbers, tile=(32, 32), compression="zlib", photometric="minisblack", extratags=nodata)
        tiff.write(below, tile=(32, 32), compression="zlib", photometric="minisblack", subfiletype=1)
    image = open_image(path)
    windows = [(-5, -5, 20, 30), (130, 40, 60, 70), (500, 0, 5, 5)]
    for level, pixels in enumerate([numbers, below]):
        for found, window in zip(read_all(image, windows, level), windows, strict=True):
            np.testing.assert_array_equal(found, part_of(pixels[..., None], *window, fill=-9999.5))


def test_left_out_tiles_in_a_wider_dtype(tmp_path: Path) -> None:
    """What stands for them is rounded as the file would store it, then widened as the pixels are."""
    path = tmp_path / "a.tif"
    pixels = np.random.default_rng(0).random((64, 96), dtype=np.float32)
    nodata = [(42113, "s", 0, "0.1", True)]
    tifffile.imwrite(path, pixels, tile=(32, 32), compression="zlib", extratags=nodata)
    with tifffile.TiffFile(path, mode="r+b") as tiff:
        counts = list(tiff.pages[0].tags[325].value)
        counts[1] = 0
        tiff.pages[0].tags[325].overwrite(counts)
    expected = pixels.copy()
    expected[:32, 32:64] = np.float32(0.1)
    out = np.zeros((70, 100, 1))
    open_image(path).read_into([out], [(0, 0, 100, 70)])
    np.testing.assert_array_equal(out[:64, :96, 0], expected.astype(np.float64))
    assert (out[64:] == np.float64(np.float32(0.1))).all()


@pytest.mark.parametrize("k", range(8))
def test_each_tile_is_decoded_once(tmp_path: Path, decoded: list[int], monkeypatch: pytest.MonkeyPatch, k: int) -> None:
    monkeypatch.setattr(SEGMENTS, "limit", 0)  # nothing is remembered from window to window
    image = dihedral(stored(tmp_path / "a.tif"), k)
    read_all(image, [(x - 8, y - 8, 48, 48) for y in range(0, image.height, 32) for x in range(0, image.width, 32)])
    assert sorted(decoded) == list(range(7 * 11))


def test_what_the_next_windows_may_need_is_kept(tmp_path: Path, decoded: list[int]) -> None:
    image = stored(tmp_path / "a.tif")
    read_all(image, [(0, 0, 48, 32), (64, 0, 32, 32)])
    assert sorted(decoded) == [0, 1, 2]
    read_all(image, [(48, 0, 16, 32), (64, 0, 32, 32)])
    assert sorted(decoded) == [0, 1, 2, 2]  # of tile 1 the half was left; tile 2 was used up


def test_a_jpeg_is_put_into_rows_of_a_stack(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (H, W, 3), dtype=np.uint8)
    image = stored(tmp_path / "a.tif", pixels, compression="jpeg", compressionargs={"level": 90})
    stack = np.zeros((2, len(HALOS), 48, 48, 3), np.uint8)
    image.read_into(list(stack[1]), HALOS)
    SEGMENTS.clear()
    np.testing.assert_array_equal(stack[1], [image.read(*window) for window in HALOS])
    assert not stack[0].any()


def test_two_threads(tmp_path: Path) -> None:
    image = stored(tmp_path / "a.tif")
    expected = [part_of(NUMBERS, *window) for window in HALOS]

    def read(first: int) -> None:
        windows = HALOS[first:] + HALOS[:first]
        for found, right in zip(read_all(image, windows), expected[first:] + expected[:first], strict=True):
            np.testing.assert_array_equal(found, right)

    with ThreadPoolExecutor(2) as executor:
        list(executor.map(read, [0, 5, 20, 11] * 5))


def test_an_error_names_its_tile(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    image = stored(path, NUMBERS.astype(np.uint8), compression="jpeg")
    with tifffile.TiffFile(path) as tiff:
        start = tiff.pages[0].dataoffsets[13]
    with path.open("r+b") as file:
        file.seek(start)
        data = file.read(900)
        at = data.index(b"\xff\xc0") + 5
        file.seek(start + at)
        file.write(b"\x7f\xff\x7f\xff")  # 32,767 px on a side
    with pytest.raises(ImageError, match=r"a\.tif.*tile at x 64, y 32, 32 x 32 px.*at most 32 x 32 x 3.*32767"):
        read_all(image, HALOS)
    read_all(image, [(0, 0, 64, 64)])


def test_what_is_asked_for_is_checked() -> None:
    image = open_image(NUMBERS)
    out = np.empty((5, 4, 3), np.uint32)
    with pytest.raises(ImageError, match="expected a level from 0 to 0, got 1"):
        image.read_into([out], [(0, 0, 4, 5)], level=1)
    with pytest.raises(ImageError, match="expected a window of at least 1 x 1 px, got 0 x 5"):
        image.read_into([out], [(0, 0, 0, 5)])
    with pytest.raises(ImageError, match=r"expected an array of \(4, 5, 3\), got \(5, 4, 3\)"):
        image.read_into([out], [(0, 0, 5, 4)])
    with pytest.raises(ValueError, match="zip"):
        image.read_into([out], [(0, 0, 4, 5)] * 2)


@pytest.mark.parametrize("bands", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("k", range(8))
def test_copies_of_turned_pixels(bands: int, k: int) -> None:
    pixels = np.arange(7 * 9 * bands, dtype=np.uint16).reshape(7, 9, bands)
    turned = dihedral(open_image(pixels), k).read(0, 0, *((7, 9) if k & 4 else (9, 7)))
    target = np.zeros((2 * turned.shape[0], 2 * turned.shape[1], 2 * bands), np.int64)
    view = target[::2, -2::-2, ::2]
    copy_pixels(view, turned)
    np.testing.assert_array_equal(view, turned)
    assert target.sum() == pixels.sum()
