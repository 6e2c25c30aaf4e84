"""What `NearAttention` and `GlobalRead` mean, written with dense matrices: the reference of Longformer and windows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gigaxt.nn.context.global_tokens import GlobalRead, NearAttention
from gigaxt.nn.context.layers import Run, split_heads
from gigaxt.nn.context.ordering import Places
from gigaxt.nn.context.positions import rotary_angles, rotate


def dense_mixer(
    attention: NearAttention,
    read: GlobalRead | None,
    x: Tensor,
    global_tokens: Tensor | None,
    places: Places,
    near: Tensor,
) -> tuple[Tensor, Tensor | None]:
    """`near` (batch, n, n): True where the token of the row looks at that of the column, if that one is valid."""
    heads, size = attention.heads, attention.size
    if global_tokens is not None:
        assert read is not None
        everyone = torch.cat((global_tokens, x), dim=1)
        seen = nn.functional.pad(places.valid, (global_tokens.shape[1], 0), value=True)
        query = split_heads(read.query(read.norm(global_tokens)), heads)
        key, value = (split_heads(f(read.sums.norm(everyone)), heads) for f in (read.key, read.value))
        scores = (query @ key.transpose(-1, -2) / size**0.5).masked_fill(~seen[:, None, None], -torch.inf)
        global_tokens = global_tokens + attention.out((scores.softmax(-1) @ value).transpose(1, 2).flatten(2))
    query = split_heads(attention.query(attention.norm(x)), heads)
    key, value = (split_heads(t, heads) for t in attention.key_value(attention.norm(x)).chunk(2, dim=-1))
    turn = rotary_angles(places.coords, size)
    scores = rotate(query, *turn) @ rotate(key, *turn).transpose(-1, -2)
    scores = scores.masked_fill(~(near & places.valid[:, None])[:, None], -torch.inf)
    if global_tokens is not None:
        normed = attention.norm(global_tokens)
        global_key, global_value = (split_heads(t, heads) for t in attention.key_value(normed).chunk(2, dim=-1))
        scores = torch.cat((scores, query @ global_key.transpose(-1, -2)), dim=-1)
        value = torch.cat((value, global_value), dim=2)
    weights = (scores / size**0.5).softmax(-1).nan_to_num()  # a masked query may see nothing at all
    return x + attention.out((weights @ value).transpose(1, 2).flatten(2)), global_tokens


def outputs_and_gradients(
    results: tuple[Tensor, Tensor | None], places: Places, leaves: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Valid tokens and global ones, and what all leaves get for fixed gradients of them."""
    outputs = [t for t in (results[0][places.valid], results[1]) if t is not None]
    grads = [
        torch.randn(t.shape, dtype=t.dtype, generator=torch.Generator().manual_seed(i)) for i, t in enumerate(outputs)
    ]
    return outputs, list(torch.autograd.grad(outputs, leaves, grads))


def run_for(x: Tensor, segment: int | None) -> Run:
    """All kept, or recomputed in segments of that many tokens."""
    return Run(x.shape[0], x.shape[1], segment or 1, 10**9 if segment is None else 0)
