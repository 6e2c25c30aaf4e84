"""Which tokens of a scene are near which on the lattice: index tables for `window`, made on the host once a call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gigaxt.nn.context.ordering import Places
from gigaxt.regions import hilbert_key
from gigaxt.streaming.untraced import untraced

Ints = NDArray[np.int64]
MOST_KEYS = 16
"""Of a piece, for each query. A token of a full lattice needs about 9: its block's, shared among as many queries."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Some blocks of queries, computed together, and all tokens that they may look at.

    A block is a fixed number of tokens that lie together; the last one of a batch row is filled up by repeating its
    last token. What is kept is small, seven bytes a token on a full lattice; the tables that the attention wants are
    made of it on the device, for one piece at a time.
    """

    tokens: Tensor
    """(u,) int32: flat places, in (batch * n), of all tokens that the blocks need."""
    start: int
    """Place of the first query among `tokens`; the others follow it."""
    count: int
    """Queries without repetitions, s. Each valid token is one in one piece."""
    block: int
    """Queries of a block."""
    most: int
    """Keys of the block that has the most."""
    lengths: Tensor
    """(blocks,) int64: queries of each block without repetitions."""
    rows: Tensor
    """(blocks,) int64: batch row of each block."""
    key_starts: Tensor
    """(blocks, ranges) int32: where, among `tokens`, ranges of tokens begin to which some query of a block may be
    near."""
    key_sizes: Tensor
    """(blocks, ranges) int32: their tokens; 0 behind a block's last range."""

    @property
    def own(self) -> Tensor:
        """(s,) int64: flat places, in (batch * n), of the queries without repetitions."""
        return self.tokens.narrow(0, self.start, self.count).long()

    def queries(self) -> Tensor:
        """(blocks, block) int64: places of the queries among `tokens`."""
        within = torch.arange(self.block, device=self.tokens.device)
        firsts = self.lengths.cumsum(0) - self.lengths + self.start
        return firsts.unsqueeze(1) + torch.minimum(within, self.lengths.unsqueeze(1) - 1)

    def filled(self) -> Tensor:
        """(s,) int64: places of `own` in the flattened `queries`."""
        repeated = (self.block - self.lengths).cumsum(0) - (self.block - self.lengths)  # in the blocks before
        places = torch.arange(self.count, device=self.tokens.device)
        return places + repeated.repeat_interleave(self.lengths, output_size=self.count)

    def keys(self) -> tuple[Tensor, Tensor]:
        """(blocks, most) int64: places of a block's keys among `tokens`; and bool, which are meant: 0 stands behind."""
        ends = self.key_sizes.cumsum(1, dtype=torch.int32)
        places = torch.arange(self.most, dtype=torch.int32, device=ends.device).expand(len(ends), -1).contiguous()
        inside = torch.searchsorted(ends, places, right=True).clamp_(max=ends.shape[1] - 1)
        meant = places < ends[:, -1:]
        keys = (self.key_starts - (ends - self.key_sizes)).gather(1, inside) + places
        return keys.masked_fill(~meant, 0).long(), meant


@untraced  # NumPy on the host
def find_pieces(places: Places, radius: int, segment: int) -> list[Piece]:
    """Cut the valid tokens of a batch into blocks and pieces, and list for each block the tokens around it.

    Only cells of the lattice that hold tokens cost anything: gaps may be as large as they like, and any number of
    tokens may share a cell. Kept with `places`, for the next layers.

    Args:
        places: coordinates and validity of the tokens.
        radius: lattice units that a token looks at in each direction.
        segment: most queries in a piece, and `1 / MOST_KEYS` of the most keys, but at least one block.
    """
    key = ("pieces", radius, segment)
    if key not in places.memo:
        places.memo[key] = _Finder(places, radius).pieces(segment)
    pieces: list[Piece] = places.memo[key]
    return pieces


