"""Transformer-XL: attention within segments of the scan order and to a memory of their neighbours (Dai et al. 2019)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from gigaxt.config import from_dict
from gigaxt.errors import ConfigError
from gigaxt.nn.context.base import ContextConfig, check_least
from gigaxt.nn.context.layered import LayeredContext, Mixer
from gigaxt.nn.context.layers import Norm, Run, largest_divisor, linear, split_heads
from gigaxt.nn.context.ordering import Places
from gigaxt.streaming.recurrence import State
from gigaxt.streaming.rows import at_least_float32

LONGEST_WAVE = 10_000.0
"""Of the sinusoids of relative distances, over 2 pi; as in the paper."""
SCORES_AT_ONCE = 2**22
"""Larger attention matrices are made in parts: on a CPU, above 32 MiB, the memory is mapped anew each time, and forward
and backward take up to 1.3 times as long."""


@dataclass(kw_only=True)
class TransformerXLOptions:
    """`context.options` of `kind: xl`."""

    segment: int = 128
    """Tokens in a segment of the scan order. (`context.segment` is how many are computed at once.)"""
    memory: int = 1
    """Segments before its own, if bidirectional also after it, that a token reads as the layer below left them."""
    memory_grad: bool = False
    """Let gradients through to the tokens of the memory; the paper stops them there."""

    def __post_init__(self) -> None:
        check_least("context.options", self, segment=1, memory=0)


class TransformerXL(LayeredContext):
    """Transformer-XL (Dai et al. 2019, "Attentive Language Models Beyond a Fixed-Length Context").

    The scan order is cut into segments. A token looks at its own segment (if causal: up to itself) and at the memory,
    the layer's inputs of the `memory` segments before; the scores are the paper's, with biases u and v and a learned
    projection of sinusoids of the distance along the scan. Layer by layer the memory holds what its tokens learnt from
    theirs, so content travels `memory` segments a layer: without the summary path a token depends on `depth * memory`
    segments before its own and on no more. The gradient goes back as far only with `memory_grad`; as in the paper it
    otherwise stops at the first memory, that is, tokens learn from the answers within their own segment alone.

    Ours: with `bidirectional` the memory lies before and after, in one softmax (distances are signed, as in XLNet);
    normalisation is ahead of the attention; all segments of a layer are computed in one batch, which gives what going
    from one to the next would, as a layer's memory depends on the layers below alone. Distances along the scan do not
    tell rows from columns, so the Fourier features of the coordinates are added on entry as for state-space kinds.

    With `bidirectional=False, summary=0, alternate=False` a scene can be continued strip by strip (`order="raster"`, of
    whole rows): pass the state that the last call returned. It holds the memory and the tokens of the unfinished
    segment, which are computed again: up to `(memory + 1) * segment` tokens a strip.

    Cost per token: `4 * dim**2` multiplications in projections (`6 * dim**2` without `memory_grad`, in training) and
    `3 * dim` for each of the `segment * (memory + 1)` tokens looked at (`segment * (2 * memory + 1)` if
    bidirectional). Forward and backward take 3.3 times as long as a pair of linear layers with threefold width in
    between, 4.1 times if bidirectional, and 4.5 and 5.8 times where activations are computed again (CPU, dim 192; with
    segments of 64 tokens 2.3 and 2.9 times). Memory: `2 * depth + 2.2` token stores, see `LayeredContext`; and about
    five times `heads * segment * (2 * memory + 1)` numbers for each token that is computed at once.
    Choose it where exact attention among neighbours matters and what is far may come through the summary path, or
    to compare with the published xT; for reach of its own choose `mamba2`.
    """

    options_class = TransformerXLOptions

    @classmethod
    def check_config(cls, config: ContextConfig) -> None:
        """See `ContextEncoder.check_config`."""
        super().check_config(config)
        if config.dim % _heads(config):
            raise ConfigError(f"context.heads: expected a divisor of dim = {config.dim}, got {config.heads}")

    def build_mixer(self, config: ContextConfig, gain: float) -> Mixer:
        """See `LayeredContext.build_mixer`."""
        return TransformerXLMixer(config, gain)


class TransformerXLMixer(Mixer):
    """Adds what attention to segment and memory found to the tokens.

    State: the tokens (batch, held, dim) from the start of the memory on, zeros after a row's last one, and how many of
    them each row has (batch,), int64 on the host.
    """

    def __init__(self, config: ContextConfig, gain: float) -> None:
        super().__init__()
        options = from_dict(TransformerXLOptions, config.options, "context.options")
        self.segment, self.memory, self.causal = options.segment, options.memory, not config.bidirectional
        self.attention = RelativeAttention(config.dim, _heads(config), gain, self.causal, options.memory_grad)

    def forward(
        self, x: Tensor, global_tokens: Tensor | None, places: Places, run: Run, state: State | None
    ) -> tuple[Tensor, Tensor | None, State | None]:
        """See `Mixer`."""
        if not self.causal:
            return self._attend(x, places.valid, run), global_tokens, None
        counts = places.valid.sum(1).tolist() if places.ragged else [x.shape[1]] * x.shape[0]
        if state is None:
            ends = counts
            y = self._attend(x, places.valid, run)
        else:
            # Put what is held ahead of the strip, so that each row begins at a border of its segments.
            old, held = state[0], state[1].tolist()
            ends = [h + count for h, count in zip(held, counts, strict=True)]
            x = _pack(torch.cat((a[:h], b[:count])) for a, h, b, count in zip(old, held, x, counts, strict=True))
            valid = torch.arange(x.shape[1], device=x.device) < torch.tensor(ends, device=x.device).unsqueeze(1)
            y = self._attend(x, valid, replace(run, tokens=x.shape[1]))
            y = _pack(row[h:end] for row, h, end in zip(y, held, ends, strict=True))
        # Of the memory and the unfinished segment.
        starts = [max(0, end - end % self.segment - self.memory * self.segment) for end in ends]
        recent = _pack(row[start:end] for row, start, end in zip(x, starts, ends, strict=True))
        return y, global_tokens, (recent, torch.tensor(ends) - torch.tensor(starts))

    def fits(self, state: State, x: Tensor) -> bool:
        """See `Mixer`."""
        if len(state) != 2:
            return False
        tokens, held = state
        alike = tokens.ndim == 3 and (len(tokens), tokens.shape[2], tokens.dtype) == (len(x), x.shape[2], x.dtype)
        fits = alike and held.shape == (len(x),) and held.max() <= tokens.shape[1] < (self.memory + 1) * self.segment
        return bool(fits)

    def _attend(self, x: Tensor, valid: Tensor, run: Run) -> Tensor:
        """`x` (batch, n, dim), whose rows begin at a border of their segments, plus what attention found."""
        tokens = x.shape[1]
        segment = min(self.segment, tokens)
        memory = min(self.memory, -(-tokens // segment) - 1)
        reach = Reach(segment, memory, 0 if self.causal else memory)
        halo = (reach.before * segment, reach.after * segment)
        y, _ = run(_Reaching(self.attention, reach), (x, valid), halo=halo, multiple=segment)
        assert y is not None
        return y


class Reach(NamedTuple):
    """How far the tokens of one call look."""

    segment: int
    """Tokens in a segment."""
    before: int
    """Segments of memory before its own."""
    after: int
    """Segments of memory after its own."""

    @property
    def width(self) -> int:
        """Tokens that a token looks at, memory included."""
        return (self.before + 1 + self.after) * self.segment

    def windows(self, own: Tensor, memory: Tensor) -> Tensor:
        """Put each segment between its memories.

        Args:
            own: (..., before + segments + after, segment, channels).
            memory: the same tokens as other segments see them.

        Returns:
            (..., segments, width, channels).
        """
        segments = own.shape[-3] - self.before - self.after
        parts = range(self.before + 1 + self.after)
        return torch.cat([(own if i == self.before else memory).narrow(-3, i, segments) for i in parts], dim=-2)


class RelativeAttention(nn.Module):
    """Multi-head attention of Transformer-XL, for many segments at once.

    Args:
        dim: width of the tokens.
        heads: a divisor of `dim`.
        gain: of the last projection at the start.
        causal: whether a token looks at none after itself.
        memory_grad: whether gradients reach the tokens of the memory. Those of the parameters go through it anyway.
    """

    def __init__(self, dim: int, heads: int, gain: float, causal: bool, memory_grad: bool) -> None:
        super().__init__()
        self.heads, self.causal, self.memory_grad = heads, causal, memory_grad
        self.norm = Norm(dim)
        self.query, self.key_value = linear(dim, dim), linear(dim, 2 * dim)
        self.position = linear(dim + dim % 2, dim)
        # u and v of the paper.
        self.content_bias = nn.Parameter(torch.zeros(heads, dim // heads))
        self.position_bias = nn.Parameter(torch.zeros(heads, dim // heads))
        self.out = linear(dim, dim, gain)

    def forward(self, x: Tensor, valid: Tensor, reach: Reach) -> tuple[Tensor]:
        """Tokens with the memories around them (batch, before + n + after, dim) -> (batch, n, dim).

        `before` and `after` are whole segments; n is a multiple of one but at the end of a scene. `valid` is like `x`
        without the last axis.
        """
        segment = reach.segment
        tokens = x.shape[1] - reach.width + segment
        # Behind the memory after it, which at the end of a scene is as empty.
        missing = -tokens % segment
        x, valid = F.pad(x, (0, 0, 0, missing)), F.pad(valid, (0, missing))
        start = reach.before * segment
        hidden = self.norm(x)
        query = self._split(self.query(hidden.narrow(1, start, tokens + missing)), segment)[0]
        own = memory = self.key_value(hidden)
        if not self.memory_grad and x.requires_grad and torch.is_grad_enabled():
            memory = self.key_value(self.norm(x.detach()))  # the same numbers
        # (2, heads, batch, segments, width, head_dim)
        key, value = reach.windows(self._split(own, segment), self._split(memory, segment))
        valid = valid.unflatten(1, (-1, segment)).unsqueeze(-1)
        # (batch, segments, width, 1) -> (rows, 1, width)
        allowed = reach.windows(valid, valid).flatten(0, 1).transpose(1, 2)
        if self.causal:
            places = torch.arange(reach.width, device=x.device)
            allowed = allowed & (places <= places[start : start + segment, None])
        # A row is a segment of one of the batch: (heads, rows, ..., head_dim)
        query, key, value = (t.flatten(1, 2) for t in (query, key, value))
        rows = max(1, SCORES_AT_ONCE // (self.heads * segment * reach.width))
        distances = self._project_distances(reach, x.device)
        pieces = zip(query.split(rows, 1), key.split(rows, 1), value.split(rows, 1), allowed.split(rows), strict=True)
        found = torch.cat([self._attend(*piece, distances) for piece in pieces], dim=1)
        # (heads, rows, segment, head_dim) -> (batch, tokens, dim)
        found = found.permute(1, 2, 0, 3).flatten(2).unflatten(0, (len(x), -1)).flatten(1, 2)[:, :tokens]
        return (x.narrow(1, start, tokens) + self.out(found).to(x.dtype),)

    def _split(self, x: Tensor, segment: int) -> Tensor:
        """(batch, tokens, parts * dim) -> (parts, heads, batch, segments, segment, head_dim)."""
        parts = x.shape[-1] // self.out.in_features
        split: Tensor = x.unflatten(2, (parts, self.heads, -1)).unflatten(1, (-1, segment))
        return split.permute(3, 4, 0, 1, 2, 5)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, allowed: Tensor, distances: Tensor) -> Tensor:
        """Attention of (heads, rows, segment, head_dim) to (heads, rows, width, head_dim).

        `allowed` (rows, 1 or segment, width) is True where a query may look at a key; `distances` are projected.
        """
        content, position = (
            (query + bias[:, None, None]) / math.sqrt(query.shape[-1])
            for bias in (self.content_bias, self.position_bias)
        )
        # (heads, rows, segment, width), in float32 or better
        scores = content @ key.transpose(-1, -2)
        scores = scores.to(at_least_float32(scores.dtype))
        # (heads, rows * segment, head_dim) @ (heads, head_dim, distances)
        by_distance = (position.flatten(1, 2) @ distances).unflatten(1, query.shape[1:3])
        scores += shift(by_distance, key.shape[-2])
        # Finite, because a masked query may have nothing to look at and must not become NaN.
        scores += torch.zeros_like(allowed, dtype=scores.dtype).masked_fill_(~allowed, torch.finfo(scores.dtype).min)
        return scores.softmax(-1).to(value.dtype) @ value

    def _project_distances(self, reach: Reach, device: torch.device) -> Tensor:
        """Projected sinusoids (heads, head_dim, distances) of the distance from key to query, the largest first.

        If causal, keys behind the query are left out but for one, which `shift` needs.
        """
        count = reach.width + (1 if self.causal else reach.segment)
        weight = self.position.weight
        dtype = at_least_float32(weight.dtype)
        distances = (reach.before + 1) * reach.segment - 1 - torch.arange(count, device=device, dtype=dtype)
        steps = torch.arange(0, weight.shape[1], 2, device=device, dtype=dtype) / weight.shape[0]
        angles = distances.unsqueeze(1) * LONGEST_WAVE**-steps
        projected: Tensor = self.position(torch.cat((angles.sin(), angles.cos()), dim=1).to(weight.dtype))
        # (distances, dim) -> (heads, distances, head_dim) -> (heads, head_dim, distances)
        return split_heads(projected.unsqueeze(0), self.heads)[0].transpose(1, 2)


def shift(scores: Tensor, width: int) -> Tensor:
    """From scores by distance to scores by key: a view without a copy.

    Query i of a segment finds key 0 at place `segment - 1 - i`, one place earlier than query i - 1 does. In memory that
    is a constant step, one less than the distances.

    Args:
        scores: (..., segment, distances), contiguous; at least `width + 1` distances.
        width: keys.

    Returns:
        (..., segment, width). Where `segment - 1 - i + key` is not below the distances, a number without meaning.
    """
    segment, distances = scores.shape[-2:]
    flat = scores.flatten(-2).narrow(-1, segment - 1, segment * (distances - 1))
    by_query: Tensor = flat.unflatten(-1, (segment, distances - 1))
    return by_query.narrow(-1, 0, width)


class _Reaching(nn.Module):
    """Attention as `run` calls it, with the reach of this call."""

    def __init__(self, attention: RelativeAttention, reach: Reach) -> None:
        super().__init__()
        self.attention, self.reach = attention, reach

    def forward(self, x: Tensor, valid: Tensor) -> tuple[Tensor]:
        result: tuple[Tensor] = self.attention(x, valid, self.reach)
        return result


def _pack(rows: Iterable[Tensor]) -> Tensor:
    """Rows of different lengths as a batch, zeros at their ends."""
    batch: Tensor = pad_sequence(list(rows), batch_first=True)
    return batch


def _heads(config: ContextConfig) -> int:
    return config.heads or largest_divisor(config.dim, max(1, config.dim // 32))
