"""What a segmentation model's answers are as a raster on disk, and in a picture."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from gigaxt.draw import (
    Colour,
    Picture,
    class_palette,
    mask_thumbnail,
    overlay_mask,
    reduced,
    shown_numbers,
    with_legend,
)
from gigaxt.image.base import Image, Mask, Pixels
from gigaxt.nn.heads.segment_config import SegmentConfig

LABEL_NODATA = 255


class AnswerRaster(NamedTuple):
    """A raster of answers."""

    options: dict[str, Any]
    """Of the TiffWriter: bands, dtype, nodata, colours, and how overviews are made."""
    encode: Callable[[Tensor, Mask], Pixels]
    """From `as_probabilities` (outputs, h, w) and validity (h, w) to pixels (h, w, bands)."""


def as_probabilities(head: SegmentConfig, answers: Tensor) -> Tensor:
    """Answers (..., outputs, h, w) as probabilities of the classes or labels; numbers stay as they are."""
    if head.target == "regression":
        return answers
    return answers.softmax(dim=-3) if head.target == "single" else answers.sigmoid()


def answer_raster(head: SegmentConfig) -> AnswerRaster:
    """Class numbers with colours; a band of 0 and 1 for each label; or a band of float32 for each number."""
    if head.target == "single":
        return _classes(head)
    numbers = head.target == "regression"
    nodata = np.nan if numbers else LABEL_NODATA

    def encode(found: Tensor, valid: Mask) -> Pixels:
        bands = found.permute(1, 2, 0).cpu()  # (outputs, h, w) -> (h, w, outputs)
        pixels = bands.float().numpy() if numbers else (bands > 0.5).numpy().astype(np.uint8)
        pixels[~valid] = nodata
        return pixels

    options = {
        "channels": head.classes,
        "dtype": "float32" if numbers else "uint8",
        "nodata": nodata,
        "categorical": not numbers,
        "band_names": names_of(head),
    }
    return AnswerRaster(options, encode)


def _classes(head: SegmentConfig) -> AnswerRaster:
    dtype, nodata = ("uint8", 255) if head.classes <= 255 else ("uint16", 65535)

    def encode(found: Tensor, valid: Mask) -> Pixels:
        # Not argmax, which takes seven times as long over a leading dimension on a CPU; ties are alike.
        classes = found.max(dim=0).indices.cpu().numpy().astype(dtype)
        classes[~valid] = nodata
        return classes[..., None]

    colours = colours_of(head) if dtype == "uint8" else None
    return AnswerRaster({"dtype": dtype, "nodata": nodata, "colormap": colours, "categorical": True}, encode)


def names_of(head: SegmentConfig) -> list[str]:
    """The names of the outputs; their numbers where they have none."""
    return head.class_names or [str(i) for i in range(head.classes)]


def colours_of(head: SegmentConfig) -> list[Colour]:
    """A colour for each class; labels and numbers have no background, whose black is left out."""
    if head.class_colors is not None:
        return [(red, green, blue) for red, green, blue in head.class_colors]
    return class_palette(head.classes) if head.target == "single" else class_palette(head.classes + 1)[1:]


def over_picture(picture: Picture, raster: Image, head: SegmentConfig) -> Picture:
    """A target or an answer over a small picture of its image: (h, w, 3) uint8.

    Classes and labels in their colours, later labels over earlier ones; of numbers the first band in place of the
    picture, from blue to yellow over four standard deviations around their mean.

    Raises:
        ImageError: the raster cannot be read.
    """
    size, most = picture.shape[:2], max(picture.shape[:2])
    if head.target == "single":
        return overlay_mask(picture, _fitted(mask_thumbnail(raster, most), size), colours_of(head))
    pixels, valid = reduced(raster, most, nearest=True)
    pixels, valid = _fitted(pixels, size), _fitted(valid, size)
    if head.target == "multi":
        for k, colour in enumerate(colours_of(head)):
            picture = overlay_mask(picture, ((pixels[..., k] == 1) & valid).astype(np.int64), [(0, 0, 0), colour])
        return picture
    mean, std = (head.target_mean or [0.0])[0], (head.target_std or [1.0])[0]
    known = valid & np.isfinite(pixels[..., 0])
    return shown_numbers(picture, pixels[..., 0], known, mean - 2 * std, mean + 2 * std)


def with_mask(picture: Picture, raster: Image, head: SegmentConfig) -> Picture:
    """As `over_picture`, with a legend of the classes or labels at its side."""
    drawn = over_picture(picture, raster, head)
    return drawn if head.target == "regression" else with_legend(drawn, names_of(head), colours_of(head))


def _fitted(values: Any, size: tuple[int, int]) -> Any:
    """Rows and columns of (h, w, ...) repeated or left out: a raster may be a pixel larger than a picture."""
    rows, cols = (np.arange(n) * have // n for n, have in zip(size, values.shape[:2], strict=True))
    return values[rows[:, None], cols]
