"""PNG, JPEG, BMP and WebP: decoded whole, once, up to a stated size."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import PIL.Image
from numpy.typing import NDArray

from gigaxt.errors import ImageError
from gigaxt.image.base import Image, Level, Pixels
from gigaxt.image.files import File
from gigaxt.image.headers import HEAD, CodedSize, coded_size, kind_of, png_bits
from gigaxt.image.process import PerProcess

MAX_PIXELS = 64_000_000
"""Larger pictures cannot be read in parts and are refused: 64 MP of RGB take 192 MB."""

_HEADER = 1 << 20  # a JPEG's size may come after metadata and a thumbnail
_FORMATS = {"png": "PNG", "jpeg": "JPEG", "bmp": "BMP", "webp": "WEBP"}


class PillowImage(Image):
    """A PNG, JPEG, BMP or WebP picture of at most `MAX_PIXELS`, decoded on the first read and then kept.

    Pixels are those in the file: a palette picture gives its indices (as masks need them), 1 bit gives 0 and 1, 16 bits
    stay 16 bits, an alpha band stays a band, and EXIF orientation is reported, not applied.

    Args:
        path: the file.
        max_pixels: refuse more than this, if it is less than `MAX_PIXELS`.
        rgb: make red, green and blue of grey, palette, CMYK and alpha instead; 16 bits and floats stay as they are.
        cached: see `open_image`.

    Raises:
        ImageError: too large (the message holds the command that converts it), or no such picture.
    """

    def __init__(
        self, path: str | Path, *, max_pixels: int = MAX_PIXELS, rgb: bool = False, cached: bool = True
    ) -> None:
        self.name = str(path)
        self._options: dict[str, Any] = {"max_pixels": max_pixels, "rgb": rgb, "cached": cached}
        self._file = File(self.name, cached=cached)
        head = self._file.read(0, min(_HEADER, self._file.size))
        self._kind = kind_of(head[:HEAD]) or "unknown"
        size = coded_size(head)
        if self._kind not in _FORMATS or size is None or not size.width * size.height:
            raise ImageError(self.name, f"expected a PNG, JPEG, BMP or WebP picture, its {self._kind} header is broken")
        self._check_size(size, min(max_pixels, MAX_PIXELS))
        self._deep = self._kind == "png" and png_bits(head)[0] == 16 and png_bits(head)[1] != 0
        self.width, self.height = size.width, size.height
        mode, self.orientation = self._describe()
        self._rgb = rgb and not self._deep and mode not in ("I", "F") and not mode.startswith("I;16")
        self.has_palette = mode == "P" and not self._rgb
        """Whether pixels are indices of colours."""
        mode = "RGB" if self._rgb else mode
        self.channels = size.samples if self._deep else len(PIL.Image.new(mode, (1, 1)).getbands())
        wide = self._deep or mode.startswith("I;16")
        self.dtype = np.dtype(np.uint16 if wide else {"I": np.int32, "F": np.float32}.get(mode, np.uint8))
        self.levels = (Level(self.width, self.height, 1.0, 1.0),)
        self.band_names = tuple(str(band + 1) for band in range(self.channels))
        self._pixels: NDArray[Any] | None = None
        self._lock = PerProcess(threading.Lock)

    def __reduce__(self) -> tuple[Callable[..., PillowImage], tuple[str]]:
        return functools.partial(PillowImage, **self._options), (self.name,)

    def _check_size(self, size: CodedSize, limit: int) -> None:
        if size.width * size.height <= limit:
            return
        target = Path(self.name).with_suffix(".tif")
        target = target if target != Path(self.name) else Path(self.name + ".tif")
        raise ImageError(
            self.name,
            f"expected at most {limit} px, got {size.width} x {size.height}: such a picture cannot be read in parts."
            f" Make a tiled one with: gigaxt convert {self.name} {target}",
        )

    def _open(self) -> PIL.Image.Image:
        return PIL.Image.open(self._file.stream(), formats=[_FORMATS[self._kind]])

    def _describe(self) -> tuple[str, int]:
        """Pillow's mode and the orientation, without decoding."""
        try:
            with self._open() as picture:
                if picture.size != (self.width, self.height):
                    raise ImageError(
                        self.name, f"its header promises {self.width} x {self.height} px, not {picture.size}"
                    )
                known = self._kind != "png" or "exif" in picture.info  # else Pillow decodes a PNG whole to find out
                orientation = picture.getexif().get(274, 1) if known else 1
                return picture.mode, orientation if orientation in range(1, 9) else 1
        except ImageError:
            raise
        except Exception as error:  # Pillow raises OSError, SyntaxError, struct.error, ...
            raise self._error(error) from error

    def _decoded(self) -> NDArray[Any]:
        if self._pixels is None:
            with self._lock.get():
                if self._pixels is None:
                    self._pixels = self._decode()
        return self._pixels

    def _decode(self) -> NDArray[Any]:
        try:
            if self._deep:  # Pillow cuts 16-bit colour down to 8 bits
                pixels = np.asarray(imagecodecs.png_decode(self._file.read(0, self._file.size)))
            else:
                with self._open() as picture:
                    pixels = np.asarray(_as_rgb(picture) if self._rgb else picture)
        except ImageError:
            raise
        except Exception as error:
            raise self._error(error) from error
        pixels = pixels[..., None] if pixels.ndim == 2 else pixels
        if pixels.shape != (self.height, self.width, self.channels):
            raise ImageError(self.name, f"expected {self!r}, the stream decodes to {pixels.shape}")
        return pixels.astype(self.dtype, copy=False)

    def _error(self, error: Exception) -> ImageError:
        return ImageError(self.name, f"cannot be decoded, it is truncated or corrupt: {type(error).__name__}: {error}")

    def _read_inside(self, x: int, y: int, w: int, h: int, level: int) -> Pixels:
        return self._decoded()[y : y + h, x : x + w].copy()


def _as_rgb(picture: PIL.Image.Image) -> PIL.Image.Image:
    """Pillow's conversion; colours that are transparent by a PNG's palette count as they are, without its warning."""
    picture.info.pop("transparency", None)
    return picture.convert("RGB")
