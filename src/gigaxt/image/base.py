"""`Image`: a raster, on disk or in memory, that is read window by window."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gigaxt.errors import ImageError

Pixels = NDArray[np.generic]
"""(height, width, channels) in the file's dtype."""
Mask = NDArray[np.bool_]
"""(height, width), True where a pixel is real."""
Window = tuple[int, int, int, int]
"""(x, y, w, h) in px of a level."""
_MANY = 16  # bands; with fewer, NumPy is faster a band at a time: with three of them ten times


class Level(NamedTuple):
    """One resolution of an image. Downsample factors are measured, not assumed to be powers of two."""

    width: int
    height: int
    downsample_x: float
    downsample_y: float


class Image(ABC):
    """A raster that is read window by window. Thread-safe, fork-safe and picklable.

    Subclasses set the attributes below in `__init__`, keep only a path and options in their pickled state, open handles
    lazily per process, and implement `_read_inside` (and `_valid_inside` where the format has a mask of its own, or
    `_read_valid_inside` where pixels and mask come from one decode).

    Attributes:
        name: what errors call it: the path, or a description of the array.
        height: rows of level 0, px.
        width: columns of level 0, px.
        channels: number of bands.
        dtype: of the pixels, as stored.
        levels: resolutions, level 0 first.
        nodata: the value of pixels that hold nothing (may be NaN), or None.
        mpp: micrometres per pixel of level 0 as (x, y), or None.
        crs: "EPSG:32633" or WKT, or None.
        crs_unit_m: metres per unit of the crs where the file says it, or None.
        transform: (a, b, c, d, e, f) with x = a*col + b*row + c, y = d*col + e*row + f in the crs, or None.
        band_names: one name a band; "1", "2", ... where the file has none.
        orientation: the EXIF/TIFF orientation (1 = as stored). Reported, never applied.
        pages: how many of the file's pages are read, and how many are of this size: more in a stack.
    """

    name: str
    height: int
    width: int
    channels: int
    dtype: np.dtype[np.generic]
    levels: tuple[Level, ...]
    nodata: float | None = None
    mpp: tuple[float, float] | None = None
    crs: str | None = None
    crs_unit_m: float | None = None
    transform: tuple[float, float, float, float, float, float] | None = None
    band_names: tuple[str, ...] = ()
    orientation: int = 1
    pages: tuple[int, int] = (1, 1)

    def read(self, x: int, y: int, w: int, h: int, level: int = 0) -> Pixels:
        """Pixels of a window, shape (h, w, channels), in the file's dtype.

        Args:
            x: left edge in px of `level`; may lie outside the image.
            y: top edge in px of `level`.
            w: width in px, at least 1.
            h: height in px, at least 1.
            level: which resolution.

        Pixels outside the image are `nodata` (0 where the image has none).

        Raises:
            ImageError: the file cannot be read there; names the file, the window and the cause.
        """
        return self._window(x, y, w, h, level, want_validity=False)[0]

    def validity(self, x: int, y: int, w: int, h: int, level: int = 0) -> Mask:
        """Which pixels of a window are real: inside the image, not nodata, not masked. Shape (h, w)."""
        return self.read_valid(x, y, w, h, level)[1]

    def read_valid(self, x: int, y: int, w: int, h: int, level: int = 0) -> tuple[Pixels, Mask]:
        """`read` and `validity` from one decode. A pixel is nodata where every band is."""
        pixels, mask = self._window(x, y, w, h, level, want_validity=True)
        assert mask is not None
        return pixels, mask

    def read_into(self, out: Sequence[Pixels], windows: Sequence[Window], level: int = 0) -> None:
        """`read` of many windows at once, each into an array of its own.

        From TIFF, what lies together in the file is fetched together, and what several windows share is decoded once.
        Other formats read one window after the other.

        Args:
            out: (h, w, channels) each, such as the rows of a stack; of the file's dtype or one that holds its values.
            windows: (x, y, w, h) in px of `level`; may lie outside the image, where `out` gets what `read` gives.
            level: which resolution.

        Raises:
            ImageError: as `read` does.
        """
        targets, inside = [], []
        for target, window in zip(out, windows, strict=True):
            _, _, w, h = window
            self._check_window(w, h, level)
            size = self.levels[level]
            if target.shape != (h, w, self.channels):
                raise ImageError(self.name, f"expected an array of {(h, w, self.channels)}, got {target.shape}")
            if not lies_inside(window, size.height, size.width):
                target[...] = self._outside
                part = self._clipped(*window, level)
                if part is None:
                    continue
                target, window = target[_place_in(window, part)], part
            targets.append(target)
            inside.append(window)
        self._read_each(targets, inside, level)

    def expect(self, windows: Sequence[Window], level: int = 0) -> None:
        """Announce windows that are read next, so that what lies together in the file is fetched together.

        Changes no result and raises nothing: the read itself reports what cannot be fetched. Only TIFF needs it.

        Args:
            windows: (x, y, w, h) in px of `level`; may lie outside the image.
            level: which resolution.
        """
        if 0 <= level < len(self.levels):
            inside = [part for part in (self._clipped(*window, level) for window in windows) if part is not None]
            self._expect(inside, level, tuple(range(self.channels)))

    @property
    def all_valid(self) -> bool:
        """True where every pixel inside the image is known to be real without reading: no nodata, no mask."""
        own_mask = (type(self)._valid_inside, type(self)._read_valid_inside) != (
            Image._valid_inside,
            Image._read_valid_inside,
        )
        return self.nodata is None and not own_mask

    @property
    def gsd_m(self) -> tuple[float, float] | None:
        """Ground sample distance in metres as (x, y) where the transform's unit is a length, else None."""
        if self.transform is None or self.crs is None:
            return None
        unit = self.crs_unit_m or (1.0 if crs_is_metric(self.crs) else None)
        if unit is None:
            return None
        a, b, _, d, e, _ = self.transform
        return unit * float(np.hypot(a, d)), unit * float(np.hypot(b, e))

    def select(self, bands: Sequence[int | str]) -> Image:
        """A view with some bands only, in the order given, by name or by index from 0.

        Raises:
            ImageError: a band that the image does not have.
        """
        from gigaxt.image.views import Select  # views are Images themselves: imported late, against a cycle

        return Select(self, bands)

    @abstractmethod
    def _read_inside(self, x: int, y: int, w: int, h: int, level: int) -> Pixels:
        """Read a window that lies wholly inside `level`."""

    def _read_bands(self, bands: tuple[int, ...], x: int, y: int, w: int, h: int, level: int) -> Pixels:
        """`_read_inside` of some bands; formats that store bands apart read only those."""
        return self._read_inside(x, y, w, h, level)[..., list(bands)]

    def _valid_inside(self, x: int, y: int, w: int, h: int, level: int) -> Mask | None:
        """The format's own mask of a window inside `level`; None where it has none."""
        return None

    def _read_valid_inside(
        self, x: int, y: int, w: int, h: int, level: int, bands: tuple[int, ...] | None = None
    ) -> tuple[Pixels, Mask]:
        """`_read_inside` (or `_read_bands`) and the whole validity of that window."""
        inside = self._read_inside(x, y, w, h, level) if bands is None else self._read_bands(bands, x, y, w, h, level)
        return inside, self._validity_of(inside, x, y, level)

    def _read_each(
        self, out: Sequence[Pixels], windows: Sequence[Window], level: int, bands: tuple[int, ...] | None = None
    ) -> None:
        """`_read_inside` (or `_read_bands`) of each window into its array; formats that can read them together do."""
        if len(windows) > 1:
            self._expect(windows, level, tuple(range(self.channels)) if bands is None else bands)
        for target, window in zip(out, windows, strict=True):
            read = self._read_inside(*window, level) if bands is None else self._read_bands(bands, *window, level)
            copy_pixels(target, read)

    def _expect(self, windows: Sequence[Window], level: int, bands: tuple[int, ...]) -> None:
        """`expect` of some bands in windows inside `level`: fetch what they need, where the format has a way."""
        return

    def _clipped(self, x: int, y: int, w: int, h: int, level: int) -> Window | None:
        """The part of a window that lies inside `level`; None: nothing does."""
        size = self.levels[level]
        x0, y0, x1, y1 = max(x, 0), max(y, 0), min(x + w, size.width), min(y + h, size.height)
        return (x0, y0, x1 - x0, y1 - y0) if x1 > x0 and y1 > y0 else None

    def _window(self, x: int, y: int, w: int, h: int, level: int, *, want_validity: bool) -> tuple[Pixels, Mask | None]:
        self._check_window(w, h, level)
        part = self._clipped(x, y, w, h, level)
        if part == (x, y, w, h):
            return self._read_part(part, level, want_validity=want_validity)
        pixels = np.full((h, w, self.channels), self._outside, dtype=self.dtype)
        mask = np.zeros((h, w), dtype=np.bool_) if want_validity else None
        if part is not None:
            place = _place_in((x, y, w, h), part)
            pixels[place], inside = self._read_part(part, level, want_validity=want_validity)
            if mask is not None and inside is not None:
                mask[place] = inside
        return pixels, mask

    def _check_window(self, w: int, h: int, level: int) -> None:
        if not 0 <= level < len(self.levels):
            raise ImageError(self.name, f"expected a level from 0 to {len(self.levels) - 1}, got {level}")
        if w < 1 or h < 1:
            raise ImageError(self.name, f"expected a window of at least 1 x 1 px, got {w} x {h}")

    @property
    def _outside(self) -> NDArray[np.generic]:
        """What pixels outside the image are, as the file would store it: of shape ()."""
        return np.full((), 0 if self.nodata is None else self.nodata, dtype=self.dtype)

    def _read_part(self, part: Window, level: int, *, want_validity: bool) -> tuple[Pixels, Mask | None]:
        """A window that lies wholly inside `level`."""
        if want_validity:
            return self._read_valid_inside(*part, level)
        return self._read_inside(*part, level), None

    def _validity_of(self, pixels: Pixels, x: int, y: int, level: int) -> Mask:
        h, w = pixels.shape[:2]
        own = self._valid_inside(x, y, w, h, level)
        mask = np.ones((h, w), dtype=np.bool_) if own is None else own
        if self.nodata is not None:
            mask = mask & not_nodata(pixels, self.nodata)
        return mask

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name} {self.width} x {self.height} px, {self.channels} x {self.dtype}>"


