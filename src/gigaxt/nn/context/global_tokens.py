"""Attention among near tokens and global ones, the common ground of Longformer and 2-D windows (Beltagy et al. 2020).

Global tokens are learned and have no place. In each layer (`NearMixer`) they read all tokens and each other, with
projections of their own (`GlobalRead`); then every token looks at the tokens near it and at the global ones, in one
softmax (`NearAttention`). Which tokens are near is what the kinds differ in.
"""

from __future__ import annotations

import math
from abc import abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gigaxt.nn.context.layered import Mixer
from gigaxt.nn.context.layers import Norm, Run, linear, split_heads
from gigaxt.nn.context.ordering import Places
from gigaxt.nn.context.positions import rotary_angles, rotate
from gigaxt.nn.context.summary import SHARPNESS, add_to_softmax, empty_softmax
from gigaxt.streaming.recurrence import State

CHANNELS = 8
"""Fused attention kernels need head widths that are multiples of this."""
MOST_BLOCKS = 65535
"""Of one call: CUDA launches no larger grid."""


class NearMixer(Mixer):
    """Adds to the global tokens what they read in the scene, and to the tokens what they found near and in these.

    Reading comes first, so that what is far arrives in the same layer; in the paper it arrives in the next one, and
    what the last layer's global tokens read is lost.

    Args:
        dim: width of tokens and global tokens.
        heads: of both attentions; `dim` must be a multiple of 4 * heads.
        count: of global tokens.
        gain: of the last projection at the start.
    """

    def __init__(self, dim: int, heads: int, count: int, gain: float) -> None:
        super().__init__()
        self.read = GlobalRead(dim, heads) if count else None
        self.attention = NearAttention(dim, heads, gain)

    def forward(
        self, x: Tensor, global_tokens: Tensor | None, places: Places, run: Run, state: State | None
    ) -> tuple[Tensor, Tensor | None, State | None]:
        """See `Mixer`."""
        if self.read is None or global_tokens is None:
            return self.look_around(x, x.new_empty(x.shape[0], 0, x.shape[2]), places, run), None, None
        found = self.read(global_tokens, x, places.valid, run)
        global_tokens = global_tokens + self.attention.out(found).to(global_tokens.dtype)
        return self.look_around(x, global_tokens, places, run), global_tokens, None

    @abstractmethod
    def look_around(self, x: Tensor, global_tokens: Tensor, places: Places, run: Run) -> Tensor:
        """`x` (batch, n, dim) plus what it finds near and in `global_tokens` (batch, g, dim); g may be 0."""


class GlobalRead(nn.Module):
    """Global tokens look at all tokens and at each other: one softmax over the scene, streamed segment by segment.

    The tokens' keys and values are never made: a score `query . (K token)` is `(K^T query) . token`, and the weighted
    sum of values `V token` is V times that of the tokens. So each head of each global token costs `2 * dim`
    multiplications a token, and the projections of all tokens, `2 * dim**2`, are saved.

    Args:
        dim: width of tokens and global tokens.
        heads: of the attention.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = Norm(dim)
        self.query, self.key, self.value = linear(dim, dim, SHARPNESS), linear(dim, dim), linear(dim, dim)
        self.sums = TokenSums(dim)

    def forward(self, global_tokens: Tensor, x: Tensor, valid: Tensor, run: Run) -> Tensor:
        """What the global tokens (batch, g, dim) find in themselves and in `x` (batch, n, dim) where `valid`.

        Returns:
            (batch, g, dim), the heads side by side, ahead of the last projection.
        """
        query = split_heads(self.query(self.norm(global_tokens)), self.heads) / math.sqrt(x.shape[-1] // self.heads)
        # (batch, heads, g, head_dim) @ (heads, head_dim, dim) -> (batch, heads * g, dim)
        query = (query @ self.key.weight.unflatten(0, (self.heads, -1))).flatten(1, 2)
        everyone = torch.ones(global_tokens.shape[:2], dtype=torch.bool, device=x.device)
        _, *state = self.sums(global_tokens, everyone, query, *empty_softmax(query))
        _, (_, total, weighted) = run(self.sums, (x, valid), tuple(state), shared=(query,))
        mean = (weighted / total).to(query.dtype).unflatten(1, (self.heads, -1))  # (batch, heads, g, dim)
        found: Tensor = mean @ self.value.weight.unflatten(0, (self.heads, -1)).transpose(-1, -2)
        return found.transpose(1, 2).flatten(2)  # (batch, heads, g, head_dim) -> (batch, g, dim)


class TokenSums(nn.Module):
    """One segment of a softmax over all tokens that sums up the normalised tokens themselves."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = Norm(dim)

    def forward(
        self, x: Tensor, valid: Tensor, query: Tensor, maximum: Tensor, total: Tensor, weighted: Tensor
    ) -> tuple[None, Tensor, Tensor, Tensor]:
        """Add `x` (batch, tokens, dim) to the sums for `query` (batch, queries, dim); see `add_to_softmax`."""
        x = self.norm(x)
        scores = query @ x.transpose(-1, -2)  # (batch, queries, tokens)
        return None, *add_to_softmax(scores, x, valid.unsqueeze(1), maximum, total, weighted)


