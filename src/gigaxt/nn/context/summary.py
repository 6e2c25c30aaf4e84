"""The summary path: learned latents that read all tokens and that all tokens read, at linear cost."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gigaxt.nn.context.layers import Mlp, Norm, Run, linear, split_heads
from gigaxt.streaming.recurrence import State
from gigaxt.streaming.rows import at_least_float32

SHARPNESS = 2.0
"""Standard deviation of the reading scores at the start, so that each latent picks some tokens out. Near 0 all weights
are 1 / tokens, and one region among thousands has hardly any effect."""


class Summary(nn.Module):
    """Latents read the tokens by cross-attention and are mixed among themselves (Perceiver, Jaegle et al. 2021).

    Cost per token: two projections and `2 * latents * dim` multiplications each to be read and (in `Finish`) to read.
    Memory: scores of one segment; nothing per token. The softmax over all tokens is summed up segment by segment.
    Masked tokens get weight zero.

    Args:
        dim: width of tokens and latents.
        heads: of the attentions.
        gain: of the projections that mix the latents, at the start.
    """

    def __init__(self, dim: int, heads: int, gain: float) -> None:
        super().__init__()
        self.heads = heads
        self.query_norm, self.query = Norm(dim), linear(dim, dim, SHARPNESS)
        self.read = Read(dim, heads)
        self.found_norm, self.read_out = Norm(dim), linear(dim, dim, bias=True)
        self.mix_norm, self.mix_qkv = Norm(dim), linear(dim, 3 * dim)
        self.mix_out = linear(dim, dim, gain, bias=True)
        self.mlp_norm, self.mlp = Norm(dim), Mlp(dim, 2.0, gain)
        self.memory_norm, self.memory = Norm(dim), linear(dim, 2 * dim)

    def forward(self, x: Tensor, valid: Tensor, latents: Tensor, run: Run) -> tuple[Tensor, State]:
        """Read `x` (batch, tokens, dim) into `latents` (batch, latents, dim).

        Returns:
            The new latents, and their keys and values (batch, heads, latents, head_dim) for `Finish`.
        """
        query = split_heads(self.query(self.query_norm(latents)), self.heads)
        _, (_, total, weighted) = run(self.read, (x, valid), self.read.start(query), shared=(query,))
        # (batch, heads, latents, head_dim) -> (batch, latents, dim)
        gathered = (weighted / total).transpose(1, 2).flatten(2).to(latents.dtype)
        latents = latents + self.read_out(self.found_norm(gathered))
        q, k, v = (split_heads(t, self.heads) for t in self.mix_qkv(self.mix_norm(latents)).chunk(3, dim=-1))
        # (batch, heads, latents, head_dim) -> (batch, latents, dim)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        latents = latents + self.mix_out(mixed)
        latents = latents + self.mlp(self.mlp_norm(latents))
        keys, values = self.memory(self.memory_norm(latents)).chunk(2, dim=-1)
        return latents, (split_heads(keys, self.heads), split_heads(values, self.heads))


class Read(nn.Module):
    """One segment of the latents' softmax over all tokens. State: the running maximum, total and weighted values."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.key_value = Norm(dim), linear(dim, 2 * dim)

    def start(self, query: Tensor) -> State:
        """The state before the first token."""
        return empty_softmax(query)

    def forward(
        self, x: Tensor, valid: Tensor, query: Tensor, maximum: Tensor, total: Tensor, weighted: Tensor
    ) -> tuple[None, Tensor, Tensor, Tensor]:
        """Add segment `x` (batch, tokens, dim) to the sums."""
        key, value = (split_heads(t, self.heads) for t in self.key_value(self.norm(x)).chunk(2, dim=-1))
        # (batch, heads, latents, tokens)
        scores = query / math.sqrt(query.shape[-1]) @ key.transpose(-1, -2)
        return None, *add_to_softmax(scores, value, valid[:, None, None, :], maximum, total, weighted)


def empty_softmax(query: Tensor) -> State:
    """Maximum, total and weighted values (like `query`) of a softmax over no tokens, in float32 or better."""
    zeros = torch.zeros_like(query, dtype=at_least_float32(query.dtype))
    # Not -inf: where a whole segment is masked, the difference of two maxima must be 0, not NaN.
    return torch.full_like(zeros[..., :1], torch.finfo(zeros.dtype).min), zeros[..., :1], zeros


def add_to_softmax(
    scores: Tensor, values: Tensor, valid: Tensor, maximum: Tensor, total: Tensor, weighted: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Go on with a softmax by a segment of tokens; `weighted / total` of the last state is the result.

    Args:
        scores: (..., queries, tokens).
        values: (..., tokens, channels).
        valid: (..., 1, tokens) bool; others get weight 0.
        maximum: of the scores so far, (..., queries, 1).
        total: of the weights so far, likewise, relative to the maximum.
        weighted: sum of weights times values so far, (..., queries, channels).
    """
    # Where all tokens so far are masked they get weight 1 each, which the first valid one shrinks to 0.
    scores = scores.to(total.dtype).masked_fill(~valid, torch.finfo(total.dtype).min)
    # The result does not depend on the maximum, so it needs no gradient.
    new_maximum = torch.maximum(maximum, scores.detach().amax(-1, keepdim=True)).detach()
    weights = (scores - new_maximum).exp()
    shrink = (maximum - new_maximum).exp()
    total = total * shrink + weights.sum(-1, keepdim=True)
    return new_maximum, total, weighted * shrink + (weights @ values.to(weights.dtype)).to(weighted.dtype)
