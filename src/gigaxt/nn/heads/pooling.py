"""The classification head's pooling over scenes of many tokens, segment by segment."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gigaxt.nn.context.summary import add_to_softmax, empty_softmax
from gigaxt.streaming.recurrence import scan

SEGMENT, DEVICE_SEGMENT = 8192, 32768
"""Tokens of all cases together that are pooled at once. As many are pooled at once by ordinary autograd. On a device
fewer launches are worth more."""


def at_once(device: torch.device) -> int:
    """The one for `device`."""
    return SEGMENT if device.type == "cpu" else DEVICE_SEGMENT


class PoolSegment(nn.Module):
    """Adds one segment of tokens to each head's weighted sum.

    Args:
        norm: of the tokens.
        queries: from a normed token to its scores, one a head; None: one head, to which all tokens are alike.
    """

    def __init__(self, norm: nn.Module, queries: nn.Module | None) -> None:
        super().__init__()
        self.norm, self.queries = norm, queries

    def forward(
        self, context: Tensor, valid: Tensor, maximum: Tensor, total: Tensor, weighted: Tensor
    ) -> tuple[None, Tensor, Tensor, Tensor]:
        """`context` (B, n, dim) and `valid` (B, n); the sums as in `add_to_softmax`, (B, heads, 1 or dim)."""
        tokens = self.norm(context)
        if self.queries is None:
            scores = tokens.new_zeros(len(tokens), 1, tokens.shape[1])
        else:
            scores = self.queries(tokens).transpose(1, 2)  # (B, n, heads) -> (B, heads, n)
        return None, *add_to_softmax(scores, tokens, valid[:, None, :], maximum, total, weighted)


def pooled_in_segments(
    norm: nn.Module, queries: nn.Module | None, heads: int, context: Tensor, valid: Tensor
) -> Tensor:
    """What each head pools of all channels, (B, heads, dim), keeping no more than `context` for the backward pass.

    Args:
        norm: see `PoolSegment`.
        queries: see `PoolSegment`.
        heads: how many.
        context: (B, N, dim).
        valid: (B, N) bool; a case without any valid token gets 0.
    """
    batch, _, dim = context.shape
    start = empty_softmax(context.new_zeros(batch, heads, dim))
    segment = max(1, at_once(context.device) // batch)
    _, (_, total, weighted) = scan(PoolSegment(norm, queries), (context, valid), start, segment=segment)
    return (weighted / total).masked_fill(~valid.any(1)[:, None, None], 0).to(context.dtype)
