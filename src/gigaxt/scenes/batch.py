"""A batch of scenes as the model sees it: checked, at the model's pixel size, cut into regions, loaded by chunks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gigaxt.errors import ConfigError, DataError
from gigaxt.image.base import Image, Mask, lies_inside
from gigaxt.image.open import PICTURE_SUFFIXES
from gigaxt.image.views import resample
from gigaxt.regions import Place, RegionGrid
from gigaxt.scenes.cases import Cases, TensorImage, sources_of
from gigaxt.scenes.inputs import InputConfig, to_pixel_size, to_size
from gigaxt.scenes.kept import kept_regions
from gigaxt.scenes.region_pixels import read_regions, stack_masks, valid_cells
from gigaxt.streaming.prefetch import host_buffer, load_together
from gigaxt.targets.base import SceneTarget, WindowTarget

LEAST_PART = 8
"""Fewest regions of a chunk that are worth a reading thread of their own."""


@dataclass
class Chunk:
    """Regions that are encoded together."""

    batch: SceneBatch
    start: int
    stop: int
    masked: bool = field(default=False, kw_only=True)
    """Whether `valid` is loaded even if all pixels are valid: a part of a chunk is joined to parts that may need it."""

    @cached_property
    def region_ids(self) -> Tensor:
        """(n,) int64, distinct over the batch and independent of the chunk size."""
        return torch.tensor([scene << 40 | index for scene, index, _ in self.places])

    @property
    def places(self) -> list[tuple[int, int, Place]]:
        """(scene, index in its grid, place) of each region."""
        return self.batch.places[self.start : self.stop]

    @property
    def rows(self) -> slice | list[int]:
        """Which rows of the batch's tensors are these regions', as an index."""
        return slice(self.start, self.stop)

    def parts(self, most: int) -> list[Chunk]:
        """The same regions in at most `most` chunks, each worth a reading thread of its own."""
        regions = len(self.places)
        count = min(most, regions // LEAST_PART)
        if count < 2:
            return [self]
        masked = any(self.batch.scenes[scene].may_lack_pixels(place) for scene, _, place in self.places)
        edges = [regions * i // count for i in range(count + 1)]
        return [self._part(first, last, masked=masked) for first, last in pairwise(edges)]

    def _part(self, first: int, last: int, *, masked: bool) -> Chunk:
        return replace(self, start=self.start + first, stop=self.start + last, masked=masked)

    def __str__(self) -> str:
        named: dict[str, list[str]] = {}
        for scene, _, (row, col, level) in self.places:
            where = f"({row}, {col})" + (f" of overview {level}" if level else "")
            named.setdefault(self.batch.scenes[scene].image.name, []).append(where)
        return "; ".join(f"{name}, regions {', '.join(places)}" for name, places in named.items())


@dataclass
class Picked(Chunk):
    """Regions that need not follow each other in the batch."""

    picked: list[int]
    """Their rows of the batch."""

    @property
    def places(self) -> list[tuple[int, int, Place]]:
        """See `Chunk.places`."""
        return [self.batch.places[row] for row in self.picked]

    @property
    def rows(self) -> list[int]:
        """See `Chunk.rows`."""
        return self.picked

    def _part(self, first: int, last: int, *, masked: bool) -> Chunk:
        return replace(self, picked=self.picked[first:last], masked=masked)


class Scene:
    """One image at the model's pixel size or size, its region grid, and its target if the model is dense.

    Args:
        image: as it was given.
        config: of the model's input.
        region: px on a side.
        channels: bands that the model takes.
        target: of the image as it was given; None: without.

    Attributes:
        source: the image as it was given.
        image: with the model's bands, at its pixel size or size.
        target: of that image.
        grid: its regions.
        levels: that image, then its overviews.
        scale, shift: (channels,) each, normalised = pixel * scale + shift.

    Raises:
        DataError: bands, a pixel size or a target that do not fit. ConfigError: settings that do not fit the model.
    """

    def __init__(
        self, image: Image | TensorImage, config: InputConfig, region: int, channels: int, target: SceneTarget | None
    ):
        if target is not None:
            target.check(image)
        self.source = image
        if isinstance(image, Image):
            if config.band_names is not None and list(image.band_names) != config.band_names:
                image = self._select(image, config.band_names)
            image, target = to_size(*to_pixel_size(image, config, target), config)
        if image.channels != channels:
            picture = channels == 3 and image.name.lower().endswith(PICTURE_SUFFIXES)
            hint = "; open it with rgb=True (input.rgb of a config)" if picture else ""
            raise DataError(f"{image.name}: the model takes {channels} bands, the image has {image.channels}{hint}")
        self.image, self.target = image, target
        keep = kept_regions(image, config, region) if isinstance(image, Image) else None
        self.grid = RegionGrid(
            image.height,
            image.width,
            region,
            halo=config.halo,
            overview=tuple(config.overview),
            order="raster",
            keep=keep,
        )
        self.levels = [image, *(self._coarser(factor) for factor in config.overview)]
        self.scale, self.shift = self._normalisation(config)

    def _select(self, image: Image, names: list[str]) -> Image:
        missing = [name for name in names if name not in image.band_names]
        if not missing:
            return image.select(names)
        if len(image.band_names) == len(names) and all(name.isdigit() for name in image.band_names):
            return image  # the file names no bands: they are taken in the model's order
        raise DataError(f"{image.name}: the model takes bands {names}, the image has {list(image.band_names)}")

    def _coarser(self, factor: int) -> Image | TensorImage:
        if isinstance(self.image, Image):
            return resample(self.image, factor)
        height, width = max(1, round(self.image.height / factor)), max(1, round(self.image.width / factor))
        shrunk = torch.nn.functional.interpolate(
            self.image.tensor[None], (height, width), mode="bilinear", antialias=True, align_corners=False
        )
        return TensorImage(shrunk[0], self.image.name)

    def answers_for(self, place: Place) -> bool:
        """Whether anything of a region of full size counts."""
        return not isinstance(self.target, WindowTarget) or self.target.reaches(*self.grid.core_xywh(place))

    def may_lack_pixels(self, place: Place) -> bool:
        """Whether a region may have pixels that are not valid, as far as that is known without reading it."""
        image = self.levels[place.level]
        if not image.all_valid or not lies_inside(self.grid.window_xywh(place), image.height, image.width):
            return True
        return isinstance(image, Image) and image.dtype.kind == "f"

    def core_validity(self, x: int, y: int) -> Mask:
        """Which pixels of the core at (x, y) lie in the image and have data: (core, core)."""
        core = self.grid.core
        if isinstance(self.image, Image) and not self.image.all_valid:
            return self.image.validity(x, y, core, core)
        valid = np.zeros((core, core), dtype=np.bool_)
        valid[: self.image.height - y, : self.image.width - x] = True
        return valid

    def _normalisation(self, config: InputConfig) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(scale, shift) a band: normalised = pixel * scale + shift, colour augmentation included."""
        channels = self.image.channels
        if isinstance(self.image, TensorImage):
            return np.ones(channels), np.zeros(channels)
        if config.mean is not None and config.std is not None:
            if len(config.mean) != channels:
                raise ConfigError(f"input.mean: {len(config.mean)} values for a model of {channels} bands")
            mean, std = np.array(config.mean), np.array(config.std)
        else:
            integer = np.issubdtype(self.image.dtype, np.integer)
            most = np.iinfo(self.image.dtype.str).max if integer else 1.0
            mean, std = np.zeros(channels), np.full(channels, most)
        gain, offset = getattr(self.image, "colour", (np.ones(channels), np.zeros(channels)))
        return gain / std, offset - gain * mean / std


