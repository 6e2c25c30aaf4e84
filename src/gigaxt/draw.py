"""Small pictures of large images: thumbnails, masks over them, foreground outlines, class colours.

Nothing here needs more memory than its `max_px` and one strip of the image allow.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image as Pillow
from PIL import ImageDraw, ImageFont

from gigaxt.image.base import Image, Pixels
from gigaxt.image.views import resample

Colour = tuple[int, int, int]
"""Red, green, blue, 0 to 255."""
Picture = NDArray[np.uint8]
"""(height, width, 3)."""

MAX_PX = 1024
"""Longer side of a thumbnail where the caller names none, px."""
NOT_A_CLASS = 255
"""Mask values from here on get no colour of their own: 255 means "not labelled"."""
STRIP_PIXELS = 1 << 24
"""Level-0 pixels that one strip of a thumbnail may cover."""

# Okabe & Ito's colours for eight classes that colour-blind readers tell apart, the background's black first.
_OKABE_ITO: tuple[Colour, ...] = (
    (0, 0, 0),
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (240, 228, 66),
    (0, 114, 178),
    (213, 94, 0),
    (204, 121, 167),
)


CASE_COLOURS: tuple[Colour, ...] = _OKABE_ITO[2], _OKABE_ITO[3], _OKABE_ITO[6]
"""Of what is there, what is found, and what is found wrongly."""


def class_palette(classes: int) -> list[Colour]:
    """A colour for each class, one of 349 in turn; 0 is black, and k the same colour whatever the number of classes."""
    known = _OKABE_ITO if classes <= len(_OKABE_ITO) else _OKABE_ITO + _far_colours()
    return [known[k % len(known)] for k in range(classes)]


def thumbnail(image: Image, max_px: int = MAX_PX) -> Picture:
    """The whole image, (h, w, 3) uint8, its longer side at most `max_px`.

    uint8 bands are shown as they are, others between their 2nd and 98th percentile. One band is shown grey, two as
    red, green and their mean, of more the first three. Pixels that are not valid are black.

    Raises:
        ImageError: the image cannot be read.
    """
    pixels, valid = reduced(image, max_px, nearest=False)
    bands = _three_bands(pixels)
    if image.dtype != np.uint8:
        bands = _stretched(bands, valid)
    picture = np.where(valid[:, :, None], bands, 0)
    return picture.astype(np.uint8)


def mask_thumbnail(mask: Image, max_px: int = MAX_PX) -> NDArray[np.int64]:
    """The first band of a mask, (h, w), its longer side at most `max_px`; values are picked, never mixed.

    Raises:
        ImageError: the mask cannot be read.
    """
    pixels, _ = reduced(mask, max_px, nearest=True)
    return pixels[:, :, 0].astype(np.int64)


def overlay_mask(
    picture: Picture,
    values: NDArray[np.int64],
    colours: Sequence[Colour],
    *,
    opacity: float = 0.55,
    clear: Sequence[int] = (0,),
) -> Picture:
    """Class colours over a picture.

    Args:
        picture: (h, w, 3) uint8.
        values: (h, w) class numbers, of the same size; those without a colour leave the picture as it is.
        colours: one a class.
        opacity: 0 shows the picture alone, 1 the colours alone.
        clear: classes that leave the picture as it is; the background.
    """
    table = np.asarray(colours, dtype=np.float32).reshape(-1, 3)
    drawn = (values >= 0) & (values < len(table)) & ~np.isin(values, list(clear))
    result = picture.astype(np.float32)
    result[drawn] = (1 - opacity) * result[drawn] + opacity * table[values[drawn]]
    return np.round(result).astype(np.uint8)


def shown_numbers(
    picture: Picture, values: NDArray[np.floating], known: NDArray[np.bool_], low: float, high: float
) -> Picture:
    """Numbers (h, w) as colours from blue (`low`) to yellow (`high`) in place of a picture, where they are known."""
    from matplotlib import colormaps  # takes a while to import

    scaled = np.clip((np.where(known, values, low) - low) / (high - low), 0, 1)
    colours = np.asarray(colormaps["viridis"](scaled))[..., :3]
    return np.where(known[..., None], np.round(255 * colours), picture).astype(np.uint8)


def outline_regions(
    picture: Picture, keep: NDArray[np.bool_], cell_px: float, colour: Colour = (255, 64, 64)
) -> Picture:
    """Kept regions framed, the others darkened.

    Args:
        picture: (h, w, 3) uint8.
        keep: (rows, cols) of the region lattice.
        cell_px: side of a region's core in px of the picture.
        colour: of the frame.
    """
    height, width = picture.shape[:2]
    row = np.minimum((np.arange(height) + 0.5) / cell_px, keep.shape[0] - 1).astype(np.int64)
    col = np.minimum((np.arange(width) + 0.5) / cell_px, keep.shape[1] - 1).astype(np.int64)
    kept = keep[row[:, None], col[None, :]]  # (h, w)
    result = np.where(kept[:, :, None], picture, picture // 2)
    # A pixel is on the frame where it is kept and a neighbour is not; the picture's border counts as not kept.
    around = np.pad(kept, 1)
    inner = around[:-2, 1:-1] & around[2:, 1:-1] & around[1:-1, :-2] & around[1:-1, 2:]
    result[kept & ~inner] = colour
    return result


def with_legend(picture: Picture, names: Sequence[str], colours: Sequence[Colour]) -> Picture:
    """The picture with a column of colours and class names at its right; as many as its height has room for."""
    font = ImageFont.load_default(size=14)
    line = 20
    height, width = picture.shape[:2]
    height = max(height, 2 * line)
    room = height // line
    entries = [
        (name if len(name) <= 32 else f"{name[:31]}…", colour) for name, colour in zip(names, colours, strict=True)
    ]
    if len(entries) > room:
        left_out = len(entries) - room + 1
        entries = [*entries[: room - 1], (f"and {left_out} more", (255, 255, 255))]
    column = 34 + max((int(font.getlength(name)) + 1 for name, _ in entries), default=0)
    canvas = Pillow.new("RGB", (width + column, height), (255, 255, 255))
    canvas.paste(Pillow.fromarray(picture), (0, 0))
    draw = ImageDraw.Draw(canvas)
    for i, (name, colour) in enumerate(entries):
        y = i * line + 3
        draw.rectangle((width + 8, y, width + 21, y + 13), fill=colour, outline=(128, 128, 128))
        draw.text((width + 28, y - 1), name, fill=(0, 0, 0), font=font)
    return np.asarray(canvas)


def with_boxes(
    picture: Picture,
    boxes_xyxy: NDArray[np.float64],
    classes: NDArray[np.int64],
    names: Sequence[str],
    *,
    colours: Sequence[Colour] | None = None,
) -> Picture:
    """A picture with boxes in class colours and a legend at its side.

    Args:
        picture: (h, w, 3) uint8.
        boxes_xyxy: (n, 4) left, top, right, bottom in px of the picture.
        classes: (n,) from 0.
        names: of the classes.
        colours: one a class; None: `class_palette` without its black.
    """
    colours = class_palette(len(names) + 1)[1:] if colours is None else colours
    canvas = Pillow.fromarray(picture)
    pen = ImageDraw.Draw(canvas)
    for box, class_ in zip(boxes_xyxy.tolist(), classes.tolist(), strict=True):
        left, top, right, bottom = (round(side) for side in box)
        frame = (left, top, max(right - 1, left), max(bottom - 1, top))  # the last pixel inside
        pen.rectangle(frame, outline=colours[class_], width=2 if min(right - left, bottom - top) > 8 else 1)
    return with_legend(np.asarray(canvas), names, colours)


def with_case(picture: Picture, boxes_xyxy: Mapping[str, Sequence[Sequence[float]]], scale: float) -> Picture:
    """A picture with boxes of several kinds, such as true and found ones, each in a colour of its own.

    Args:
        picture: (h, w, 3) uint8.
        boxes_xyxy: name of a kind -> left, top, right, bottom in px of the image.
        scale: px of the picture for each of the image.
    """
    boxes = np.array([box for kind in boxes_xyxy.values() for box in kind], dtype=np.float64).reshape(-1, 4)
    kinds = np.repeat(np.arange(len(boxes_xyxy)), [len(kind) for kind in boxes_xyxy.values()])
    return with_boxes(picture, boxes * scale, kinds, list(boxes_xyxy), colours=CASE_COLOURS)


def save_png(picture: Picture, path: str | Path) -> Path:
    """Write a picture as PNG; folders are made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    Pillow.fromarray(picture).save(path, format="PNG")
    return path


