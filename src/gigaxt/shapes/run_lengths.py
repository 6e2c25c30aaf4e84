"""Masks of single objects from and to COCO's run lengths."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from gigaxt.shapes.coco_masks import area_and_box, decode_runs, to_rle
from gigaxt.shapes.crops import Crop


def crop_of(rle: Mapping[str, Any]) -> Crop:
    """The crop of a mask in run lengths, as `gigaxt.shapes.coco_masks.to_rle` makes them."""
    height = int(rle["size"][0])
    x, y, w, h = (round(side) for side in area_and_box(dict(rle))[1])
    edges = np.cumsum(decode_runs(rle["counts"])) - x * height  # of runs down the columns, background first
    inside = np.clip(edges, 0, w * height)
    steps = np.zeros(w * height + 1, dtype=np.int8)
    np.add.at(steps, inside[0::2], 1)
    np.add.at(steps, inside[1::2], -1)
    columns = np.cumsum(steps[:-1], dtype=np.int8).reshape(w, height)
    return Crop(x, y, columns[:, y : y + h].T > 0)


def run_lengths(crop: Crop, height: int, width: int) -> dict[str, Any]:
    """COCO's compressed run lengths, as text, of a mask in an image that its window lies in."""
    w = crop.pixels.shape[1]
    edges = np.diff(np.pad(crop.pixels.T.astype(np.int8), ((0, 0), (1, 1))), axis=1)  # (w, h + 1)
    start, stop = ((edges == kind).nonzero() for kind in (1, -1))
    begin, end = ((col + crop.x) * height + row + crop.y for col, row in (start, stop))
    if w and len(begin):  # what reaches the bottom may go on at the top of the next column
        apart = begin[1:] != end[:-1]
        begin, end = begin[np.append(True, apart)], end[np.append(apart, True)]
    counts = np.diff(np.stack([begin, end], axis=1).ravel(), prepend=0, append=height * width)
    runs = counts.tolist() if counts[-1] else counts[:-1].tolist()  # COCO writes no empty last one
    rle = to_rle({"size": [height, width], "counts": runs}, height, width)
    text = rle["counts"]
    return {"size": [height, width], "counts": text.decode("ascii") if isinstance(text, bytes) else text}
