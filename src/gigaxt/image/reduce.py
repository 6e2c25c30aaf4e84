"""From one pyramid level to the next: 2 x 2 pixels become one, by their mean or their most frequent class."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gigaxt.image.base import Mask, Pixels


def halve(pixels: Pixels, nodata: float | None, *, categorical: bool) -> Pixels:
    """Pixels of the next level, shape (ceil(h / 2), ceil(w / 2), channels), same dtype.

    An odd last row or column is halved alone. A pixel whose bands all equal `nodata` has no vote; the result is nodata
    only where all four are. NaN as nodata is left out band by band, for a mean with one NaN would be lost.

    Args:
        pixels: (h, w, channels).
        nodata: the value of pixels that hold nothing, a number that the dtype can hold; None where there is none.
        categorical: values are classes: the most frequent wins, among equals the first in reading order.
    """
    h, w = pixels.shape[:2]
    # Doubling the edge keeps every mean and every majority as it was among the pixels that exist.
    even = np.pad(pixels, ((0, h % 2), (0, w % 2), (0, 0)), mode="edge") if h % 2 or w % 2 else pixels
    four = [even[i::2, j::2] for i in (0, 1) for j in (0, 1)]  # 4 x (ceil(h/2), ceil(w/2), channels)
    valid = None if nodata is None else [_valid(part, nodata) for part in four]
    if categorical:
        return _majority(four, valid)
    if valid is None or all(mask.all() for mask in valid):
        return _mean(four)
    assert nodata is not None
    return _mean_of_valid(four, valid, nodata)


def _valid(pixels: Pixels, nodata: float) -> Mask:
    """(h, w, 1), or (h, w, channels) for NaN."""
    if np.isnan(nodata):
        return ~np.isnan(pixels)
    mask: Mask = (pixels != pixels.dtype.type(nodata)).any(axis=2, keepdims=True)
    return mask


def _sum_dtype(dtype: np.dtype[np.generic]) -> np.dtype[np.generic]:
    return np.dtype(np.float32 if dtype.kind == "f" else np.uint16 if dtype == np.uint8 else np.int32)


def _mean(four: list[Pixels]) -> Pixels:
    dtype = four[0].dtype
    wide = _sum_dtype(dtype)
    with np.errstate(invalid="ignore", over="ignore"):  # infinities of the file's own, and float32 sums above its range
        total = np.add(four[0], four[1], dtype=wide)
        total += four[2]
        total += four[3]
        if dtype.kind == "f":
            return (total * np.float32(0.25)).astype(dtype)
    total += 2  # halves are rounded up
    total >>= 2
    return total.astype(dtype)


def _mean_of_valid(four: list[Pixels], valid: list[Mask], nodata: float) -> Pixels:
    dtype = four[0].dtype
    number = np.add(valid[0], valid[1], dtype=np.int32) + valid[2] + valid[3]
    total = np.zeros(four[0].shape, _sum_dtype(dtype) if dtype.kind == "f" else np.int32)
    with np.errstate(invalid="ignore", over="ignore"):
        for part, mask in zip(four, valid, strict=True):
            np.add(total, part, out=total, where=mask)
        several = np.maximum(number, 1)
        mean = total / several if dtype.kind == "f" else (2 * total + several) // (2 * several)
        result: Pixels = mean.astype(dtype)
    if not np.isnan(nodata):
        _keep_apart(result, number > 0, nodata)
    result[np.broadcast_to(number == 0, result.shape)] = nodata
    return result


def _keep_apart(result: Pixels, valid: Mask, nodata: float) -> None:
    """Move means that happen to equal nodata in all bands to the next number, so that they do not count as empty."""
    clash = (result == result.dtype.type(nodata)).all(axis=2) & valid[..., 0]
    if not clash.any():
        return
    if result.dtype.kind == "f":
        beside = float(np.nextafter(result.dtype.type(nodata), result.dtype.type(0 if nodata else 1)))
    else:
        beside = nodata + 1 if nodata < np.iinfo(result.dtype.name).max else nodata - 1
    result[clash] = beside


def _majority(four: list[Pixels], valid: list[Mask] | None) -> Pixels:
    a, b, c, d = four
    ab, ac, ad, bc, bd, cd = a == b, a == c, a == d, b == c, b == d, c == d
    votes: list[NDArray[np.int8]] = [
        np.add(x, y, dtype=np.int8) + z for x, y, z in ((ab, ac, ad), (ab, bc, bd), (ac, bc, cd), (ad, bd, cd))
    ]
    if valid is not None:
        votes = [np.where(mask, vote, np.int8(-1)) for vote, mask in zip(votes, valid, strict=True)]
    result, most = a.copy(), votes[0]
    for part, vote in zip(four[1:], votes[1:], strict=True):
        better = vote > most
        np.copyto(result, part, where=better)
        most = np.where(better, vote, most)
    return result
