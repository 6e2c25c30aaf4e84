from __future__ import annotations

import math
import random

import pytest

from gigaxt.shapes.coco_masks import area_and_box, decode_runs, to_rle

H, W = 20, 30


def _encode(runs: list[int]) -> str:
    """COCO's compressed text, from its description."""
    text = ""
    for i, run in enumerate(runs):
        value, more = run - (runs[i - 2] if i > 2 else 0), True
        while more:
            group, value = value & 31, value >> 5
            more = value != (-1 if group & 16 else 0)
            text += chr(48 + group + 32 * more)
    return text


def _random_runs(seed: int, pixels: int = H * W) -> list[int]:
    draw = random.Random(seed)
    cuts = sorted(draw.randint(0, pixels) for _ in range(draw.randint(0, 9)))
    return [b - a for a, b in zip([0, *cuts], [*cuts, pixels], strict=True)]


def test_runs_come_back() -> None:
    for seed in range(200):
        runs = _random_runs(seed, 29_000 * 25_000 if seed % 2 else H * W)
        assert decode_runs(_encode(runs)).tolist() == runs
        assert decode_runs(_encode(runs).encode()).tolist() == runs


def test_text_and_numbers_are_the_same_mask() -> None:
    for seed in range(50):
        runs = _random_runs(seed)
        masks = [
            to_rle({"size": [H, W], "counts": counts}, H, W) for counts in (runs, _encode(runs), _encode(runs).encode())
        ]
        assert masks[0] == masks[1] == masks[2]
        assert area_and_box(masks[0])[0] == sum(runs[1::2])


def test_area_and_box() -> None:
    assert area_and_box(to_rle([[2, 3, 12, 3, 12, 8, 2, 8]], H, W)) == (50, [2, 3, 10, 5])
    assert area_and_box(to_rle({"size": [H, W], "counts": [H * W]}, H, W)) == (0, [0, 0, 0, 0])


@pytest.mark.parametrize(
    "counts",
    [
        "",
        "not an rle at all",
        "zzzzzzzzzzzzzzzz",
        "éé",
        b"\xff",
        "o" * 40 + "0",
        "PPPP",
        _encode([10, 20]),
        _encode([10, 20, H * W]),
        _encode([10, -5, H * W - 5]),
        [],
        [10, 20],
        [10, -5, H * W - 5],
        [1.5, H * W - 1.5],
        [2**70, 3],
        "".join(chr(48 + 32) for _ in range(9)) + "1",
        ["1", "2"],
        None,
        7,
    ],
)
def test_broken_run_lengths(counts: object) -> None:
    with pytest.raises(ValueError, match=r"^expected .*, got"):
        to_rle({"size": [H, W], "counts": counts}, H, W)


@pytest.mark.parametrize("size", [None, [H], [W, H], "20,30"])
def test_run_lengths_of_another_image(size: object) -> None:
    with pytest.raises(ValueError, match=r"expected run lengths of the image's size, \[20, 30\], got"):
        to_rle({"size": size, "counts": [H * W]}, H, W)


@pytest.mark.parametrize(
    "polygon",
    [
        [],
        [1, 1, 5, 5],
        [1, 1, 5, 5, 7],
        [1, 1, 5, 5, math.nan, 4],
        [1, 1, 5, 5, math.inf, 4],
        [1, 1, 5, 5, 1e9, 4],
        [1, 1, 5, 5, 7, -1e9],
        [[1, 1], [5, 5], [7, 8]],
        ["a", 1, 5, 5, 7, 7],
        3,
        None,
    ],
)
def test_broken_polygons(polygon: object) -> None:
    with pytest.raises(ValueError, match=r"^expected a polygon .*, got"):
        to_rle([[1, 1, 9, 1, 9, 9], polygon], H, W)


@pytest.mark.parametrize("segmentation", [None, [], "abc", b"abc", 3])
def test_no_segmentation(segmentation: object) -> None:
    with pytest.raises(ValueError, match="expected polygons or run lengths as segmentation, got"):
        to_rle(segmentation, H, W)


def test_polygons_may_leave_the_image() -> None:
    assert area_and_box(to_rle([[-50, -50, 90, -50, 90, 70, -50, 70]], H, W)) == (H * W, [0, 0, W, H])


def test_images_beyond_32_bits() -> None:
    with pytest.raises(ValueError, match=r"expected an image of at most 2147483647 px for masks, got 50000 x 50000 px"):
        to_rle([[1, 1, 9, 1, 9, 9]], 50_000, 50_000)
