"""Arrays and tensors as images."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gigaxt.errors import ImageError
from gigaxt.image.base import Image, Level, Pixels
from gigaxt.image.tiff_tags import representable


class ArrayImage(Image):
    """An image in memory. The array is kept as it is, not copied; pickling copies it.

    Args:
        array: (h, w) or (h, w, channels), integers, floats or booleans (which become uint8).
        nodata: value of pixels that hold nothing; NaN for floats.
        name: what errors call it.

    Raises:
        ImageError: another number of dimensions, an empty side, complex or other pixels.
    """

    def __init__(self, array: NDArray[Any], *, nodata: float | None = None, name: str = "") -> None:
        self.name = name or f"array {' x '.join(map(str, array.shape))} {array.dtype}"
        if array.ndim not in (2, 3) or 0 in array.shape:
            raise ImageError(self.name, "expected shape (height, width) or (height, width, channels), none of them 0")
        if array.dtype.kind not in "buif":
            raise ImageError(self.name, f"expected integers or floats, got {array.dtype}")
        array = array.view(np.uint8) if array.dtype.kind == "b" else array
        self._array = array[..., None] if array.ndim == 2 else array
        self.height, self.width, self.channels = self._array.shape
        self.dtype = self._array.dtype.newbyteorder("=")
        self.levels = (Level(self.width, self.height, 1.0, 1.0),)
        self.nodata = representable(nodata, self.dtype)
        self.band_names = tuple(str(band + 1) for band in range(self.channels))

    def _read_inside(self, x: int, y: int, w: int, h: int, level: int) -> Pixels:
        return self._array[y : y + h, x : x + w].astype(self.dtype)

    def _read_bands(self, bands: tuple[int, ...], x: int, y: int, w: int, h: int, level: int) -> Pixels:
        return self._array[y : y + h, x : x + w, list(bands)].astype(self.dtype, copy=False)


def image_from_tensor(tensor: Any, *, nodata: float | None = None) -> ArrayImage:
    """A torch tensor (channels, h, w) or (h, w) as an image; on the CPU it shares the tensor's memory.

    Raises:
        ImageError: another shape, or a dtype that NumPy does not have, such as bfloat16.
    """
    name = f"tensor {' x '.join(map(str, tensor.shape))} {tensor.dtype}"
    if tensor.ndim not in (2, 3):
        raise ImageError(name, "expected a tensor of shape (channels, height, width) or (height, width)")
    try:
        array = tensor.detach().cpu().numpy()
    except TypeError as error:
        raise ImageError(name, f"{error}: convert it first, e.g. tensor.float()") from error
    return ArrayImage(array if array.ndim == 2 else array.transpose(1, 2, 0), nodata=nodata, name=name)


def is_tensor(source: object) -> bool:
    """Whether `source` is a torch tensor, found out without importing torch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(source, torch.Tensor)
