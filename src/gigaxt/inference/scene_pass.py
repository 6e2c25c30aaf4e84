"""The two passes over a scene: the context of all regions, then the answers of windows, turned and averaged."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gigaxt.augment import inverse
from gigaxt.errors import ConfigError
from gigaxt.image.base import Image, Mask
from gigaxt.inference.windows import WindowGrid, usual_overlap
from gigaxt.nn.kept_maps import KeptMaps
from gigaxt.nn.ready import check_context_output
from gigaxt.nn.region_answers import own_tokens
from gigaxt.nn.stages import Answers
from gigaxt.scenes.batch import Chunk
from gigaxt.scenes.region_pixels import read_regions, stack_masks
from gigaxt.streaming.prefetch import host_buffer
from gigaxt.streaming.rows import Reader, Rows

if TYPE_CHECKING:
    from gigaxt.inference.parts import Parts
    from gigaxt.nn.heads.dense import DenseHead
    from gigaxt.nn.xt import GigaXT

ToMap = Callable[[tuple[Tensor, ...]], Tensor]
"""From a dense head's answers for n windows to one tensor (n, channels, side, side) that may be averaged."""
Tick = Callable[[int], None]
"""Called with the number of regions or windows that went through the encoder, or were found done."""

TURNS = {1: (0,), 4: (0, 3, 5, 6), 8: tuple(range(8))}
"""`dihedral` -> elements k of the dihedral group that are averaged over, numbered as in `gigaxt.augment`."""


class WindowMaps(NamedTuple):
    """The answers of one window."""

    row: int
    col: int
    maps: Tensor
    """(channels, side, side) on the CPU; averaged over the turns, in the scene's own direction."""
    valid: Mask
    """(core, core), False where the image has no data."""


@dataclass
class WindowChunk:
    """Windows of one row that are decoded together."""

    scene: ScenePass
    row: int
    cols: Sequence[int]

    def __str__(self) -> str:
        windows = self.scene.windows
        where = ", ".join(f"({windows.xs[col]}, {windows.ys[self.row]})" for col in self.cols)
        return f"{self.scene.image.name}, windows at x, y = {where}"