class _Finder:
    """The valid tokens of a batch, sorted by square cells of `side` lattice units, these along a Hilbert curve."""

    def __init__(self, places: Places, radius: int) -> None:
        self.device = places.coords.device
        coords, counts = places.on_host()
        within = np.arange(counts.max(), dtype=np.int64)
        row, place = np.nonzero(within < counts[:, None])
        flat = row * len(within) + place
        # Small enough that few tokens out of reach are listed, large enough that cells are fewer than tokens.
        side = max(2.0, radius / 2)
        cells = np.floor(coords[flat] / side).astype(np.int64)
        order = np.lexsort((hilbert_key(cells[:, 0], cells[:, 1]), row))
        self.flat, self.row, cells = flat[order], row[order], cells[order]

        begins = np.ones(len(flat), bool)
        begins[1:] = (np.diff(cells, axis=0) != 0).any(axis=1) | (np.diff(self.row) != 0)
        self.cell = np.cumsum(begins) - 1  # of each token
        self.starts = np.flatnonzero(begins)
        self.sizes = np.diff(self.starts, append=len(flat))
        around = _around(cells[begins], self.row[begins], reach=int(np.ceil(radius / side)))

        # On a full lattice a block is a square of about the radius, so that it sees 3 x 3 such squares.
        self.block = min(max(64, radius**2), 256)
        within = np.arange(len(flat)) - np.searchsorted(self.row, self.row)
        self.firsts = np.flatnonzero(within % self.block == 0)
        self.lasts = np.append(self.firsts[1:], len(flat)) - 1
        self.pair_block, self.pair_cell = self._pairs(around)
        self.keys = np.bincount(self.pair_block, self.sizes[self.pair_cell], len(self.firsts)).astype(np.int64)

    def _pairs(self, around: Ints) -> tuple[Ints, Ints]:
        """Each block with each cell that it may look at, sorted by block; `around` (cells, neighbours), -1 for none."""
        first, last = self.cell[self.firsts], self.cell[self.lasts]
        block = np.repeat(np.arange(len(first)), last - first + 1)
        near = around[_ranges(first, last - first + 1)]
        pairs = np.unique((block[:, None] * len(around) + near)[near >= 0])
        return pairs // len(around), pairs % len(around)

    def pieces(self, segment: int) -> list[Piece]:
        """Neighbouring blocks together, as many as `segment` allows."""
        borders, most = [0], 0
        for i, keys in enumerate(self.keys.tolist()):
            most = max(most, keys)
            blocks = i + 1 - borders[-1]
            if blocks > 1 and blocks * max(self.block, most / MOST_KEYS) > segment:
                borders.append(i)
                most = keys
        return [self._piece(a, b) for a, b in zip(borders, [*borders[1:], len(self.keys)], strict=True)]

    def _piece(self, start: int, stop: int) -> Piece:
        """Blocks start..stop."""
        pairs = slice(*np.searchsorted(self.pair_block, (start, stop)))
        cells, local = np.unique(self.pair_cell[pairs], return_inverse=True)
        sizes = self.sizes[cells]
        begins = np.cumsum(sizes) - sizes  # of the cells among the piece's tokens
        # Cells that follow each other there are one range.
        block = self.pair_block[pairs] - start
        first = np.ones(len(block), bool)
        first[1:] = (np.diff(local) != 1) | (np.diff(block) != 0)
        heads = np.flatnonzero(first)
        of_block = np.bincount(block[heads], minlength=stop - start)
        shape = stop - start, int(of_block.max())
        listed = np.arange(shape[1]) < of_block[:, None]
        key_starts, key_sizes = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        key_starts[listed] = begins[local[heads]]
        key_sizes[listed] = np.add.reduceat(sizes[local], heads)

        firsts, lasts = self.firsts[start:stop], self.lasts[start:stop]
        lengths = lasts - firsts + 1
        cell = self.cell[firsts[0]]

        def put(table: NDArray[Any]) -> Tensor:
            return torch.from_numpy(table).to(self.device)

        return Piece(
            tokens=put(self.flat[_ranges(self.starts[cells], sizes)].astype(np.int32)),
            start=int(begins[np.searchsorted(cells, cell)] + firsts[0] - self.starts[cell]),
            count=int(lengths.sum()),
            block=int(lengths.max()),
            most=int(self.keys[start:stop].max()),
            lengths=put(lengths),
            rows=put(self.row[firsts]),
            key_starts=put(key_starts),
            key_sizes=put(key_sizes),
        )


def _around(cells: Ints, row: Ints, reach: int) -> Ints:
    """For each cell (row, col) of a batch row, those at most `reach` cells away: (cells, neighbours), -1 for none."""
    height, width = cells.max(axis=0) + 1 + reach  # so that what lies beyond a border is no cell of the next line
    code = (row * height + cells[:, 0]) * width + cells[:, 1]
    order = np.argsort(code)
    steps = np.arange(-reach, reach + 1)
    wanted = code[:, None] + (steps[:, None] * width + steps).reshape(-1)
    found = order[np.minimum(np.searchsorted(code, wanted, sorter=order), len(code) - 1)]
    return np.where(code[found] == wanted, found, -1)


def _ranges(starts: Ints, sizes: Ints) -> Ints:
    """start, start + 1, ... of each range, one after the other."""
    ends = np.cumsum(sizes)
    result: Ints = np.repeat(starts - ends + sizes, sizes) + np.arange(ends[-1])
    return result
