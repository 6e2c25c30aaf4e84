"""Several files as the bands of one image."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from gigaxt.errors import ImageError
from gigaxt.image.base import Image, Mask, Pixels, Window
from gigaxt.image.views import Resampled, Select, copy_description, true_factors


class _Source(NamedTuple):
    levels: tuple[Image, ...]
    """The source on the grid of each level."""
    first: int
    """Its first band's index."""


class BandsImage(Image):
    """Several images as bands of one, on the grid of one of them. A pixel is valid where it is in every band.

    Args:
        images: the sources, of one or several bands.
        stems: what each is called.
        grid: which source's size, levels, transform and pixel size count.
        names: a name for each band; None: the stem, with the band's own name after "_" for a source of several.
        nearest: resample by the nearest pixel instead of bilinear or mean.

    Raises:
        ImageError: a source that covers another extent, or names that do not fit.
    """

    def __init__(
        self, images: Sequence[Image], stems: Sequence[str], grid: int, names: Sequence[str] | None, *, nearest: bool
    ) -> None:
        model = images[grid]
        copy_description(self, model)
        self.name = " + ".join(image.name for image in images)
        self.height, self.width, self.levels = model.height, model.width, model.levels
        self.channels = sum(image.channels for image in images)
        self.dtype = np.result_type(*(image.dtype for image in images))
        shared = {str(image.nodata) for image in images}
        self.nodata = model.nodata if len(shared) == 1 else None
        self.band_names = _band_names(self.name, images, stems, names)
        self._all_valid = all(image.all_valid for image in images)
        self._sources: list[_Source] = []
        first = 0
        for image in images:
            self._sources.append(_Source(_on_grid(image, model, nearest), first))
            first += image.channels

    @property
    def all_valid(self) -> bool:
        """See `Image.all_valid`."""
        return self._all_valid

    def _read_inside(self, x: int, y: int, w: int, h: int, level: int) -> Pixels:
        return self._read_bands(tuple(range(self.channels)), x, y, w, h, level)

    def _read_bands(self, bands: tuple[int, ...], x: int, y: int, w: int, h: int, level: int) -> Pixels:
        out = np.empty((h, w, len(bands)), self.dtype)
        for places, part, at in self._parts(bands, level):
            out[..., places] = part.read(x, y, w, h, at)
        return out

    def _read_valid_inside(
        self, x: int, y: int, w: int, h: int, level: int, bands: tuple[int, ...] | None = None
    ) -> tuple[Pixels, Mask]:
        bands = tuple(range(self.channels)) if bands is None else bands
        out, mask = np.empty((h, w, len(bands)), self.dtype), np.ones((h, w), np.bool_)
        for places, part, at in self._parts(bands, level):
            out[..., places], valid = part.read_valid(x, y, w, h, at)
            mask &= valid
        return out, mask

    def _expect(self, windows: Sequence[Window], level: int, bands: tuple[int, ...]) -> None:
        for _, part, at in self._parts(bands, level):
            part.expect(windows, at)

    def _parts(self, bands: tuple[int, ...], level: int) -> list[tuple[list[int], Image, int]]:
        """For each source that has any of `bands`: their places in the result, an image of them, its level."""
        parts = []
        for levels, first in self._sources:
            image = levels[level] if len(levels) > 1 else levels[0]
            at = level if len(levels) == 1 else 0
            wanted = [(place, band - first) for place, band in enumerate(bands) if 0 <= band - first < image.channels]
            if wanted:
                own = [band for _, band in wanted]
                whole = own == list(range(image.channels))
                parts.append(([place for place, _ in wanted], image if whole else Select(image, own), at))
        return parts


