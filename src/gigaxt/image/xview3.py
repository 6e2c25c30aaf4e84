"""A scene folder of xView3-SAR as one image: VV and VH at 10 m, and the depth of the water brought to that grid."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from gigaxt.errors import ImageError
from gigaxt.image.bands import BandsImage
from gigaxt.image.base import Image, Mask, Pixels

SAR_FILES = {"VV": "VV_dB.tif", "VH": "VH_dB.tif"}
OTHER_FILES = {"bathymetry": "bathymetry.tif"}
"""Of 500 m, interpolated. Wind has gaps over most scenes, and its direction and classes cannot be interpolated."""


def is_scene(folder: Path) -> bool:
    """Whether a folder holds a file of a scene's bands."""
    return any((folder / name).is_file() for name in SAR_FILES.values())


class Xview3Scene(BandsImage):
    """The bands of a scene, by the names `VV`, `VH` and, where it is there, `bathymetry`.

    A pixel is valid where both polarisations are. Where the depth alone is not known, that band is nodata and nothing
    is interpolated across.

    Args:
        folder: with the files as they are shipped.

    Raises:
        ImageError: a polarisation is missing, a file cannot be read, or they cover different places.
    """

    def __init__(self, folder: Path, *, max_pixels: int, max_tile_bytes: int) -> None:
        from gigaxt.image.open import open_image  # which knows this module

        missing = [name for name in SAR_FILES.values() if not (folder / name).is_file()]
        if missing:
            raise ImageError(
                folder, f"expected {' and '.join(SAR_FILES.values())} in the folder of a scene, got no {missing[0]}"
            )
        files = SAR_FILES | {band: name for band, name in OTHER_FILES.items() if (folder / name).is_file()}
        images: list[Image] = [
            open_image(folder / name, max_pixels=max_pixels, max_tile_bytes=max_tile_bytes) for name in files.values()
        ]
        for image in images:
            if image.channels != 1:
                raise ImageError(image.name, f"expected one band, got {image.channels}")
        super().__init__(images, list(files), 0, list(files), nearest=False)
        self.name = str(folder)
        self.nodata = images[0].nodata

    def _read_valid_inside(
        self, x: int, y: int, w: int, h: int, level: int, bands: tuple[int, ...] | None = None
    ) -> tuple[Pixels, Mask]:
        bands = tuple(range(self.channels)) if bands is None else bands
        out, mask = np.empty((h, w, len(bands)), self.dtype), np.ones((h, w), np.bool_)
        only_others = min(bands) >= len(SAR_FILES)
        for places, part, at in self._parts(bands, level):
            out[..., places], valid = part.read_valid(x, y, w, h, at)
            if bands[places[0]] < len(SAR_FILES) or only_others:
                mask &= valid
            else:
                out[~valid, places[0]] = self.nodata
        return out, mask
