"""Few reads for what lies together in a file: counted at the system call, pixels against those of the whole."""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import tifffile

from gigaxt.augment import colour_augmented, dihedral
from gigaxt.errors import ImageError
from gigaxt.image import Image, open_bands, open_image
from gigaxt.image.cache import FETCHED, SEGMENTS
from gigaxt.image.ranges import runs, span
from gigaxt.image.tiff_pieces import MOST_AHEAD
from gigaxt.image.views import Cropped, resample
from gigaxt.scenes.batch import SceneBatch
from gigaxt.scenes.inputs import InputConfig

TILE, H, W = 32, 200, 330
PIXELS = np.random.default_rng(0).integers(0, 255, (H, W, 3), dtype=np.uint8)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(offset, count) of each positional read."""
    found: list[tuple[int, int]] = []
    pread, preadv = os.pread, os.preadv

    def counting(number: int, count: int, offset: int) -> bytes:
        found.append((offset, count))
        return pread(number, count, offset)

    def counting_into(number: int, buffers: list[memoryview], offset: int) -> int:
        found.append((offset, len(buffers[0])))
        return preadv(number, buffers, offset)

    monkeypatch.setattr(os, "pread", counting)
    monkeypatch.setattr(os, "preadv", counting_into)
    FETCHED.clear()
    SEGMENTS.clear()
    return found


def tiled(path: Path, pixels: np.ndarray = PIXELS, **options: object) -> Path:
    settings: dict[str, object] = {"tile": (TILE, TILE), "compression": "zlib"} | options
    tifffile.imwrite(path, pixels, **settings)
    return path


def test_runs_cover_all_parts_within_their_bounds() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        parts = [(int(a), int(b)) for a, b in zip(rng.integers(0, 900, 30), rng.integers(1, 90, 30), strict=True)]
        found = runs(parts, gap=10, most=200)
        assert sorted(index for run in found for index in run) == list(range(30))
        spans = [span(parts, run) for run in found]
        for run, (start, count) in zip(found, spans, strict=True):
            assert count <= 200
            assert all(start <= parts[i][0] and sum(parts[i]) <= start + count for i in run)
            wanted = np.zeros(1000, bool)
            for i in run:
                wanted[parts[i][0] : sum(parts[i])] = True
            holes = "".join("x" if byte else "." for byte in wanted[start : start + count]).split("x")
            assert max(map(len, holes)) <= 10
        for (start, count), (after, _) in pairwise(spans):  # what could go together does
            assert after - (start + count) > 10 or after + 1 - start > 200 - 90
    assert runs([]) == []
    assert runs([(0, 5), (5, 5), (21, 5)], gap=10) == [[0, 1], [2]]
    assert runs([(0, 500)], most=10) == [[0]]


@pytest.mark.parametrize(
    "options", [{}, {"planarconfig": "separate"}, {"compression": None}, {"tile": None, "rowsperstrip": 8}]
)
def test_a_window_of_many_tiles_is_one_read(
    tmp_path: Path, reads: list[tuple[int, int]], options: dict[str, object]
) -> None:
    pixels = np.moveaxis(PIXELS, 2, 0) if options.get("planarconfig") else PIXELS
    path = tiled(tmp_path / "a.tif", pixels, photometric="rgb", **options)
    image = open_image(path)
    reads.clear()
    np.testing.assert_array_equal(image.read(10, 20, 250, 130), PIXELS[20:150, 10:260])
    assert len(reads) == 1
    assert reads[0][1] <= path.stat().st_size


def test_far_tiles_are_read_apart(
    tmp_path: Path, reads: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gigaxt.image.tiff_pieces.runs", lambda parts: runs(parts, gap=0))
    image = open_image(tiled(tmp_path / "a.tif"))
    reads.clear()
    np.testing.assert_array_equal(image.read(33, 33, 60, 90), PIXELS[33:123, 33:93])
    assert len(reads) == 3  # rows of two tiles each


def test_missing_tiles_and_shared_tiles(tmp_path: Path, reads: list[tuple[int, int]]) -> None:
    path = tiled(tmp_path / "a.tif")
    with tifffile.TiffFile(path, mode="r+b") as tiff:
        tags = tiff.pages[0].tags
        offsets, counts = list(tags[324].value), list(tags[325].value)
        counts[1] = 0  # left out
        offsets[2], counts[2] = offsets[0], counts[0]  # the same bytes twice, as in test images that are small on disk
        tags[325].overwrite(counts)
        tags[324].overwrite(offsets)
    image = open_image(path)
    expected = PIXELS[:32, :128].copy()
    expected[:, 32:64] = 0
    expected[:, 64:96] = PIXELS[:32, :32]
    reads.clear()
    np.testing.assert_array_equal(image.read(0, 0, 128, 32), expected)
    assert len(reads) == 1


def test_an_error_names_the_tile_that_it_is_about(tmp_path: Path) -> None:
    path = tiled(tmp_path / "a.tif")
    image = open_image(path)
    with tifffile.TiffFile(path) as tiff:
        end = tiff.pages[0].dataoffsets[3] + 5
    with path.open("r+b") as file:
        file.truncate(end)
    image.expect([(0, 0, 64, 32), (64, 0, 64, 32)])  # tells nothing
    np.testing.assert_array_equal(image.read(0, 0, 96, 32), PIXELS[:32, :96])
    with pytest.raises(ImageError, match=r"tile at x 96, y 0.*truncated"):
        image.read(0, 0, 320, 32)


VIEWS: dict[str, Callable[[Image], Image]] = {
    "as it is": lambda image: image,
    "bands": lambda image: image.select([2, 0]),
    "crop": lambda image: Cropped(image, 33, 21, 250, 130),
    "smaller": lambda image: resample(image, 1.5),
    "larger": lambda image: resample(image, 0.7),
    "colour": lambda image: colour_augmented(image, [1, 1, 1], [0, 0, 0]),
    "turned crop of bands": lambda image: dihedral(Cropped(image.select([1]), 33, 21, 250, 130), 5),
    **{f"turn {k}": (lambda image, k=k: dihedral(image, k)) for k in range(1, 8)},
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS.keys())
def test_announced_windows_are_read_together_through_views(
    tmp_path: Path, reads: list[tuple[int, int]], view: Callable[[Image], Image]
) -> None:
    path = tiled(tmp_path / "a.tif", photometric="rgb")
    image = view(open_image(path))
    windows = [(-5, -7, 40, 50), (35, 40, 33, 33), (70, 60, 30, 60), (image.width - 20, 5, 40, 30)]
    plain = [image.read(*window) for window in windows]
    SEGMENTS.clear()
    reads.clear()
    image.expect(windows)
    assert len(reads) == 1
    for window, pixels in zip(windows, plain, strict=True):
        np.testing.assert_array_equal(image.read(*window), pixels)
    assert len(reads) == 1


def test_a_file_for_each_band_is_announced(tmp_path: Path, reads: list[tuple[int, int]]) -> None:
    paths = [tiled(tmp_path / f"{band}.tif", PIXELS[..., band]) for band in range(3)]
    image = open_bands(paths)
    reads.clear()
    image.expect([(0, 0, 60, 60), (60, 0, 60, 60)])
    np.testing.assert_array_equal(image.read(0, 0, 120, 60), PIXELS[:60, :120])
    assert len(reads) == 3


def test_bands_apart_are_announced_alone(tmp_path: Path, reads: list[tuple[int, int]]) -> None:
    path = tiled(tmp_path / "a.tif", np.moveaxis(PIXELS, 2, 0), planarconfig="separate", photometric="rgb")
    image = open_image(path).select([1])
    reads.clear()
    image.expect([(0, 0, W, 32), (0, 32, W, 64)])
    assert len(reads) == 1
    assert reads[0][1] < path.stat().st_size / 3


def test_a_mask_is_announced_too(tmp_path: Path, reads: list[tuple[int, int]]) -> None:
    path = tmp_path / "a.tif"
    with tifffile.TiffWriter(path) as tiff:
        tiff.write(PIXELS, tile=(32, 32), compression="zlib", photometric="rgb")
        tiff.write(
            PIXELS[..., 0] > 99, tile=(32, 32), compression="zlib", subfiletype=4, photometric="mask", dtype="bool"
        )
    image = open_image(path)
    reads.clear()
    image.expect([(0, 0, 60, 60), (60, 0, 60, 60)])
    _, valid = image.read_valid(0, 0, 120, 60)
    np.testing.assert_array_equal(valid, PIXELS[:60, :120, 0] > 99)
    assert len(reads) <= 2


def test_announcing_changes_nothing(tmp_path: Path, reads: list[tuple[int, int]]) -> None:
    image = open_image(tiled(tmp_path / "a.tif"))
    reads.clear()
    image.expect([(5, 5, 40, 40)], level=7)
    image.expect([(-50, 0, 40, 40), (0, 900, 5, 5)])
    image.expect([])
    assert not reads
    open_image(PIXELS).expect([(0, 0, 5, 5), (9, 9, 5, 5)])


def test_what_is_fetched_ahead_is_bounded(tmp_path: Path, reads: list[tuple[int, int]]) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (2048, 4096, 3), dtype=np.uint8)  # 24 MiB
    image = open_image(tiled(tmp_path / "a.tif", pixels, tile=(256, 256), compression=None, photometric="rgb"))
    reads.clear()
    windows = [(x, 0, 256, 2048) for x in range(0, 4096, 256)]
    image.expect(windows)
    assert FETCHED.bytes <= MOST_AHEAD
    assert sum(count for _, count in reads) <= 2 * MOST_AHEAD
    for number in range(8):
        image.expect([(x, number * 256, 256, 256) for x in range(0, 4096, 256)])
        assert FETCHED.bytes <= FETCHED.limit
    np.testing.assert_array_equal(image.read(0, 0, 4096, 2048), pixels)


@pytest.mark.parametrize("halo", [0, 32])
def test_a_chunk_of_regions_is_one_read(tmp_path: Path, reads: list[tuple[int, int]], halo: int) -> None:
    image = open_image(tiled(tmp_path / "a.tif", photometric="rgb"))
    config = InputConfig(mean=[0.0] * 3, std=[1.0] * 3, halo=halo)
    batch = SceneBatch([image], config, region=96, channels=3, tokens_per_core=2)
    chunk = batch.chunks(6)[1]
    reads.clear()
    loaded = batch.load(chunk)["pixels"].numpy()
    assert len(reads) == 1
    padded = np.pad(PIXELS, ((32, 99), (32, 99), (0, 0)))
    for pixels, (_, _, place) in zip(loaded, chunk.places, strict=True):
        x, y, w, h = batch.scenes[0].grid.window_xywh(place)
        np.testing.assert_array_equal(pixels, padded[y + 32 : y + 32 + h, x + 32 : x + 32 + w])