class NearAttention(nn.Module):
    """Projections of an attention in which tokens look at near tokens and at global ones; what is near, the kind says.

    Queries and keys of tokens are turned by their places (2-D rotary), so that scores depend on where two tokens lie to
    each other. Global tokens have no place: their scores are made of queries and keys that are not turned. So that
    fused kernels do it all in one softmax, heads get `CHANNELS` more channels (or a multiple): a query has its scores
    with the global tokens there, the key of global token i a one in channel i and zeros elsewhere.

    Args:
        dim: width of the tokens.
        heads: of the attention; `dim` must be a multiple of 4 * heads.
        gain: of the last projection at the start.
    """

    def __init__(self, dim: int, heads: int, gain: float) -> None:
        super().__init__()
        self.heads, self.size = heads, dim // heads
        self.norm = Norm(dim)
        self.query, self.key_value = linear(dim, dim), linear(dim, 2 * dim)
        self.out = linear(dim, dim, gain, bias=True)

    def queries(self, x: Tensor, coords: Tensor, global_keys: Tensor) -> Tensor:
        """Queries of normalised tokens.

        Args:
            x: (rows, n, dim).
            coords: (rows, n, 2) as (row, col).
            global_keys: (rows, heads, head_dim, g).

        Returns:
            (rows, n, heads, width).
        """
        query = self.query(x).unflatten(-1, (self.heads, -1))  # (rows, n, heads, head_dim)
        scores = (query.transpose(1, 2) @ global_keys).transpose(1, 2)  # (rows, n, heads, g)
        count = scores.shape[-1]
        return torch.cat((self._turn(query, coords), F.pad(scores, (0, _extra(count) - count))), dim=-1)

    def keys_values(self, x: Tensor, coords: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Keys and values (rows, n, heads, width) of normalised tokens (rows, n, dim), beside `count` global tokens."""
        key, value = (t.unflatten(-1, (self.heads, -1)) for t in self.key_value(x).chunk(2, dim=-1))
        return F.pad(self._turn(key, coords), (0, _extra(count))), F.pad(value, (0, _extra(count)))

    def of_global_tokens(self, global_tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """For `queries`: keys (rows, heads, head_dim, g); to be looked at: keys and values (rows, g, heads, width)."""
        rows, count = global_tokens.shape[:2]
        projected = self.key_value(self.norm(global_tokens)).unflatten(-1, (2, self.heads, -1))
        key, value = projected.unbind(2)  # (rows, g, heads, head_dim)
        one_hot = torch.eye(count, self.size + _extra(count), dtype=key.dtype, device=key.device).roll(self.size, 1)
        marks = one_hot.unsqueeze(1).expand(rows, -1, self.heads, -1)
        return key.permute(0, 2, 3, 1), marks, F.pad(value, (0, _extra(count)))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, near: Tensor) -> Tensor:
        """One softmax a query, over the keys of its block that are near and over those behind them, of global tokens.

        Args:
            query: (blocks, n, heads, width).
            key: (blocks, m + g, heads, width).
            value: likewise.
            near: (blocks, n, m) bool; at least one in each row.

        Returns:
            (blocks, n, dim).
        """
        if len(query) > MOST_BLOCKS:
            parts = zip(*(t.split(MOST_BLOCKS) for t in (query, key, value, near)), strict=True)
            return torch.cat([self.attend(*part) for part in parts])
        # Global tokens are near to all.
        mask = F.pad(near, (0, key.shape[1] - near.shape[-1]), value=True).unsqueeze(1)  # (blocks, 1, n, m + g)
        query, key, value = (t.transpose(1, 2) for t in (query, key, value))  # (blocks, heads, n, width)
        found = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=self.size**-0.5)
        # (blocks, heads, n, width) -> (blocks, n, heads * head_dim)
        return found[..., : self.size].transpose(1, 2).flatten(2)

    def _turn(self, x: Tensor, coords: Tensor) -> Tensor:
        """`x` (rows, n, heads, head_dim) turned by its places."""
        cos, sin = rotary_angles(coords, self.size)
        return rotate(x, cos.transpose(1, 2), sin.transpose(1, 2))


def _extra(count: int) -> int:
    """Channels for the scores of `count` global tokens."""
    return -(-count // CHANNELS) * CHANNELS
