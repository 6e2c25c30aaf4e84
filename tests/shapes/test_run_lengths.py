"""Run lengths of masks, against those of COCO's own code."""

from __future__ import annotations

import numpy as np
import pytest
from faster_coco_eval import mask as api

from gigaxt.shapes.crops import Crop
from gigaxt.shapes.run_lengths import crop_of, run_lengths


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("window", [(0, 0, 23, 17), (3, 5, 9, 7), (14, 10, 9, 7), (22, 0, 1, 17), (5, 5, 0, 0)])
def test_equal_cocos(share: float, window: tuple[int, int, int, int]) -> None:
    """Also where runs go on in the next column, and where nothing is covered."""
    x, y, w, h = window
    whole = np.zeros((17, 23), np.uint8)
    whole[y : y + h, x : x + w] = np.random.default_rng(w).random((h, w)) < share
    found = run_lengths(Crop(x, y, whole[y : y + h, x : x + w] > 0), 17, 23)
    expected = api.encode(np.asfortranarray(whole))
    assert found["counts"].encode() == expected["counts"]
    back = crop_of(found)
    again = np.zeros_like(whole)
    rows, cols = back.pixels.shape
    again[back.y : back.y + rows, back.x : back.x + cols] = back.pixels
    np.testing.assert_array_equal(again, whole)
    if whole.any():
        assert back.pixels.any(axis=0)[[0, -1]].all()
        assert back.pixels.any(axis=1)[[0, -1]].all()
