"""Training on windows of scenes: which part of a scene a step sees, drawn from the run's seed."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gigaxt.errors import DataError
from gigaxt.image.base import Image
from gigaxt.image.views import Cropped
from gigaxt.regions import core_px
from gigaxt.scenes.inputs import InputConfig, to_pixel_size
from gigaxt.scenes.kept import kept_regions
from gigaxt.targets.base import MaskTarget, SceneTarget, WindowTarget
from gigaxt.training.config import RunConfig

WindowXYWH = tuple[int, int, int, int]

SCENES = 32
"""Scenes whose views are kept."""
MARGIN = 8
"""An object that a window is drawn around lies at least this fraction (1 / MARGIN) of its side inside of it."""
_WINDOW, _OBJECT = 3, 4
"""Tell the random streams of windows from those of `gigaxt.augment`."""


def windows_of(config: RunConfig) -> Windows | None:
    """What draws windows of a run's scenes; None where scenes are seen whole."""
    settings, model = config.train, config.model
    if settings.window is None:
        return None
    return Windows(
        settings.window,
        model.input,
        model.region_encoder.region,
        ignore=getattr(model.head, "ignore", None),
        context=settings.window_context,
        objects=settings.window_objects,
    )


class Windows:
    """Draws windows that hold data and, of masks, something to learn. A pure function of seed and scene.

    A scene is divided into cells of a window's size. One of those with something in it is drawn, each as likely, and
    moved by up to half its size, unless nothing would be left in it.

    Args:
        side: of a window, px of the model; a smaller scene is one window.
        model: input of the model.
        region: of the model, px.
        ignore: mask value of pixels that do not count.
        context: give the whole scene, and say that only the window counts.
        objects: share of windows around an object, which lies anywhere in them but near the border.
    """

    def __init__(
        self,
        side: int,
        model: InputConfig,
        region: int,
        *,
        ignore: int | None = None,
        context: bool = False,
        objects: float = 0.0,
    ) -> None:
        self.side, self.model, self.region, self.ignore, self.context = side, model, region, ignore, context
        self.objects = objects
        self._filled: dict[tuple[int, int, int], bool] = {}
        self._scenes: OrderedDict[int, tuple[Image, Image, SceneTarget]] = OrderedDict()

    def take(self, index: int, image: Image, target: SceneTarget, seed: int) -> tuple[Image, SceneTarget]:
        """A window of a scene with its target, or the scene with a target of which only the window counts.

        Args:
            index: tells scenes apart.
            image: as on disk; what is returned has the pixel size of the model.
            target: of that image.
            seed: any integer from 0.

        Raises:
            DataError: no window holds anything. ImageError: a file cannot be read.
        """
        seen, own = self._scene(index, image, target)
        window = self.draw(index, seen, own, seed)
        if self.context:
            return seen, WindowTarget(own, window, (seen.width, seen.height))
        return Cropped(seen, *window), own.cropped(*window)

    def draw(self, index: int, image: Image, target: SceneTarget, seed: int) -> WindowXYWH:
        """The window, (x, y, w, h) px of an image at the model's pixel size; arguments and errors as of `take`."""
        random = np.random.default_rng([seed, _WINDOW])
        rows, cols = -(-image.height // self.side), -(-image.width // self.side)
        shift_x, shift_y = random.integers(-(self.side // 2), self.side // 2 + 1, 2)
        around = self._around_object(image, target, seed)
        if around is not None and self._counts(image, target, around):
            return around
        for cell in random.permutation(rows * cols).tolist():
            row, col = divmod(cell, cols)
            # Spread evenly, so that the last ones do not lie on those before.
            across, down = (
                at * max(size - self.side, 0) // max(1, n - 1)
                for at, size, n in ((col, image.width, cols), (row, image.height, rows))
            )
            aligned = self._at(image, across, down)
            key = (index, row, col)
            if key not in self._filled:
                self._filled[key] = self._counts(image, target, aligned)
            if self._filled[key]:
                moved = self._at(image, aligned[0] + int(shift_x), aligned[1] + int(shift_y))
                return moved if self._counts(image, target, moved) else aligned
        raise DataError(f"{image.name}: none of its windows of {self.side} px holds a labelled pixel with data")

    def _around_object(self, image: Image, target: SceneTarget, seed: int) -> WindowXYWH | None:
        """A window with an object in it; None where the share of such windows is used up, or there is no object."""
        random = np.random.default_rng([seed, _OBJECT])
        places, weights = target.objects_at()
        if random.random() >= self.objects or not weights.sum():
            return None
        row, col = places[random.choice(len(places), p=weights / weights.sum())]
        margin = self.side // MARGIN
        left, up = random.integers(margin, self.side - margin, 2)
        return self._at(image, int(col) - int(left), int(row) - int(up))

    def _scene(self, index: int, image: Image, target: SceneTarget) -> tuple[Image, SceneTarget]:
        """Both at the model's pixel size; the same objects each time, so that what is found of them can be kept."""
        if index not in self._scenes or self._scenes[index][0] is not image:
            seen, moved = to_pixel_size(image, self.model, target)
            assert moved is not None
            self._scenes[index] = (image, seen, moved)
            if len(self._scenes) > SCENES:
                self._scenes.popitem(last=False)
        return self._scenes[index][1:]

    def _at(self, image: Image, x: int, y: int) -> WindowXYWH:
        """The window there, moved into the image."""
        w, h = min(self.side, image.width), min(self.side, image.height)
        return int(np.clip(x, 0, image.width - w)), int(np.clip(y, 0, image.height - h)), w, h

    def _counts(self, image: Image, target: SceneTarget, window: WindowXYWH) -> bool:
        known: NDArray[Any] = np.ones(window[3:1:-1], dtype=np.bool_)  # (h, w)
        if isinstance(target, MaskTarget):
            drawn = target.draw(*window)
            values = drawn["target"]
            bands = ~np.isnan(values) if values.dtype.kind == "f" else values != self.ignore
            known = drawn["valid"] & (bands if bands.ndim == 2 else bands.any(axis=0))
        if not known.any():
            return False
        if not image.all_valid and not (known & image.validity(*window)).any():
            return False
        return self.model.foreground is None or self._has_foreground(image, window)

    def _has_foreground(self, image: Image, window: WindowXYWH) -> bool:
        """Whether a region of the window will be encoded."""
        x, y, w, h = window
        if self.context:
            keep, core = kept_regions(image, self.model, self.region), core_px(self.region, self.model.halo)
            return bool(keep[y // core : (y + h - 1) // core + 1, x // core : (x + w - 1) // core + 1].any())
        try:
            return bool(kept_regions(Cropped(image, *window), self.model, self.region).any())
        except DataError:  # of a window that is nothing but background
            return False