class ScenePass:
    """One scene predicted by a dense model in two passes.

    1. Encode all regions, and compute the context of their tokens.
    2. Read windows, which may overlap, encode them for their feature maps, and decode these with the context at their
       place.

    With `dihedral`, regions and windows are turned one by one, and so is the lattice that the context sees: as if the
    whole scene, padded to whole regions, had been turned. Memory: the first pass holds the scene's tokens, the second
    one the context of a row of windows.

    Windows without overlap are the regions: they are not encoded again where the budgets of `model.streaming` hold
    their feature maps. Where nothing passes between regions (context `none`, no halo) there is no first pass: a window
    is decoded with its own tokens, as a region at its place is in training.

    Args:
        model: dense, in evaluation mode.
        image: the scene.
        overlap: px that neighbouring windows share, see `WindowGrid`; None: a quarter of a window, none with a halo.
        dihedral: over how many turns answers are averaged: 1, 4 (quarter turns) or 8 (mirrored, too).

    Attributes:
        image: as the model sees it, in its bands and at its pixel size.
        windows: where the second pass looks.

    Raises:
        ConfigError: settings out of range. DataError: an image that does not fit the model.
    """

    def __init__(self, model: GigaXT, image: Image, *, overlap: int | None = None, dihedral: int = 1) -> None:
        if dihedral not in TURNS:
            raise ConfigError(f"dihedral: expected 1, 4 or 8, got {dihedral}")
        self.model, self.turns = model, TURNS[dihedral]
        self.batch = model.batch([image])
        scene = self.batch.scenes[0]
        assert isinstance(scene.image, Image)
        self.scene, self.image, self.grid, self.t = scene, scene.image, scene.grid, self.batch.t
        self.halo = scene.grid.halo
        self.windows = WindowGrid(
            scene.grid, self.t, usual_overlap(scene.grid.core, self.t, self.halo) if overlap is None else overlap
        )
        self.device = next(model.parameters()).device
        self._kept = KeptMaps(model.streaming, self.device)

    @property
    def work(self) -> int:
        """Regions and windows that go through the encoder in all."""
        regions = 0 if self.model.regions_apart else len(self.batch.places)
        return (regions + int(self.windows.needed.sum())) * len(self.turns)

    @property
    def context_bytes(self) -> int:
        """What the context of all turns takes on disk."""
        if self.model.regions_apart:
            return 0
        tokens = self.batch.full_size * self.t**2
        return tokens * self.model.config.context.dim * 4 * len(self.turns)

    @torch.no_grad()
    def find_context(self, parts: Parts, tick: Tick) -> None:
        """The first pass: `parts` then holds the context of each turn. What it holds already is not computed again."""
        for k in () if self.model.regions_apart else self.turns:
            if not parts.has(_context_name(k)):
                self._encode(parts, k, tick)
                self._join(parts, k)
            else:
                tick(len(self.batch.places))

    @torch.no_grad()
    def answers(self, parts: Parts, rows: Sequence[int], to_map: ToMap, tick: Tick) -> Iterator[WindowMaps]:
        """The second pass: answers of the needed windows of some rows, row by row, each from left to right."""
        n = self.model.streaming.chunk_regions
        chunks: list[WindowChunk] = []
        for row in rows:  # a chunk never spans two rows, so that a row's numbers do not depend on which rows are asked
            cols = np.flatnonzero(self.windows.needed[row]).tolist()
            chunks += [WindowChunk(self, row, cols[i : i + n]) for i in range(0, len(cols), n)]
        reader = Reader(self._load_windows, self.device, None, self.model.streaming)
        decode = Answers(cast("DenseHead", self.model.head), self.model.encode)
        row, context = -1, None
        for loaded in reader.rows(chunks):
            if loaded.chunk.row != row:
                row = loaded.chunk.row
                context = None if self.model.regions_apart else RowContext(self, parts, row)

            def work(part: Rows, context: RowContext | None = context) -> Tensor:
                return self._average(part, context, decode, to_map)

            results = reader.run(loaded, work)
            tick(loaded.count * len(self.turns))
            for part, maps in results:
                cols, valid = part.loaded["col"].tolist(), self._valid(part.loaded)
                yield from (
                    WindowMaps(row, col, answer, mask)
                    for col, answer, mask in zip(cols, maps.cpu(), valid, strict=True)
                )

    def _encode(self, parts: Parts, k: int, tick: Tick) -> None:
        """Tokens of all regions turned by `k`, row by row into `parts`."""
        groups = _rows_of(self.batch.places)
        missing = [g for g in groups if not parts.has(_tokens_name(k, g))]
        tick(sum(stop - start for start, stop in groups) - sum(stop - start for start, stop in missing))
        n = self.model.streaming.chunk_regions
        chunks = [
            Chunk(self.batch, first, min(first + n, stop)) for start, stop in missing for first in range(start, stop, n)
        ]
        reader = Reader(self.batch.load, self.device, None, self.model.streaming)
        found: list[Tensor] = []

        def encode(part: Rows) -> Tensor:
            tokens: Tensor
            tokens, maps = self.model.encode(_turned_regions(part.loaded, k))
            _, _, first = part.chunk.places[0]
            # Windows without overlap are the regions. Parts of chunks mean that the device is out of memory.
            if first.level == 0 and self.windows.step == self.windows.core and part.count == len(part.chunk.places):
                self._kept.add((k, first.row, first.col, part.count), maps)
            return tokens

        for rows in reader.rows(chunks):
            found += [tokens.cpu() for _, tokens in reader.run(rows, encode)]
            tick(rows.count)
            group = next(g for g in missing if g[0] <= rows.chunk.start < g[1])
            if rows.chunk.stop == group[1]:
                valid = self.batch.token_validity[group[0] : group[1]].clone()
                parts.save(_tokens_name(k, group), {"tokens": torch.cat(found), "valid": valid})
                found = []

    def _join(self, parts: Parts, k: int) -> None:
        """The context of all tokens of turn `k`; it goes to `parts` in the scene's own direction."""
        names = [_tokens_name(k, group) for group in _rows_of(self.batch.places)]
        tokens, valid = _gathered(parts, names, len(self.batch.places))
        t = self.t
        coords = turned_coords(self.grid.token_coords(t), self.grid.lattice_shape(t), k)  # (regions, t * t, 2)
        valid = _flat(turned(valid.unflatten(1, (t, t)), k))  # (regions, t * t), as the tokens
        order = _scan(coords, self.batch.places)
        if k:
            tokens, valid, coords = tokens[order], valid[order], coords[order]
        # (regions, t * t, ...) -> (1, regions * t * t, ...)
        tokens, coords, valid = (x.flatten(0, 1)[None].to(self.device) for x in (tokens, coords, valid))
        found = self.model.context(tokens, coords, valid)
        check_context_output(found, tokens, all_of_them=True)
        context = found[0][0].unflatten(0, (-1, t, t)).cpu()  # (regions * t * t, dim) -> (regions, t, t, dim)
        del found, tokens
        if k:
            context = turned(context[order.argsort()], inverse(k))
        parts.save(_context_name(k), {"context": context[: self.batch.full_size].contiguous()})
        parts.drop(names)

    def _load_windows(self, chunk: WindowChunk) -> dict[str, Tensor]:
        """As `SceneBatch.load`, of windows; `col` (n,) says which."""
        windows, halo, n = self.windows, self.halo, len(chunk.cols)
        side = windows.core + 2 * halo
        top = int(windows.ys[chunk.row]) - halo
        places = [(int(windows.xs[col]) - halo, top, side, side) for col in chunk.cols]
        pixels = host_buffer((n, side, side, self.image.channels), self.image.dtype)
        masks = read_regions(self.image, places, list(pixels.numpy()))
        found = {
            "pixels": pixels,
            "scale": torch.from_numpy(self.scene.scale).expand(n, -1),
            "shift": torch.from_numpy(self.scene.shift).expand(n, -1),
            "level": torch.zeros(n, dtype=torch.int64),
            "col": torch.tensor(chunk.cols),
        }
        if any(mask is not None for mask in masks):
            found["valid"] = stack_masks(masks, (side, side))
        return found

    def _valid(self, loaded: dict[str, Tensor]) -> NDArray[np.bool_]:
        """(n, core, core): where the image has data in windows."""
        halo, core = self.halo, self.windows.core
        if "valid" not in loaded:
            return np.ones((len(loaded["col"]), core, core), np.bool_)
        valid: NDArray[np.bool_] = loaded["valid"].any(dim=3)[:, halo : halo + core, halo : halo + core].cpu().numpy()
        return valid

    def _average(self, part: Rows, context: RowContext | None, decode: Answers, to_map: ToMap) -> Tensor:
        """Answers of windows (n, channels, side, side), averaged over the turns."""
        loaded, total = part.loaded, None
        for k in self.turns:
            regions = _turned_regions(loaded, k)
            if context is None:
                tokens, maps = self.model.encode(regions)
                own_context = own_tokens(tokens, regions, self.t)
            else:
                maps = self._kept.pop((k, part.chunk.row, int(loaded["col"][0]), part.count))
                maps = maps or self.model.encode(regions)[1]
                # (n, side, side, dim) -> (n, side * side, dim)
                own_context = turned(context.of(k, loaded["col"]), k).flatten(1, 2)
            answers = to_map(decode(maps, own_context))
            answers = turned(answers, inverse(k), first=2)
            total = answers if total is None else total + answers
        assert total is not None
        return total / len(self.turns) if len(self.turns) > 1 else total


