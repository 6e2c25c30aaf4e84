"""Which regions of a scene are encoded: those that hold data and foreground, found once a file."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from gigaxt.augment import ColourAugmented, Dihedral
from gigaxt.errors import DataError
from gigaxt.image.base import Image, Mask
from gigaxt.image.files import file_identity
from gigaxt.regions import keep_valid
from gigaxt.scenes.foreground import Foreground
from gigaxt.scenes.inputs import InputConfig

MOST_KEPT = 4096
"""Scenes of which it is remembered which regions are kept; a byte a region."""
_KEPT: dict[tuple[Any, ...], Mask] = {}
"""(identity of the file, what is asked of it) -> (rows, cols); the oldest first."""


def kept_regions(image: Image, config: InputConfig, region: int) -> Mask:
    """Which regions hold data and foreground: (rows, cols). Found once a file, since finding it may read all of it.

    Args:
        image: as the model sees it; views of `gigaxt.augment` are of the file below them.
        config: with the halo and the foreground.
        region: px on a side.

    Raises:
        DataError: none does.
    """
    below = image.base if isinstance(image, ColourAugmented) else image
    turn = below.k if isinstance(below, Dihedral) else 0
    asked = (image.height, image.width, image.band_names, turn, region, config.halo, config.foreground)
    file = file_identity(image.name)
    if file is not None and (file, asked) in _KEPT:
        return _KEPT[file, asked]
    keep = keep_valid(image, region, config.halo)
    if config.foreground is not None:
        keep = keep & _foreground(config.foreground).keep(image, region, config.halo)
    if not keep.any():
        what = "foreground" if config.foreground else "data"
        raise DataError(f"{image.name}: none of its {keep.size} regions holds {what}: leave the image out")
    if file is not None:
        while len(_KEPT) >= MOST_KEPT:
            _KEPT.pop(next(iter(_KEPT)))
        _KEPT[file, asked] = keep
    return keep


@lru_cache(maxsize=8)
def _foreground(spec: str) -> Foreground:
    """Read once for many scenes and windows."""
    return Foreground.from_spec(spec)