class SceneBatch:
    """Scenes of any sizes as one sequence of regions: those of full size of all scenes, then their overviews'.

    A region's place in this sequence is its row. Where targets are windows (`WindowTarget`), the regions of full size
    that no window reaches come behind those that are answered for, ahead of the overviews'.

    Args:
        images: Images or cases (lists of them), or one float tensor (B, C, H, W) that is already normalised.
        config: of the input.
        region: px on a side.
        channels: bands that the model takes.
        tokens_per_core: t, tokens along a side of a region's core.
        targets: of the images, for dense models.

    Attributes:
        scenes: one an image.
        cases: for each case the numbers of its scenes.
        places: (scene, index in its grid, place) of each row.
        full_size: how many rows are of full size and answered for; they come first.
        beside: how many rows are of full size beside the targets' windows; they come next.
        token_validity: (rows, t * t) bool, which tokens cover a valid pixel. Filled by `load`, the same each time.

    Raises:
        DataError: no images, images or targets that do not fit, or windows without a region to answer for.
    """

    def __init__(
        self,
        images: Cases,
        config: InputConfig,
        *,
        region: int,
        channels: int,
        tokens_per_core: int,
        targets: Sequence[SceneTarget] | None = None,
    ) -> None:
        sources, self.cases = sources_of(images)
        wanted: Sequence[SceneTarget | None] = [None] * len(sources) if targets is None else list(targets)
        if len(wanted) != len(sources):
            raise DataError(f"{len(sources)} images, {len(wanted)} targets: expected one target an image")
        self.config, self.region, self.t = config, region, tokens_per_core
        self.scenes = [
            Scene(image, config, region, channels, target) for image, target in zip(sources, wanted, strict=True)
        ]
        placed = [(s, i, place) for s, scene in enumerate(self.scenes) for i, place in enumerate(scene.grid.places)]
        full_size = [p for p in placed if p[2].level == 0]
        answered = [p for p in full_size if self.scenes[p[0]].answers_for(p[2])]
        beside = [p for p in full_size if not self.scenes[p[0]].answers_for(p[2])]
        if not answered:
            raise DataError(f"{self.scenes[0].image.name}: no region of the window holds data or foreground")
        self.places = [*answered, *beside, *(p for p in placed if p[2].level > 0)]
        self.full_size, self.beside = len(answered), len(beside)
        self.token_validity = torch.zeros(len(self.places), self.t**2, dtype=torch.bool)
        self._place_of = {(scene, index): row for row, (scene, index, _) in enumerate(self.places)}
        self._read_ahead: dict[tuple[int, int], dict[str, Tensor]] = {}

    def chunks(self, regions: int) -> list[Chunk]:
        """The regions of full size that are answered for, `regions` at a time."""
        return self._cut(0, self.full_size, regions)

    def overview_chunks(self, regions: int) -> list[Chunk]:
        """The regions of the overviews; none without `overview`."""
        return self._cut(self.full_size + self.beside, len(self.places), regions)

    def chunks_beside(self, regions: int) -> list[Chunk]:
        """The regions of full size beside the targets' windows; none where whole scenes are answered for."""
        return self._cut(self.full_size, self.full_size + self.beside, regions)

    def first_chunk(self, regions: int, *, whole: bool) -> Chunk:
        """What is read first where all regions are encoded in one stream (`whole`: of a classifier), or by target."""
        if whole:
            return self._cut(0, len(self.places), regions)[0]
        return (self.chunks_beside(regions) or self.chunks(regions))[0]

    def picked(self, rows: Sequence[int], regions: int) -> list[Chunk]:
        """Some regions, `regions` at a time: `rows` of the batch."""
        first, count = (rows[0], len(rows)) if rows else (0, 0)
        if list(rows) == list(range(first, first + count)):  # what follows each other can be sliced
            return self._cut(first, first + count, regions)
        return [Picked(self, 0, 0, list(rows[i : i + regions])) for i in range(0, count, regions)]

    def levels_of(self, rows: Sequence[int]) -> Tensor:
        """The level of each region's place, (len(rows),) int64."""
        return torch.tensor([self.places[row][2].level for row in rows])

    def rows_of(self, scene: int) -> Tensor:
        """Rows of the batch that hold a scene's regions, in the order of its grid: (regions,) int64."""
        count = len(self.scenes[scene].grid)
        return torch.tensor([self._place_of[scene, index] for index in range(count)])

    def load_ahead(self, chunk: Chunk, readers: int, device: torch.device) -> None:
        """Load a chunk by all `readers` of the stream that will begin with it, and keep it until `load` is asked."""
        parts = chunk.parts(readers)
        loaded = load_together(self.load, parts, device)
        self._read_ahead = {(part.start, part.stop): found for part, found in zip(parts, loaded, strict=True)}

    def load(self, chunk: Chunk) -> dict[str, Tensor]:
        """Pixels and what turns them into the network's input.

        Returns:
            pixels (n, region, region, C) as stored; level (n,) int64. Pixels of a tensor are the network's input. Of
            Images there are also scale and shift (n, C), with input = pixels * scale + shift; and where not all pixels
            are valid, valid (n, region, region, 1 or C) bool, with an input of 0 elsewhere.
        """
        if (ready := self._read_ahead.pop((chunk.start, chunk.stop), None)) is not None:
            return ready
        places = chunk.places
        of_tensors = isinstance(self.scenes[0].image, TensorImage)
        pixels, masks = self._cut_tensors(places) if of_tensors else self._read(places)
        found = {"pixels": pixels, "level": torch.tensor([place.level for _, _, place in places])}
        lacking = chunk.masked or any(mask is not None for mask in masks)
        valid = stack_masks(masks, (self.region, self.region)) if lacking else None
        self._note_validity(chunk, [row for row, mask in enumerate(masks) if mask is not None], valid)
        if of_tensors:
            return found
        scenes = [scene for scene, _, _ in places]
        found["scale"] = torch.from_numpy(np.stack([scene.scale for scene in self.scenes])[scenes])
        found["shift"] = torch.from_numpy(np.stack([scene.shift for scene in self.scenes])[scenes])
        return found if valid is None else {**found, "valid": valid}

    def load_targets(self, chunk: Chunk) -> dict[str, Tensor]:
        """What the targets draw of the regions' cores, and where it counts.

        Returns:
            What `SceneTarget.draw` gives, with the regions as first dimension, and valid (n, core, core) bool: False
            outside the image, at its nodata, and where the target says so.
        """
        drawn: list[dict[str, NDArray[Any]]] = []
        for s, _, place in chunk.places:
            scene = self.scenes[s]
            assert scene.target is not None
            core = scene.grid.core
            x, y = place.col * core, place.row * core
            found = scene.target.draw(x, y, core, core)
            # As in regions that are left out: where there is no data, nothing is learnt, whatever the target says.
            drawn.append({**found, "valid": scene.core_validity(x, y) & found.get("valid", True)})
        return {name: torch.from_numpy(np.stack([found[name] for found in drawn])) for name in drawn[0]}

    def _cut(self, start: int, stop: int, regions: int) -> list[Chunk]:
        return [Chunk(self, first, min(first + regions, stop)) for first in range(start, stop, regions)]

    def _read(self, places: Sequence[tuple[int, int, Place]]) -> tuple[Tensor, list[Mask | None]]:
        """The regions' windows of Images (n, region, region, C), those of one level of a scene read together.

        With which pixels are valid, (region, region, 1 or C) each; None: all are.
        """
        together: dict[tuple[int, int], list[int]] = {}
        for row, (number, _, place) in enumerate(places):
            together.setdefault((number, place.level), []).append(row)
        images = {key: cast(Image, self.scenes[key[0]].levels[key[1]]) for key in together}
        dtype = np.result_type(*{image.dtype for image in images.values()})
        pixels = host_buffer((len(places), self.region, self.region, self.scenes[0].image.channels), dtype)
        out = list(pixels.numpy())
        masks: list[Mask | None] = [None] * len(places)
        for key, rows in together.items():
            grid = self.scenes[key[0]].grid
            windows = [grid.window_xywh(places[row][2]) for row in rows]
            found = read_regions(images[key], windows, [out[row] for row in rows])
            for row, mask in zip(rows, found, strict=True):
                masks[row] = mask
        return pixels, masks

    def _cut_tensors(self, places: Sequence[tuple[int, int, Place]]) -> tuple[Tensor, list[Mask | None]]:
        """As `_read`, of tensors in memory."""
        windows: list[Tensor] = []
        masks: list[Mask | None] = []
        for number, _, place in places:
            scene = self.scenes[number]
            x, y, w, h = scene.grid.window_xywh(place)
            image = cast(TensorImage, scene.levels[place.level])
            inside = lies_inside((x, y, w, h), image.height, image.width)
            # (C, h, w) -> (h, w, C), a view
            whole = image.tensor[:, y : y + h, x : x + w].permute(1, 2, 0) if inside else None
            windows.append(_crop(image.tensor, x, y, w, h) if whole is None else whole)
            masks.append(None if inside else scene.grid.pixel_validity(place)[..., None])
        return torch.stack(windows), masks

    def _note_validity(self, chunk: Chunk, masked: list[int], valid: Tensor | None) -> None:
        """A token is valid where its cell holds a valid pixel; all are in regions that are not `masked`."""
        found = torch.ones(len(chunk.places), self.t**2, dtype=torch.bool)
        if masked:
            assert valid is not None
            halo, core = self.config.halo, self.region - 2 * self.config.halo
            found[masked] = valid_cells(valid[masked, halo : halo + core, halo : halo + core], self.t)
        self.token_validity[chunk.rows] = found


def _crop(tensor: Tensor, x: int, y: int, w: int, h: int) -> Tensor:
    """Window of (C, H, W) as (h, w, C), zeros outside."""
    _, height, width = tensor.shape
    x0, y0, x1, y1 = max(x, 0), max(y, 0), min(x + w, width), min(y + h, height)
    window = tensor.new_zeros(h, w, tensor.shape[0])
    window[y0 - y : y1 - y, x0 - x : x1 - x] = tensor[:, y0:y1, x0:x1].permute(1, 2, 0)  # (C, h, w) -> (h, w, C)
    return window