def reduced(image: Image, max_px: int, *, nearest: bool) -> tuple[Pixels, NDArray[np.bool_]]:
    """The whole image, its longer side `max_px` at most: pixels (h, w, bands) and validity; read strip by strip.

    Args:
        image: any.
        max_px: of the longer side.
        nearest: pick pixels rather than average them.
    """
    scale = max(image.height, image.width) / max_px
    if scale > 1:
        image = resample(image, scale, nearest=nearest)
    step = max(1, int(STRIP_PIXELS / (image.width * max(scale, 1) ** 2)))
    strips = [image.read_valid(0, y, image.width, min(step, image.height - y)) for y in range(0, image.height, step)]
    return np.concatenate([pixels for pixels, _ in strips]), np.concatenate([valid for _, valid in strips])


def _three_bands(pixels: Pixels) -> NDArray[np.float32]:
    bands = pixels[:, :, :3].astype(np.float32)
    if bands.shape[2] == 1:
        return np.repeat(bands, 3, axis=2)
    if bands.shape[2] == 2:
        return np.concatenate([bands, bands.mean(axis=2, keepdims=True)], axis=2)
    return bands


def _stretched(bands: NDArray[np.float32], valid: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Each band from its 2nd to its 98th percentile to 0 to 255."""
    result = np.zeros_like(bands)
    for band in range(bands.shape[2]):
        values = bands[:, :, band]
        shown = valid & np.isfinite(values)
        if not shown.any():
            continue
        low, high = np.percentile(values[shown], (2, 98))
        scaled = (values - low) / max(high - low, 1e-12) * 255
        result[:, :, band] = np.where(shown, np.clip(scaled, 0, 255), 0)
    return result


@functools.cache
def _far_colours() -> tuple[Colour, ...]:
    """The colours of a coarse cube, each the farthest from all before it and from Okabe & Ito's."""
    steps = np.linspace(0, 255, 7).round()
    cube = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), axis=-1).reshape(-1, 3)  # (343, 3)
    weights = np.sqrt((2, 4, 3))  # what the eye tells apart, roughly
    nearest = np.full(len(cube), np.inf)
    latest: NDArray[np.float64]
    chosen: list[Colour] = []
    for latest in np.asarray([*_OKABE_ITO, (255, 255, 255)], dtype=np.float64):  # white is the legend's paper
        nearest = np.minimum(nearest, (((cube - latest) * weights) ** 2).sum(axis=1))
    while nearest.max() > 0:
        latest = cube[int(nearest.argmax())]
        red, green, blue = latest.astype(int).tolist()
        chosen.append((red, green, blue))
        nearest = np.minimum(nearest, (((cube - latest) * weights) ** 2).sum(axis=1))
    return tuple(chosen)