class RowContext:
    """The context that a row of windows needs, read from disk once a row and turn."""

    def __init__(self, scene: ScenePass, parts: Parts, row: int) -> None:
        self._scene, self._parts = scene, parts
        self._kept: dict[int, Tensor] = {}
        t = scene.t
        numbers = torch.from_numpy(scene.windows.token_rows(row, scene.model.encode.halo_tokens))  # (cols, side, side)
        there = numbers[numbers >= 0]
        self._regions = int(there.min()) // (t * t), int(there.max()) // (t * t) + 1
        self._numbers = torch.where(numbers < 0, -1, numbers - self._regions[0] * t * t)

    def of(self, k: int, cols: Tensor) -> Tensor:
        """(n, side, side, dim) of the windows `cols` and their halos, in the scene's own direction.

        Zeros where no token is, as if masked.
        """
        device = self._scene.device
        if k not in self._kept:
            rows = self._parts.slice(_context_name(k), "context", *self._regions).flatten(0, 2)  # (tokens, dim)
            self._kept[k] = torch.cat([rows, rows.new_zeros(1, rows.shape[1])]).to(device)  # -1 finds the zeros
        return self._kept[k][self._numbers[cols.cpu()].to(device)]


def turned(x: Tensor, k: int, *, first: int = 1) -> Tensor:
    """Dimensions `first` and the next, (row, col), turned by element `k` of the dihedral group, as `augment.turn`."""
    if k & 4:
        x = x.transpose(first, first + 1)
    flips = [first] * bool(k & 2) + [first + 1] * (k & 1)
    return x.flip(flips) if flips else x


