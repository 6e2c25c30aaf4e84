"""RandAugment of pictures in memory, drawn from a seed.

Cubuk, Zoph, Shlens, Le: RandAugment: Practical automated data augmentation with a reduced search space (2019), in
timm's form `rand-mX-mstd0.5-inc1`. The operations are timm's own; what is drawn is drawn here, since timm does it with
the global generators of Python and NumPy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image as Pillow

from gigaxt.errors import ConfigError, DataError
from gigaxt.image.base import Image, Level, Pixels
from gigaxt.image.views import copy_description

MOST = 10.0
"""Magnitudes are from 0 to this."""
SPREAD = 0.5
"""Standard deviation of the magnitude of one operation."""
LAYERS, CHANCE = 2, 0.5
"""Operations that are drawn for an image, and the chance of each to be carried out."""
MAX_PIXELS = 1 << 24
FILL = (124, 116, 104)
"""Of what geometric operations leave empty: the mean of ImageNet."""
_STREAM = 2
"""Tells the random stream of operations from those of `gigaxt.augment`."""


def _factor(share: float, sign: int) -> float:
    return max(0.1, 1 + 0.9 * sign * share)


OPERATIONS: dict[str, Callable[[float, int], float] | None] = {
    "AutoContrast": None,
    "Equalize": None,
    "Invert": None,
    "Rotate": lambda share, sign: 30 * sign * share,
    "PosterizeIncreasing": lambda share, _: max(
        1, 4 - int(4 * share)
    ),  # timm's 0 bits, a black image, are refused by Pillow
    "SolarizeIncreasing": lambda share, _: 256 - min(256, int(256 * share)),
    "SolarizeAdd": lambda share, _: min(128, int(110 * share)),
    "ColorIncreasing": _factor,
    "ContrastIncreasing": _factor,
    "BrightnessIncreasing": _factor,
    "SharpnessIncreasing": _factor,
    "ShearX": lambda share, sign: 0.3 * sign * share,
    "ShearY": lambda share, sign: 0.3 * sign * share,
    "TranslateXRel": lambda share, sign: 0.45 * sign * share,
    "TranslateYRel": lambda share, sign: 0.45 * sign * share,
}
"""timm's name -> its argument from the magnitude as a share of `MOST` and a sign; None: it takes none."""


class Operation(NamedTuple):
    """One operation with its argument."""

    name: str
    """One of `OPERATIONS`."""
    argument: float | None


def draw_operations(seed: int, magnitude: float) -> tuple[Operation, ...]:
    """What is done to one image, a pure function of the arguments.

    Args:
        seed: any integer from 0.
        magnitude: mean of the operations' magnitudes, 0 to `MOST`.

    Raises:
        ConfigError: a negative seed, or a magnitude out of range.
    """
    if seed < 0 or not 0 <= magnitude <= MOST:
        raise ConfigError(f"RandAugment: expected a seed from 0 and a magnitude from 0 to {MOST:g}, got {magnitude}")
    random, names = np.random.default_rng([seed, _STREAM]), list(OPERATIONS)
    drawn = []
    for _ in range(LAYERS):
        name = names[int(random.integers(len(names)))]
        carried_out, sign = random.random() < CHANCE, 1 if random.random() < 0.5 else -1
        share = float(np.clip(random.normal(magnitude, SPREAD), 0, MOST)) / MOST
        argument = OPERATIONS[name]
        if carried_out:
            drawn.append(Operation(name, None if argument is None else argument(share, sign)))
    return tuple(drawn)


class RandAugmented(Image):
    """A picture changed by operations, all of it at once, on the first read.

    Args:
        base: RGB of 8 bits without nodata, at most `MAX_PIXELS`. Geometric operations know nothing of masks.
        operations: of `draw_operations`.

    Raises:
        DataError: another image.
    """

    def __init__(self, base: Image, operations: tuple[Operation, ...]) -> None:
        if base.channels != 3 or base.dtype != np.uint8 or not base.all_valid:
            raise DataError(
                f"{base.name}: RandAugment is for RGB of 8 bits without nodata, got {base.channels} bands of "
                f"{base.dtype}; use input.rgb for grey pictures, else train.augment.colour and dihedral"
            )
        copy_description(self, base)
        self.name = f"{base.name}, augmented"  # what is remembered of a file is not taken for that of this
        self.base, self.operations = base, operations
        self.height, self.width = base.height, base.width
        self.levels = (Level(base.width, base.height, 1.0, 1.0),)
        self._pixels: NDArray[np.uint8] | None = None

    def __reduce__(self) -> tuple[type[RandAugmented], tuple[Image, tuple[Operation, ...]]]:
        return RandAugmented, (self.base, self.operations)

    def _read_inside(self, x: int, y: int, w: int, h: int, level: int) -> Pixels:
        if self._pixels is None:  # two threads that come here at once make the same
            self._pixels = self._changed()
        return self._pixels[y : y + h, x : x + w].copy()

    def _changed(self) -> NDArray[np.uint8]:
        if self.width * self.height > MAX_PIXELS:
            raise DataError(
                f"{self.name}: RandAugment holds the whole image: expected at most {MAX_PIXELS} px, got {self.width} x "
                f"{self.height}; set model.input.resize_px, or use train.augment.colour and dihedral"
            )
        from timm.data.auto_augment import NAME_TO_OP  # takes a second, and few images need it

        picture = Pillow.fromarray(self.base.read(0, 0, self.width, self.height))
        for name, argument in self.operations:
            operation: Any = NAME_TO_OP[name]  # timm has no types
            given = () if argument is None else (argument,)
            picture = operation(picture, *given, fillcolor=FILL, resample=Pillow.Resampling.BILINEAR)
        return np.asarray(picture)
