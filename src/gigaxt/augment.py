"""Augmentation of whole scenes without loading them: views that turn coordinates, and colours drawn once per scene.

The dihedral group. Element `k` from 0 to 7 turns an array in this order: transpose rows and columns if `k & 4`, then
reverse the rows if `k & 2`, then reverse the columns if `k & 1`. So 0 is the identity, 1 the mirror image, 2 upside
down, 3 the half turn, 4 the transpose, 5 a quarter turn clockwise, 6 a quarter turn counter-clockwise, 7 the other
transpose.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gigaxt.errors import ConfigError
from gigaxt.image.base import Image, Level, Mask, Pixels, Window, copy_pixels
from gigaxt.image.resize import resize
from gigaxt.image.views import band_index, copy_description, resample
from gigaxt.randaugment import RandAugmented

Array = TypeVar("Array", bound=NDArray[np.generic])
Along = TypeVar("Along", int, float)
Edges = NDArray[np.int64]
"""Ascending pixel coordinates of the lines of a lattice along one axis."""

_CROP = 1
"""Tells the random stream of crops from that of `draw_augmentation`."""


def turn(array: Array, k: int) -> Array:
    """The first two axes (row, col) of an array turned by element `k` of the dihedral group; a view where possible."""
    if k & 4:
        array = np.swapaxes(array, 0, 1)
    return cast(Array, array[:: -1 if k & 2 else 1, :: -1 if k & 1 else 1])


def inverse(k: int) -> int:
    """The element that undoes `k`: a transpose swaps which of the two reversals comes back."""
    return 4 | _swapped(k) if k & 4 else k


def compose(first: int, then: int) -> int:
    """The element equal to `first` followed by `then`."""
    reversals = _swapped(first) if then & 4 else first & 3
    return (first ^ then) & 4 | (reversals ^ then & 3)


def _swapped(k: int) -> int:
    return (k & 1) << 1 | (k & 2) >> 1


def dihedral(image: Image, k: int) -> Image:
    """A view of `image` turned by element `k` (0 to 7, see the module's text) of the dihedral group.

    Height, width, levels, `mpp` and `transform` are those of the turned image; windows are mapped to the image below
    and only the pixels read are turned. Masks are turned alike, by the same `k`. A view of a view is one view.

    Raises:
        ConfigError: `k` is not 0 to 7.
    """
    if not 0 <= k <= 7:
        raise ConfigError(f"expected an element 0 to 7 of the dihedral group, got {k}")
    if isinstance(image, ColourAugmented):  # colour stays outermost, where the model looks for it
        return ColourAugmented(dihedral(image.base, k), *image.colour)
    if isinstance(image, Dihedral):
        return dihedral(image.base, compose(image.k, k))
    return Dihedral(image, k) if k else image


def colour_augmented(image: Image, gain: ArrayLike, offset: ArrayLike) -> Image:
    """A view of `image` whose normalised pixels the model multiplies by `gain` and shifts by `offset`.

    `read` is unchanged: the view only carries `.colour = (gain, offset)`, each float32 (channels,), because the step
    belongs after the model's normalisation. Views add up: the inner one comes first. `select`
    and `resample_below` keep the colours; other views around this one hide them from the model.

    Raises:
        ConfigError: not one finite number for each channel.
    """
    gain, offset = (_per_channel(name, x, image.channels) for name, x in (("gain", gain), ("offset", offset)))
    if isinstance(image, ColourAugmented):
        inner_gain, inner_offset = image.colour
        image, gain, offset = image.base, gain * inner_gain, gain * inner_offset + offset
    return ColourAugmented(image, gain, offset)


def _per_channel(name: str, values: ArrayLike, channels: int) -> NDArray[np.float32]:
    array = np.asarray(values, dtype=np.float32)
    if array.shape != (channels,) or not np.isfinite(array).all():
        raise ConfigError(f"expected `{name}` to be {channels} finite numbers, one for each band, got {values!r}")
    return array


class Augmentation(NamedTuple):
    """What one scene gets in one step."""

    k: int
    """Element of the dihedral group, for `dihedral`."""
    gain: NDArray[np.float32]
    """(channels,), for `colour_augmented`."""
    offset: NDArray[np.float32]
    """(channels,), in standard deviations of the normalised bands."""


def draw_augmentation(seed: int, channels: int, *, dihedral: bool, colour: float, mirror: bool = False) -> Augmentation:
    """Draw the augmentation of one scene and step. A pure function of its arguments.

    Args:
        seed: any integer from 0; the loop derives it from run, scene and step.
        channels: bands of the image.
        dihedral: draw one of the eight turns, each as likely; otherwise no turn.
        mirror: without `dihedral`: draw the mirror image half of the time.
        colour: strength; gains lie within exp(±colour), offsets within ±colour. Half of either is shared by all
            bands (brightness, contrast), half is each band's own (hue). 0 changes nothing.

    Raises:
        ConfigError: a negative seed or strength.
    """
    if seed < 0 or not 0 <= colour < np.inf:
        raise ConfigError(f"expected a seed and a `colour` strength of at least 0, got {seed} and {colour}")
    # All numbers are drawn whatever is switched on, so that a switch does not change what the other one draws.
    uniform = np.random.default_rng(seed).random(3 + 2 * channels)
    shared, own = 2 * uniform[1:3, None] - 1, 2 * uniform[3:].reshape(2, channels) - 1
    log_gain, offset = colour * (shared + own) / 2
    k = int(uniform[0] * (8 if dihedral else 2 if mirror else 1))
    return Augmentation(k, np.exp(log_gain).astype(np.float32), offset.astype(np.float32))


def draw_crop(height: int, width: int, seed: int, min_area: float) -> tuple[int, int, int, int]:
    """A window (x, y, w, h) of an image, of random size, shape and place.

    Szegedy et al.: Going deeper with convolutions, 2014. Its area is uniform between `min_area` and 1 of the image's,
    the logarithm of its aspect ratio between 3:4 and 4:3.
    Where ten draws in turn do not fit into the image, it is the largest window in the middle with the nearest ratio.
    timm and torchvision resize it at once and call it a random resized crop; here that is up to the model's `input`.

    Args:
        height: of the image, px.
        width: of the image, px.
        seed: any integer from 0.
        min_area: smallest share of the image, 0 to 1.
    """
    random, (low, high) = np.random.default_rng([seed, _CROP]), (3 / 4, 4 / 3)
    for area, log_ratio, across, down in random.random((10, 4)):
        pixels = height * width * (min_area + (1 - min_area) * area)
        ratio = float(np.exp(np.log(low) + (np.log(high) - np.log(low)) * log_ratio))
        w, h = round(float(np.sqrt(pixels * ratio))), round(float(np.sqrt(pixels / ratio)))
        if 0 < w <= width and 0 < h <= height:
            return int(across * (width - w + 1)), int(down * (height - h + 1)), w, h
    w, h = max(1, min(width, round(height * high))), max(1, min(height, round(width / low)))
    return (width - w) // 2, (height - h) // 2, w, h


def below_turns(image: Image, row_edges: Edges, col_edges: Edges) -> tuple[Image, Edges, Edges, int]:
    """The image below the views of this module, and a lattice of `image` as lines on that one.

    What is found for each cell of the lattice below, (rows, cols), becomes that of `image` by `turn(found, k)`.
    Reading in the file's own direction matters: columns of a striped file cost a decode of the whole file each.

    Args:
        image: any image; the views of this module are looked through.
        row_edges: lines of the lattice in px of `image`, the first 0, the last its height.
        col_edges: the same for columns.

    Returns:
        (image below, row edges, column edges, k).
    """
    if isinstance(image, ColourAugmented):
        return below_turns(image.base, row_edges, col_edges)
    if not isinstance(image, Dihedral):
        return image, row_edges, col_edges, 0
    if image.k & 2:
        row_edges = (image.height - row_edges)[::-1]
    if image.k & 1:
        col_edges = (image.width - col_edges)[::-1]
    if image.k & 4:
        row_edges, col_edges = col_edges, row_edges
    return image.base, row_edges, col_edges, image.k


def resample_below(image: Image, scale_x: float, scale_y: float, *, nearest: bool = False) -> Image:
    """`resample` applied to the image below the views of this module, which stay outermost.

    So the model still finds the colours, the lattice is still found in the file's direction, and the resampled pixels
    are those that prediction sees. Arguments as of `resample`, in the directions of `image`.
    """
    return _change_below(image, scale_x, scale_y, lambda below, x, y: resample(below, x, y, nearest=nearest))


def resize_below(image: Image, width: int, height: int, *, nearest: bool = False) -> Image:
    """`resize` applied to the image below the views of this module, as `resample_below`."""
    return _change_below(image, width, height, lambda below, w, h: resize(below, w, h, nearest=nearest))


def _change_below(image: Image, x: Along, y: Along, change: Callable[[Image, Along, Along], Image]) -> Image:
    """`change` applied to the image below the views, with what it takes along x and y turned as that image is."""
    if isinstance(image, ColourAugmented):
        return ColourAugmented(_change_below(image.base, x, y, change), *image.colour)
    if isinstance(image, RandAugmented):
        return RandAugmented(_change_below(image.base, x, y, change), image.operations)
    if isinstance(image, Dihedral):
        return Dihedral(_change_below(image.base, *((y, x) if image.k & 4 else (x, y)), change), image.k)
    return change(image, x, y)


class Dihedral(Image):
    """See `dihedral`, which makes these.

    Attributes:
        base: the image below.
        k: the element of the group, 1 to 7.
    """

    def __init__(self, base: Image, k: int) -> None:
        copy_description(self, base)
        self.base, self.k = base, k
        self.height, self.width, self.levels = base.height, base.width, base.levels
        if k & 4:
            self.height, self.width = base.width, base.height
            self.levels = tuple(
                Level(size.height, size.width, size.downsample_y, size.downsample_x) for size in base.levels
            )
            self.mpp = None if base.mpp is None else (base.mpp[1], base.mpp[0])
        if base.transform is not None:
            self.transform = _turned_transform(base.transform, self.width, self.height, k)

    @property
    def all_valid(self) -> bool:
        """See `Image.all_valid`."""
        return self.base.all_valid

    def select(self, bands: Sequence[int | str]) -> Image:
        """As `Image.select`; the turn stays outermost."""
        return Dihedral(self.base.select(bands), self.k)

    def _read_inside(self, x: int, y: int, w: int, h: int, level: int) -> Pixels:
        return self._turned(self.base._read_inside(*self._window_below(x, y, w, h, level), level))

    def _read_bands(self, bands: tuple[int, ...], x: int, y: int, w: int, h: int, level: int) -> Pixels:
        return self._turned(self.base._read_bands(bands, *self._window_below(x, y, w, h, level), level))

    def _read_valid_inside(
        self, x: int, y: int, w: int, h: int, level: int, bands: tuple[int, ...] | None = None
    ) -> tuple[Pixels, Mask]:
        pixels, mask = self.base._read_valid_inside(*self._window_below(x, y, w, h, level), level, bands)
        return self._turned(pixels), np.ascontiguousarray(turn(mask, self.k))

    def _read_each(
        self, out: Sequence[Pixels], windows: Sequence[Window], level: int, bands: tuple[int, ...] | None = None
    ) -> None:
        below = [self._window_below(*window, level) for window in windows]
        self.base._read_each([turn(target, inverse(self.k)) for target in out], below, level, bands)

    def _expect(self, windows: Sequence[Window], level: int, bands: tuple[int, ...]) -> None:
        self.base._expect([self._window_below(*window, level) for window in windows], level, bands)

    def _turned(self, pixels: Pixels) -> Pixels:
        view = turn(pixels, self.k)
        turned = np.empty(view.shape, view.dtype)
        copy_pixels(turned, view)
        return turned

    def _window_below(self, x: int, y: int, w: int, h: int, level: int) -> tuple[int, int, int, int]:
        size = self.levels[level]
        if self.k & 2:
            y = size.height - y - h
        if self.k & 1:
            x = size.width - x - w
        return (y, x, h, w) if self.k & 4 else (x, y, w, h)


def _turned_transform(
    transform: tuple[float, float, float, float, float, float], width: int, height: int, k: int
) -> tuple[float, float, float, float, float, float]:
    """The affine transform of a turned image of `width` x `height`: its pixel -> the base's pixel -> the crs."""
    below = np.eye(3)  # (col, row, 1) of the view -> (col, row, 1) of the base
    if k & 2:
        below = np.array([[1, 0, 0], [0, -1, height], [0, 0, 1]]) @ below
    if k & 1:
        below = np.array([[-1, 0, width], [0, 1, 0], [0, 0, 1]]) @ below
    if k & 4:
        below = below[[1, 0, 2]]
    a, b, c, d, e, f = (np.array(transform).reshape(2, 3) @ below).ravel().tolist()
    return a, b, c, d, e, f


class ColourAugmented(Image):
    """See `colour_augmented`, which makes these.

    Attributes:
        base: the image below.
        colour: (gain, offset), each float32 (channels,).
    """

    def __init__(self, base: Image, gain: NDArray[np.float32], offset: NDArray[np.float32]) -> None:
        copy_description(self, base)
        self.height, self.width, self.levels = base.height, base.width, base.levels
        self.base, self.colour = base, (gain, offset)

    @property
    def all_valid(self) -> bool:
        """See `Image.all_valid`."""
        return self.base.all_valid

    def select(self, bands: Sequence[int | str]) -> Image:
        """As `Image.select`; the chosen bands keep their colours."""
        index = [band_index(self.base, band) for band in bands]
        gain, offset = self.colour
        return ColourAugmented(self.base.select(bands), gain[index], offset[index])

    def _read_inside(self, x: int, y: int, w: int, h: int, level: int) -> Pixels:
        return self.base._read_inside(x, y, w, h, level)

    def _read_bands(self, bands: tuple[int, ...], x: int, y: int, w: int, h: int, level: int) -> Pixels:
        return self.base._read_bands(bands, x, y, w, h, level)

    def _read_valid_inside(
        self, x: int, y: int, w: int, h: int, level: int, bands: tuple[int, ...] | None = None
    ) -> tuple[Pixels, Mask]:
        return self.base._read_valid_inside(x, y, w, h, level, bands)

    def _read_each(
        self, out: Sequence[Pixels], windows: Sequence[Window], level: int, bands: tuple[int, ...] | None = None
    ) -> None:
        self.base._read_each(out, windows, level, bands)

    def _expect(self, windows: Sequence[Window], level: int, bands: tuple[int, ...]) -> None:
        self.base._expect(windows, level, bands)