def turned_coords(coords: NDArray[np.float32], shape: tuple[int, int], k: int) -> Tensor:
    """Where tokens lie once the scene is turned by `k`: (regions, t * t, 2), each turned region's row by row.

    Args:
        coords: (regions, t * t, 2) of the scene itself, each region's tokens row by row.
        shape: (rows, cols) of its token lattice.
        k: element of the dihedral group.
    """
    regions, tokens, _ = coords.shape
    t = round(tokens**0.5)
    places = torch.from_numpy(coords).unflatten(1, (t, t))  # (regions, t, t, 2)
    rows, cols = shape
    row, col = places.unbind(-1)
    if k & 4:
        row, col, rows, cols = col, row, cols, rows
    row = rows - 1 - row if k & 2 else row
    col = cols - 1 - col if k & 1 else col
    return turned(torch.stack([row, col], -1), k).reshape(regions, tokens, 2)  # from (regions, t, t, 2)


def _turned_regions(loaded: dict[str, Tensor], k: int) -> dict[str, Tensor]:
    """Loaded regions, (n, h, w, C) pixels and validity, turned one by one."""
    if not k:
        return loaded
    return {name: turned(x, k) if name in ("pixels", "valid") else x for name, x in loaded.items()}


def _flat(x: Tensor) -> Tensor:
    return x.reshape(len(x), -1)  # (regions, t, t) -> (regions, t * t)


def _scan(coords: Tensor, places: Sequence[tuple[int, int, Any]]) -> Tensor:
    """The order of the regions as the turned scene's own grid would have them: by level, row by row."""
    centre = coords.mean(dim=1).numpy()  # (regions, 2)
    level = np.array([place.level for _, _, place in places])
    return torch.from_numpy(np.lexsort((centre[:, 1], centre[:, 0], level)))


def _rows_of(places: Sequence[tuple[int, int, Any]]) -> list[tuple[int, int]]:
    """(start, stop) of each row of regions of a level."""
    rows = [(place.level, place.row) for _, _, place in places]
    starts = [i for i, row in enumerate(rows) if i == 0 or row != rows[i - 1]]
    return list(zip(starts, [*starts[1:], len(rows)], strict=True))


def _gathered(parts: Parts, names: Sequence[str], regions: int) -> tuple[Tensor, Tensor]:
    """The saved tokens (regions, t * t, dim) and their validity (regions, t * t), without a second copy."""
    tokens = valid = torch.empty(0)
    start = 0
    for name in names:
        found = parts.load(name)
        if not start:
            tokens = found["tokens"].new_empty((regions, *found["tokens"].shape[1:]))
            valid = found["valid"].new_empty((regions, *found["valid"].shape[1:]))
        stop = start + len(found["tokens"])
        tokens[start:stop], valid[start:stop] = found["tokens"], found["valid"]
        start = stop
    return tokens, valid


def _context_name(k: int) -> str:
    return f"context-{k}"


def _tokens_name(k: int, group: tuple[int, int]) -> str:
    return f"tokens-{k}-{group[0]}"
