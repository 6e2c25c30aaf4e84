"""Synthetic scenes whose answer needs the whole scene: a mark in one corner says what the far, small glyphs mean.

Two rules:

- `beacon`: the corner's kind is the class of every glyph on the map, whatever the glyph's own shape.
  Mask: 0 background, 1 + kind of the corner on every glyph pixel. Scene label: the kind of the corner (a region alone
  can tell it, the one with the mark; the mask is the form that needs context).
- `legend`: only glyphs of the corner's kind count. Mask: 1 on glyphs of the corner's kind, 0 elsewhere, other glyphs
  included. The kinds' counts on a map are 0, 1, 2, ... times a unit, dealt to the kinds at random; scene label: how
  many kinds are rarer on the map than the corner's kind, 0 to kinds - 1 (0: it does not occur). Neither the corner
  nor the glyphs alone say anything about mask or label: without the other, both are at chance.

The mark itself is background. Glyphs are bright shapes in dark casings that cancel out: a thumbnail that averages them
away says nothing about kinds or numbers. Every block of `kinds` scenes holds each label once. A scene is a list of
glyphs plus texture that is computed from coordinates, so any window is drawn alone and a scene of any size is written
in bounded memory. The same configuration and index give the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gigaxt.config import to_dict
from gigaxt.datasets.glyphs import CASING, KINDS, Glyphs, boxes_xywh, relief, stamps, texture
from gigaxt.draw import class_palette
from gigaxt.errors import ConfigError
from gigaxt.image.writer import TiffWriter

TILE = 256
"""Side of the files' tiles, px; scenes are drawn tile by tile."""
MARGIN = 4
"""From the border of the scene to the mark and the glyphs, px."""


@dataclass(frozen=True, kw_only=True)
class LegendConfig:
    """What the scenes of one data set have in common."""

    rule: Literal["beacon", "legend"] = "beacon"
    """What the mark says about the glyphs; see the module."""
    size_px: tuple[int, int] = (512, 512)
    """Height and width of a scene."""
    kinds: int = 4
    """How many shapes there are, 2 to 8, in alphabetical order from `cross` on."""
    glyph_px: int = 16
    """Diameter of a glyph, without its casing."""
    mark_px: int = 40
    """Diameter of the mark in the corner, 2 to 3 glyphs."""
    density: float = 100.0
    """Glyphs per megapixel; at least one glyph (`legend`: one of the rarest kind that occurs) is drawn."""
    distance: float = 0.3
    """The least distance from the mark's centre to a glyph's centre, as a fraction of the scene's diagonal."""
    contrast: float = 0.45
    """From a glyph's dark casing to its bright shape, as a fraction of the full range."""
    noise: float = 0.06
    """Amplitude of the noise of single pixels, as a fraction of the full range."""
    texture: float = 0.15
    """Amplitude of the smooth texture, as a fraction of the full range."""
    rotation_deg: float = 20.0
    """Marks and glyphs are turned by up to this angle, either way."""
    coloured: float = 0.0
    """How far a kind has a colour of its own: 0 colours say nothing and the shape alone counts, 1 a look at the colour
    is enough. `legend`: marks and glyphs; `beacon`: the mark only, like a lamp, and glyphs stay without colour."""
    channels: int = 3
    """Bands of the image; uint8 each."""
    seed: int = 0
    """Another seed, another data set."""

    def __post_init__(self) -> None:
        height, width = self.size_px
        if self.rule not in ("beacon", "legend"):
            raise ConfigError(f"`rule` is {self.rule!r}; expected 'beacon' or 'legend'")
        if not 2 <= self.kinds <= len(KINDS):
            raise ConfigError(f"`kinds` is {self.kinds}; expected 2 to {len(KINDS)}")
        if self.glyph_px < 8 or self.mark_px < self.glyph_px:
            raise ConfigError(
                f"`glyph_px` is {self.glyph_px} and `mark_px` {self.mark_px}; expected 8 <= `glyph_px` <= `mark_px`"
            )
        if min(height, width) < self.mark_px + 2 * MARGIN:
            raise ConfigError(
                f"`size_px` is {height} x {width}; a mark of {self.mark_px} px needs {self.mark_px + 2 * MARGIN} px"
            )
        if not 0 <= self.coloured <= 1:
            raise ConfigError(f"`coloured` is {self.coloured}; expected 0 to 1")
        if not 0 <= self.distance < 1:
            raise ConfigError(f"`distance` is {self.distance}; expected a fraction of the diagonal, 0 to below 1")
        if self.density <= 0 or self.channels < 1:
            raise ConfigError(f"`density` is {self.density} and `channels` {self.channels}; expected more than 0")

    @property
    def mask_classes(self) -> tuple[str, ...]:
        """Names of the mask's values, from 0 on."""
        return ("background", *KINDS[: self.kinds]) if self.rule == "beacon" else ("background", "matching")

    @property
    def label_classes(self) -> tuple[str, ...]:
        """Names of the scene labels, in the order that a manifest gives them."""
        return KINDS[: self.kinds] if self.rule == "beacon" else tuple(str(rank) for rank in range(self.kinds))


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What a scene shows, before any pixel is drawn."""

    index: int
    key: int
    """Kind of the mark, an index into `KINDS`."""
    label: str
    """One of `LegendConfig.label_classes`."""
    mark: Glyphs
    glyphs: Glyphs
    classes: NDArray[np.uint8]
    """(glyphs,) the mask's value on each glyph."""
    texture_key: int


