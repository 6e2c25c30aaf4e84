"""2-D windows: every token looks at the tokens around it on the lattice, and at global tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gigaxt.config import from_dict
from gigaxt.nn.context.attention import AttentionContext, attention_heads
from gigaxt.nn.context.base import ContextConfig, check_least
from gigaxt.nn.context.global_tokens import NearAttention, NearMixer
from gigaxt.nn.context.layered import Mixer
from gigaxt.nn.context.layers import Run
from gigaxt.nn.context.neighbours import Piece, find_pieces
from gigaxt.nn.context.ordering import Places
from gigaxt.nn.context.pieces import map_pieces


@dataclass(kw_only=True)
class WindowOptions:
    """`context.options` of `kind: window`."""

    radius: int = 8
    """Rows and columns in each direction that a token looks at: a square of 2 * radius + 1 tokens a side."""
    global_tokens: int = 4
    """Learned tokens that read all tokens and that all tokens read; 0 for the windows alone."""

    def __post_init__(self) -> None:
        check_least("context.options", self, radius=1, global_tokens=0)


class Window(AttentionContext):
    """2-D window attention with global tokens: Longformer's attention on a lattice instead of a line.

    Each token attends, in one softmax, to all tokens at most `radius` rows and columns away (a square around itself, as
    in Ramachandran et al. 2019, "Stand-Alone Self-Attention in Vision Models") and to the global tokens; these read all
    tokens and each other first, as in `Longformer`. Coordinates may be fractional, any number of tokens may share a
    place, and what is left out costs nothing. Positions are 2-D rotary; the scan order does not matter.

    Reach without the summary path: as `Longformer`; with `global_tokens=0` as well `depth * radius` rows and columns.

    Cost per token: on a full lattice about `5 * dim**2` multiplications in projections and `18 * dim * radius**2` in
    the attention (half of its scores are masked), less where tokens are sparse. Forward and backward take 5.9 times as
    long as a pair of linear layers with threefold width (CPU, dim 256, radius 8; 4.2 times where activations are kept),
    and the tables of neighbours 1 us a token and call. Memory: see `LayeredContext`; keys and values exist for one
    piece of the lattice at a time, of `config.segment` tokens, and are made again for the tokens around it. A radius
    of more than an eighth of `segment**0.5` needs a longer segment. The tables of neighbours take 7 bytes a token.
    Choose it where what surrounds a token matters most and the same in all directions.
    """

    options_class = WindowOptions

    @classmethod
    def count_global_tokens(cls, config: ContextConfig) -> int:
        """See `LayeredContext.count_global_tokens`."""
        return _options(config).global_tokens

    def build_mixer(self, config: ContextConfig, gain: float) -> Mixer:
        """See `LayeredContext.build_mixer`."""
        return WindowMixer(config.dim, attention_heads(config), _options(config), gain)


class WindowMixer(NearMixer):
    """What is near lies at most `radius` rows and columns away."""

    def __init__(self, dim: int, heads: int, options: WindowOptions, gain: float) -> None:
        super().__init__(dim, heads, options.global_tokens, gain)
        self.radius = options.radius

    def look_around(self, x: Tensor, global_tokens: Tensor, places: Places, run: Run) -> Tensor:
        """See `NearMixer.look_around`."""
        y = map_pieces(
            SquareWindow(self.attention, self.radius),
            x.flatten(0, 1),  # (batch, n, dim) -> (batch * n, dim)
            places.coords.flatten(0, 1),
            global_tokens,
            find_pieces(places, self.radius, run.segment),
            run.budget if run.recompute else None,
        )
        return y.view_as(x)


class SquareWindow(nn.Module):
    """The attention of one piece of the lattice."""

    def __init__(self, attention: NearAttention, radius: int) -> None:
        super().__init__()
        self.attention, self.radius = attention, radius

    def forward(self, x: Tensor, coords: Tensor, global_tokens: Tensor, piece: Piece) -> Tensor:
        """`x` (u, dim), `coords` (u, 2), `global_tokens` (batch, g, dim) -> (s, dim), of the piece's own tokens."""
        attention, count = self.attention, global_tokens.shape[1]
        global_scores, global_key, global_value = attention.of_global_tokens(global_tokens)
        normed = attention.norm(x)
        key, value = (t.squeeze(0) for t in attention.keys_values(normed.unsqueeze(0), coords.unsqueeze(0), count))
        places, (keys, meant) = piece.queries(), piece.keys()
        queries = places.flatten()
        own_coords = coords.index_select(0, queries).unflatten(0, places.shape)  # (blocks, block, 2)
        query = attention.queries(
            normed.index_select(0, queries).unflatten(0, places.shape),
            own_coords,
            global_scores.index_select(0, piece.rows),
        )
        # Global tokens' keys lie behind those of all tokens, (u + batch * g, heads, width), and in a block's list, too.
        of_row = piece.rows.unsqueeze(1) * count + torch.arange(len(x), len(x) + count, device=x.device)
        table = torch.cat((keys, of_row), dim=1)
        # global tokens: (batch, g, heads, width) -> (batch * g, heads, width)
        found = attention.attend(
            query,
            _look_up(torch.cat((key, global_key.flatten(0, 1))), table),
            _look_up(torch.cat((value, global_value.flatten(0, 1))), table),
            self._near(own_coords, coords, keys, meant),
        )
        # (blocks, block, dim) -> (s, dim)
        found = found.flatten(0, 1).index_select(0, piece.filled())
        own = x.narrow(0, piece.start, piece.count)
        y: Tensor = own + attention.out(found).to(x.dtype)
        return y

    def _near(self, own_coords: Tensor, coords: Tensor, keys: Tensor, meant: Tensor) -> Tensor:
        """Which of a block's keys its queries look at: (blocks, block, keys) bool."""
        key_coords = coords.index_select(0, keys.flatten()).unflatten(0, keys.shape)  # (blocks, keys, 2)
        near = meant.unsqueeze(1)
        for a, b in zip(own_coords.unbind(-1), key_coords.unbind(-1), strict=True):  # rows, columns
            near = near & ((a.unsqueeze(2) - b.unsqueeze(1)).abs() <= self.radius)
        return near


class _LookUp(torch.autograd.Function):
    """Rows of `x` by a table in which most appear often; the backward pass adds them up in a fixed order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, table: Tensor) -> Tensor:
        ctx.save_for_backward(table)
        ctx.rows = len(x)
        found: Tensor = x.index_select(0, table.flatten()).unflatten(0, table.shape)
        return found

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (table,) = ctx.saved_tensors
        # Not index_add, whose order on CUDA differs from run to run: a row's places in the table are a bag to sum up.
        rows, places = table.flatten().sort(stable=True)
        starts = torch.searchsorted(rows, torch.arange(ctx.rows, device=rows.device))
        # (a, b, ...) -> (a * b, channels) -> (rows, channels) -> (rows, ...)
        total = F.embedding_bag(places, grad.flatten(0, 1).flatten(1), starts, mode="sum")
        return total.unflatten(1, grad.shape[2:]), None


def _look_up(x: Tensor, table: Tensor) -> Tensor:
    """(rows, ...) by `table` (a, b) int64 -> (a, b, ...)."""
    result: Tensor = _LookUp.apply(x, table)
    return result


def _options(config: ContextConfig) -> WindowOptions:
    return from_dict(WindowOptions, config.options, "context.options")
