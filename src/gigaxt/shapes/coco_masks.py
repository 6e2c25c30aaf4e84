"""Masks of COCO JSON, checked before compiled code reads them: there a bad number ends the process, not the call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

FAR_OUTSIDE = 10
"""A polygon may leave its image by this many of its sides; the rasteriser's memory grows with the outline."""
MAX_PIXELS = 2**31 - 1
"""Of an image with masks: the compiled code counts pixels with 32 bits."""
_MAX_GROUPS = 7  # 35 bits


def to_rle(segmentation: object, height: int, width: int) -> dict[str, Any]:
    """Make compressed run lengths of a mask, as faster-coco-eval takes them.

    Args:
        segmentation: polygons, each [x, y, x, y, ...] in pixels; or run lengths down the columns, background first:
            `{"size": [height, width], "counts": ...}` with a list of numbers or COCO's compressed text.
        height: of the image.
        width: of the image.

    Raises:
        ValueError: what was expected and what came, without the place.
    """
    from faster_coco_eval import mask as api

    if height * width > MAX_PIXELS:
        raise ValueError(
            f"expected an image of at most {MAX_PIXELS} px for masks, got {height} x {width} px; score boxes"
        )
    if isinstance(segmentation, Mapping):
        _check_runs(segmentation, height, width)
    elif isinstance(segmentation, Sequence) and segmentation and not isinstance(segmentation, (str, bytes)):
        for polygon in segmentation:
            _check_polygon(polygon, height, width)
    else:
        raise ValueError(f"expected polygons or run lengths as segmentation, got {segmentation!r:.60}")
    rle: dict[str, Any] = api.segmToRle(segmentation, width, height)
    return rle


def area_and_box(rle: dict[str, Any]) -> tuple[float, list[float]]:
    """Of a mask as `to_rle` makes it: pixels, and [x, y, width, height]."""
    from faster_coco_eval import mask as api

    return float(api.area(rle)), [float(x) for x in api.toBbox(rle)]


def decode_runs(counts: str | bytes) -> NDArray[np.int64]:
    """The run lengths of COCO's compressed text.

    A number is written in groups of five bits, the lowest first, each as a character from "0" on; 32 is added where
    more groups follow, and the highest bit of the last is the sign. From the fourth on, the difference from the number
    before the last is written.

    Raises:
        ValueError: the text is not of this form.
    """
    text = counts.encode("ascii", "replace") if isinstance(counts, str) else counts
    codes = np.frombuffer(text, np.uint8).astype(np.int64) - ord("0")
    is_last = (codes & 32) == 0
    if not len(codes) or codes.min() < 0 or codes.max() > 63 or not is_last[-1]:
        raise ValueError(f"expected compressed run lengths as counts, got {counts!r:.60}")
    ends = np.flatnonzero(is_last) + 1
    groups = np.diff(ends, prepend=0)
    if groups.max() > _MAX_GROUPS:
        raise ValueError(f"expected run lengths within the image, got {counts!r:.60}")
    starts = ends - groups
    shift = 5 * (np.arange(len(codes)) - np.repeat(starts, groups))
    runs = np.add.reduceat((codes & 31) << shift, starts)
    runs -= ((codes[is_last] & 16) > 0).astype(np.int64) << (5 * groups)
    runs[1::2], runs[2::2] = np.cumsum(runs[1::2]), np.cumsum(runs[2::2])
    return runs


def _check_runs(rle: Mapping[str, Any], height: int, width: int) -> None:
    size, counts = rle.get("size"), rle.get("counts")
    if not isinstance(size, Sequence) or list(size) != [height, width]:
        raise ValueError(f"expected run lengths of the image's size, {[height, width]}, got {size!r:.60}")
    if isinstance(counts, (str, bytes)):
        runs = decode_runs(counts)
    elif isinstance(counts, Sequence) and all(
        isinstance(run, (int, np.integer)) and 0 <= run <= MAX_PIXELS for run in counts
    ):
        runs = np.array(counts, dtype=np.int64)
    else:
        raise ValueError(f"expected text or numbers of pixels as counts, got {counts!r:.60}")
    if (runs < 0).any() or runs.sum() != height * width:
        raise ValueError(f"expected run lengths that add up to {height * width} pixels, got {int(runs.sum())}")


def _check_polygon(polygon: object, height: int, width: int) -> None:
    try:
        points = np.asarray(polygon, dtype=np.float64)
    except (TypeError, ValueError):
        points = np.empty(0)
    if points.ndim != 1 or len(points) < 6 or len(points) % 2:
        raise ValueError(f"expected a polygon of three or more x, y pairs, got {polygon!r:.60}")
    for place, side in ((points[0::2], width), (points[1::2], height)):
        if not (abs(place - side / 2) <= (FAR_OUTSIDE + 0.5) * side).all():  # NaN neither
            raise ValueError(f"expected a polygon in an image of {height} x {width} px, got {polygon!r:.60}")
