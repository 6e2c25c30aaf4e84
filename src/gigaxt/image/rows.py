"""`Rows`: a picture as bands from top to bottom, the one order in which PNG and JPEG can be decoded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image as PillowImage

from gigaxt.image.base import Image, Pixels
from gigaxt.image.tiff_layout import Colormap

_ORIENTATION = 0x0112


@dataclass(frozen=True, kw_only=True)
class Rows:
    """What `gigaxt convert` copies.

    Attributes:
        name: what errors call it.
        height: px.
        width: px.
        channels: bands.
        dtype: of the pixels.
        bands: `bands(n)` yields (n, width, channels) arrays from the top down, the last one may be lower; each is new.
        nodata: the value of pixels that hold nothing, or None.
        colormap: colours of the values as (red, green, blue), 0-255, of a palette picture.
        alpha: the last band is opacity.
        orientation: as EXIF and TIFF count it, 1 = as stored.
        band_names: where the source has names of its own.
        image: the source where it is an Image: its CRS, transform and pixel size are copied.
    """

    name: str
    height: int
    width: int
    channels: int
    dtype: np.dtype[np.generic]
    bands: Callable[[int], Iterator[Pixels]]
    nodata: float | None = None
    colormap: Colormap | None = None
    alpha: bool = False
    orientation: int = 1
    band_names: tuple[str, ...] | None = None
    image: Image | None = None


def copying_bytes(width: int, channels: int, dtype: np.dtype[np.generic], tile: int) -> int:
    """Memory that copying takes beside decoding: four rows of tiles.

    Two are bands (one being filled, one being written), one waits in the overviews, one is what the encoders hold.
    """
    return 4 * width * tile * channels * dtype.itemsize


def exif_orientation(exif: bytes) -> int:
    """The orientation in an EXIF block (TIFF header and all); 1 where it has none or cannot be read."""
    found = PillowImage.Exif()
    try:
        found.load(exif)
        value = int(found.get(_ORIENTATION, 1))
    except Exception:  # whatever Pillow raises on a damaged block: the pixels do not depend on it
        return 1
    return value if 1 <= value <= 8 else 1