def lies_inside(window: Window, height: int, width: int) -> bool:
    """Whether no pixel of a window lies outside an image of this size."""
    x, y, w, h = window
    return x >= 0 and y >= 0 and x + w <= width and y + h <= height


def _place_in(window: Window, part: Window) -> tuple[slice, slice]:
    """Rows and columns that a part of a window takes up in it."""
    left, top = part[0] - window[0], part[1] - window[1]
    return slice(top, top + part[3]), slice(left, left + part[2])


def copy_pixels(target: Pixels, pixels: Pixels) -> None:
    """`target[...] = pixels` of (h, w, bands), fast also where one of them is turned or its bands are not adjacent.

    There NumPy's innermost loop would run over the bands, of which pictures have three. A band at a time takes a
    quarter of the time.
    """
    bands, to, of = target.shape[2], target.strides, pixels.strides
    if bands > 3 or (to[1] == bands * to[2] and of[1] == bands * of[2]):
        target[...] = pixels
        return
    for band in range(bands):
        target[..., band] = pixels[..., band]


def not_nodata(pixels: Pixels, nodata: float) -> Mask:
    """Where not every band of `pixels` (h, w, channels) is `nodata`. Shape (h, w)."""
    value = np.asarray(nodata).astype(pixels.dtype)

    def real(part: Pixels) -> Mask:
        differs: Mask = np.logical_not(np.isnan(part)) if np.isnan(nodata) else np.not_equal(part, value)
        return differs

    if pixels.shape[2] > _MANY:
        found: Mask = np.any(real(pixels), axis=2)
        return found
    found = real(pixels[..., 0])
    for band in range(1, pixels.shape[2]):
        found |= real(pixels[..., band])
    return found


def crs_is_metric(crs: str) -> bool:
    """Whether a CRS counts in metres, as far as its text tells (UTM, polar and web Mercator codes; WKT with metres)."""
    text = crs.upper()
    if text.startswith("EPSG:"):
        code = int(text[5:]) if text[5:].isdigit() else 0
        return 32601 <= code <= 32760 or code in (3857, 3395, 3031, 3413, 3035) or 25801 <= code <= 25860
    return text.startswith(("PROJCS", "PROJCRS")) and ("METRE" in text or "METER" in text)