def open_bands(
    sources: Sequence[Any],
    *,
    grid: int | str = 0,
    names: Sequence[str] | None = None,
    resampling: Literal["bilinear", "nearest"] = "bilinear",
) -> Image:
    """Open several files of the same place as bands of one image.

    Sources with a transform are placed by it; else they must cover the same extent and differ in scale only. A source
    finer than the grid is averaged, a coarser one interpolated. A pixel is valid where it is valid in every band.

    Args:
        sources: what `open_image` takes, each with one band or more.
        grid: the source whose size and place the result has: its index, or its file name without suffix.
        names: one for each band of the result; by default the file names without suffix ("array 0" for arrays).
        resampling: "bilinear" (mean where it shrinks), or "nearest" for classes.

    Raises:
        ImageError: a source cannot be opened, covers another extent, or has another CRS; names that do not fit.
    """
    from gigaxt.image.open import open_image  # which knows this module

    if not sources:
        raise ImageError("open_bands", "expected at least one source")
    if resampling not in ("bilinear", "nearest"):
        raise ImageError("open_bands", f"expected resampling 'bilinear' or 'nearest', got {resampling!r}")
    images = [open_image(source) for source in sources]
    stems = [
        Path(source).name.split(".")[0] if isinstance(source, str | Path) else _stem(source, number)
        for number, source in enumerate(sources)
    ]
    if isinstance(grid, str):
        if grid not in stems:
            raise ImageError("open_bands", f"expected grid to be one of {', '.join(stems)}, got {grid!r}")
        grid = stems.index(grid)
    if not 0 <= grid < len(images):
        raise ImageError("open_bands", f"expected grid from 0 to {len(images) - 1}, got {grid}")
    return BandsImage(images, stems, grid, names, nearest=resampling == "nearest")


def _stem(source: Any, number: int) -> str:
    return Path(source.name).name.split(".")[0] if isinstance(source, Image) else f"array {number}"


def _band_names(
    name: str, images: Sequence[Image], stems: Sequence[str], names: Sequence[str] | None
) -> tuple[str, ...]:
    if names is None:
        names = [
            stem if image.channels == 1 else f"{stem}_{band}"
            for stem, image in zip(stems, images, strict=True)
            for band in image.band_names
        ]
    channels = sum(image.channels for image in images)
    if len(names) != channels or len(set(names)) != channels:
        raise ImageError(name, f"expected {channels} different band names, got {', '.join(names)}: give them as names=")
    return tuple(names)


def _on_grid(image: Image, model: Image, nearest: bool) -> tuple[Image, ...]:
    """`image` on the grid of each of `model`'s levels; one image with the same levels where it lies there already."""
    scale, offset = _placement(image, model)
    same = scale == (1.0, 1.0) and offset == (0.0, 0.0) and (image.width, image.height) == (model.width, model.height)
    if same and image.levels == model.levels:
        return (image,)
    views: list[Image] = []
    for number, level in enumerate(model.levels):
        dx, dy = true_factors(model, number)
        by = (scale[0] * dx, scale[1] * dy)
        views.append(Resampled(image, level.width, level.height, by, offset, nearest=nearest))
    if same:
        views[0] = image
    return tuple(views)


def _placement(image: Image, model: Image) -> tuple[tuple[float, float], tuple[float, float]]:
    """Scale and offset of `model`'s grid in px of `image`."""
    if image.transform is None or model.transform is None:
        scale = (image.width / model.width, image.height / model.height)
        unequal = abs(image.width - model.width * scale[1]) > max(1.0, scale[1])
        if unequal and abs(image.height - model.height * scale[0]) > max(1.0, scale[0]):
            raise _mismatch(image, model, f"{image.width} x {image.height} px against {model.width} x {model.height}")
        return scale, (0.0, 0.0)
    if image.crs != model.crs:
        raise _mismatch(image, model, f"CRS {image.crs} against {model.crs}: reproject it first (e.g. gdalwarp)")
    a, b, c, d, e, f = image.transform
    ma, mb, mc, md, me, mf = model.transform
    if b or d or mb or md:
        if image.transform == model.transform and (image.width, image.height) == (model.width, model.height):
            return (1.0, 1.0), (0.0, 0.0)
        raise _mismatch(image, model, "a rotated transform: warp it to the grid first (e.g. gdalwarp)")
    scale, offset = (_snap(ma / a), _snap(me / e)), (_snap((mc - c) / a), _snap((mf - f) / e))
    sizes = ((image.width, model.width), (image.height, model.height))
    for axis, (size, over), by, start in zip("xy", sizes, scale, offset, strict=True):
        slack = 1.01 * max(1.0, by)  # one px of the coarser of the two
        if by <= 0 or abs(start) > slack or abs(start + over * by - size) > slack:
            covered = f"{start:.1f} to {start + over * by:.1f}"
            raise _mismatch(image, model, f"one of {size} px along {axis}, of which the grid covers {covered}")
    return scale, offset


def _snap(value: float) -> float:
    """The whole number that a quotient of rounded metres stands for."""
    return float(round(value)) if abs(value - round(value)) < 1e-6 * max(1.0, abs(value)) else value


def _mismatch(image: Image, model: Image, cause: str) -> ImageError:
    return ImageError(image.name, f"expected the extent of {model.name}, got {cause}")