class SceneFiles(NamedTuple):
    """What `write_scene` wrote."""

    image: Path
    mask: Path
    scene: Scene


def draw_scene(config: LegendConfig, index: int) -> Scene:
    """Draw the mark and the glyphs of scene `index`; no pixels yet.

    Raises:
        ConfigError: the glyphs do not fit beside the mark.
    """
    rng = np.random.default_rng((config.seed, 0, index))
    key, rank = _dealt(config, 1, index), _dealt(config, 2, index)
    mark = _draw_mark(config, key, rng)
    kinds = _draw_kinds(config, key, rank, rng)
    rows, cols = _draw_places(config, mark, len(kinds), rng)
    coloured = config.coloured if config.rule == "legend" else 0.0
    glyphs = Glyphs(rows, cols, kinds, *_draw_looks(config, kinds, coloured, rng))
    if config.rule == "beacon":
        label, classes = KINDS[key], np.full(len(kinds), 1 + key, dtype=np.uint8)
    else:
        label, classes = str(rank), (kinds == key).astype(np.uint8)
    return Scene(
        index=index,
        key=key,
        label=label,
        mark=mark,
        glyphs=glyphs,
        classes=classes,
        texture_key=int(rng.integers(2**32)),
    )


def render(
    config: LegendConfig, scene: Scene, x: int, y: int, w: int, h: int
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Pixels (h, w, channels) and mask (h, w) of a window; any window equals the same part of the whole scene."""
    field = texture(scene.texture_key, x, y, w, h, config.channels, smooth=config.texture, noise=config.noise)
    field += np.float32(0.45)
    mask = np.zeros((h, w), dtype=np.uint8)
    _stamp(field, None, scene.mark, config.mark_px, None, x, y, config.contrast)
    _stamp(field, mask, scene.glyphs, config.glyph_px, scene.classes, x, y, config.contrast)
    np.clip(field, 0, 1, out=field)
    field *= np.float32(255)
    field += np.float32(0.5)
    return field.astype(np.uint8), mask


def boxes(config: LegendConfig, scene: Scene) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Boxes (n, 4) as xywh in px, areas (n,) in px and mask classes (n,) of the glyphs that the mask shows."""
    shown = scene.classes > 0
    xywh, areas = boxes_xywh(scene.glyphs.take(shown), config.glyph_px)
    return xywh, areas, scene.classes[shown].astype(np.int64)


def write_scene(config: LegendConfig, index: int, folder: str | Path) -> SceneFiles:
    """Write `images/NNNNNN.tif` and `masks/NNNNNN.tif` of one scene below `folder`, tile by tile.

    Raises:
        ConfigError: the glyphs do not fit.
        ImageError: a file cannot be written.
    """
    folder = Path(folder)
    scene = draw_scene(config, index)
    height, width = config.size_px
    image, mask = (folder / kind / f"{index:06d}.tif" for kind in ("images", "masks"))
    colours = class_palette(len(config.mask_classes))
    for path in (image, mask):
        path.parent.mkdir(parents=True, exist_ok=True)
    with (
        TiffWriter(image, height, width, config.channels, tile=TILE, compression="zstd") as pixels_out,
        TiffWriter(mask, height, width, tile=TILE, compression="zstd", colormap=colours) as mask_out,
    ):
        for x, y, w, h in _tiles(height, width):
            pixels, values = render(config, scene, x, y, w, h)
            pixels_out.write(x, y, pixels)
            mask_out.write(x, y, values)
    return SceneFiles(image, mask, scene)


def make_dataset(config: LegendConfig, folder: str | Path, *, scenes: int, val: int = 0, test: int = 0) -> Path:
    """Write a data set: images, masks, manifests, boxes and the configuration.

    Args:
        config: what the scenes have in common.
        folder: gets `images/`, `masks/`, `scenes.csv` (image,label,split), `masks.csv` (image,mask,split), `boxes.csv`
            (image,boxes,image_id,split), `boxes.json` (COCO style, all splits) and `legend.json` (the configuration and
            the class names).
        scenes: how many to train on; their indices come first.
        val: how many of split `val`.
        test: how many of split `test`.

    Returns:
        The folder.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    splits = ["train"] * scenes + ["val"] * val + ["test"] * test
    settings = {
        "config": to_dict(config),
        "mask_classes": list(config.mask_classes),
        "label_classes": list(config.label_classes),
    }
    (folder / "legend.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    with (
        (folder / "scenes.csv").open("w", encoding="utf-8", newline="\n") as labels,
        (folder / "masks.csv").open("w", encoding="utf-8", newline="\n") as masks,
        (folder / "boxes.csv").open("w", encoding="utf-8", newline="\n") as boxed,
        _CocoFile(folder / "boxes.json", config) as coco,
    ):
        labels.write("image,label,split\n")
        masks.write("image,mask,split\n")
        boxed.write("image,boxes,image_id,split\n")
        for index, split in enumerate(splits):
            files = write_scene(config, index, folder)
            image, mask = (path.relative_to(folder).as_posix() for path in (files.image, files.mask))
            labels.write(f"{image},{files.scene.label},{split}\n")
            masks.write(f"{image},{mask},{split}\n")
            boxed.write(f"{image},boxes.json,{index},{split}\n")
            coco.add(image, files.scene)
    return folder


def _dealt(config: LegendConfig, stream: int, index: int) -> int:
    """A number below `kinds`; every block of `kinds` scenes gets each of them once."""
    block, place = divmod(index, config.kinds)
    return int(np.random.default_rng((config.seed, stream, block)).permutation(config.kinds)[place])


def _draw_mark(config: LegendConfig, key: int, rng: np.random.Generator) -> Glyphs:
    height, width = config.size_px
    half = config.mark_px / 2 + MARGIN
    # Up to one more glyph from the corner, so that its exact place tells nothing.
    offset = half + rng.uniform(0, config.glyph_px, size=2)
    row = min(offset[0], height - half)
    col = min(offset[1], width - half)
    flip_row, flip_col = rng.integers(0, 2, size=2)
    rows, cols = np.array([height - row if flip_row else row]), np.array([width - col if flip_col else col])
    kinds = np.array([key])
    return Glyphs(rows, cols, kinds, *_draw_looks(config, kinds, config.coloured, rng))


def _draw_kinds(config: LegendConfig, key: int, rank: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """The kind of every glyph, (glyphs,)."""
    height, width = config.size_px
    count = config.density * height * width / 1e6
    if config.rule == "beacon":
        return rng.integers(0, config.kinds, size=max(1, round(count)))
    ranks = np.arange(config.kinds)
    unit = max(1, round(count / ranks.sum()))
    others = rng.permutation(np.delete(ranks, rank))
    counts = np.insert(others, key, rank) * unit  # the corner's kind has the rank that the label says
    return np.repeat(np.arange(config.kinds), counts)


def _draw_places(
    config: LegendConfig, mark: Glyphs, count: int, rng: np.random.Generator
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Centres (rows, cols) of `count` glyphs, each in its own cell of a lattice, so that none touch."""
    height, width = config.size_px
    least = config.distance * float(np.hypot(height, width))
    room = int(np.ceil(config.glyph_px * CASING)) + 2  # a glyph with its casing
    free = _free_cells(config, mark, least, pitch := room + config.glyph_px // 2)
    if len(free) < count:  # crowded: cells without slack
        free = _free_cells(config, mark, least, pitch := room)
    if len(free) < count:
        raise ConfigError(
            f"{count} glyphs of {config.glyph_px} px do not fit into {height} x {width} px at `distance` "
            f"{config.distance}: there is room for {len(free)}; lower `density`, `distance` or `kinds`"
        )
    columns = (width - 2 * MARGIN) // pitch
    chosen = free[rng.choice(len(free), size=count, replace=False)]
    slack = pitch - room
    jitter = rng.uniform(-slack / 2, slack / 2, size=(2, count))
    centre = MARGIN + pitch / 2
    rows, cols = chosen // columns * pitch + centre + jitter[0], chosen % columns * pitch + centre + jitter[1]
    return rows, cols


def _free_cells(config: LegendConfig, mark: Glyphs, least: float, pitch: int) -> NDArray[np.int64]:
    """Flat numbers of the lattice cells that lie, with all their area, far enough from the mark."""
    height, width = config.size_px
    rows = MARGIN + (np.arange((height - 2 * MARGIN) // pitch) + 0.5) * pitch - mark.rows[0]
    cols = MARGIN + (np.arange((width - 2 * MARGIN) // pitch) + 0.5) * pitch - mark.cols[0]
    touching = (config.mark_px + config.glyph_px) * CASING / 2 + 2
    reach = max(least, touching) + pitch * 0.36  # the jitter may move a glyph that far towards the mark
    return np.flatnonzero(np.add.outer(rows**2, cols**2) >= reach**2)


def _draw_looks(
    config: LegendConfig, kinds: NDArray[np.int64], coloured: float, rng: np.random.Generator
) -> tuple[NDArray[np.float64], NDArray[np.float32]]:
    """Angles in radians (glyphs,) and tones (glyphs, channels), which tell the kind as far as `coloured` says."""
    limit = np.deg2rad(config.rotation_deg)
    tones = rng.uniform(0.75, 1.0, size=(len(kinds), config.channels))
    phase = kinds[:, None] / config.kinds - np.arange(config.channels) / config.channels
    hues = 0.55 + 0.45 * np.cos(2 * np.pi * phase)  # (glyphs, channels), around the colour circle
    tones = (1 - coloured) * tones + coloured * hues
    return rng.uniform(-limit, limit, size=len(kinds)), tones.astype(np.float32)


def _stamp(
    field: NDArray[np.float32],
    mask: NDArray[np.uint8] | None,
    glyphs: Glyphs,
    size_px: int,
    classes: NDArray[np.uint8] | None,
    x: int,
    y: int,
    contrast: float,
) -> None:
    """Draw glyphs into the window whose left top corner is (x, y), and their classes into its mask."""
    h, w = field.shape[:2]
    reach = size_px * CASING / 2 + 2
    near = (np.abs(glyphs.rows - (y + h / 2)) < h / 2 + reach) & (np.abs(glyphs.cols - (x + w / 2)) < w / 2 + reach)
    numbers = np.flatnonzero(near)
    if not len(numbers):
        return
    here = glyphs.take(numbers)
    coverage, tops, lefts = stamps(here, size_px)  # (n, 2, side, side)
    shades = relief(coverage) * np.float32(contrast)
    side = shades.shape[1]
    for i, (number, top, left) in enumerate(zip(numbers, tops - y, lefts - x, strict=True)):
        r0, c0, r1, c1 = max(top, 0), max(left, 0), min(top + side, h), min(left + side, w)
        if r1 <= r0 or c1 <= c0:
            continue
        part = (slice(r0 - top, r1 - top), slice(c0 - left, c1 - left))
        field[r0:r1, c0:c1] += shades[i][part][:, :, None] * here.tones[i]
        if mask is not None and classes is not None:
            mask[r0:r1, c0:c1][coverage[i, 0][part] > 0.5] = classes[number]


def _tiles(height: int, width: int) -> Iterator[tuple[int, int, int, int]]:
    for y in range(0, height, TILE):
        for x in range(0, width, TILE):
            yield x, y, min(TILE, width - x), min(TILE, height - y)


class _CocoFile:
    """COCO-style boxes, written scene by scene: the annotations of large scenes would not fit into memory at once."""

    def __init__(self, path: Path, config: LegendConfig) -> None:
        self._config, self._path = config, path
        self._images: list[dict[str, Any]] = []
        self._count = 0

    def __enter__(self) -> _CocoFile:
        self._file = self._path.open("w", encoding="utf-8", newline="\n")
        self._file.write('{"annotations": [')
        return self

    def add(self, file_name: str, scene: Scene) -> None:
        height, width = self._config.size_px
        self._images.append({"id": scene.index, "file_name": file_name, "height": height, "width": width})
        for xywh, area, category in zip(*(part.tolist() for part in boxes(self._config, scene)), strict=True):
            self._count += 1
            entry = {"id": self._count, "image_id": scene.index, "category_id": category}
            entry |= {"bbox": xywh, "area": area, "iscrowd": 0}
            self._file.write(("\n" if self._count == 1 else ",\n") + json.dumps(entry))

    def __exit__(self, *_: object) -> None:
        categories = [{"id": i, "name": name} for i, name in enumerate(self._config.mask_classes) if i]
        self._file.write(f'],\n"images": {json.dumps(self._images)},\n"categories": {json.dumps(categories)}}}\n')
        self._file.close()
