"""Multi-head attention with 2-D rotary positions, head by head for kinds that need the whole sequence at once."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gigaxt.errors import ConfigError
from gigaxt.nn.context.base import ContextConfig
from gigaxt.nn.context.layered import LayeredContext
from gigaxt.nn.context.layers import Norm, Run, largest_divisor, linear
from gigaxt.streaming.replay import counted_saves
from gigaxt.streaming.rows import Budget

Attend = Callable[[Tensor, Tensor, Tensor, slice], Tensor]
"""q, k, v (batch, h, n, head_dim) of the heads in a slice -> what they find, likewise. A pure function."""
BIAS_STD = 0.02
"""Of the last projection's bias at the start."""
PART = 8192
"""Tokens that are projected at once: on a CPU, memory above 32 MiB is mapped anew each time."""


class AttentionContext(LayeredContext):
    """Layers of an attention whose queries and keys are turned by their places, and which looks both ways."""

    fourier_positions = False
    recurrent = False

    @classmethod
    def check_config(cls, config: ContextConfig) -> None:
        """See `ContextEncoder.check_config`."""
        super().check_config(config)
        attention_heads(config)


class HeadByHead(nn.Module):
    """Projections around an attention, computed one head at a time where activations are not kept.

    A head's queries, keys and values are `3 / heads` token stores, and so is what its attention makes of them; the
    backward pass computes them again, head by head. Beside the tokens and their gradient a layer at work then takes
    about two token stores (the normalised tokens and a sum) plus one head's share. Heads that `run.budget` pays for
    keep what the backward pass needs; the first one shows how much that is.

    Args:
        dim: width of the tokens.
        heads: of the attention.
        gain: of the last projection at the start.
    """

    def __init__(self, dim: int, heads: int, gain: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.qkv = Norm(dim), linear(dim, 3 * dim)
        self.out = linear(dim, dim, gain, bias=True)
        # Tokens that are all zero would stay zero from layer to layer, and each norm multiply the gradient by 1000.
        nn.init.normal_(self.out.bias, std=BIAS_STD)

    def forward(self, x: Tensor, attend: Attend, run: Run) -> Tensor:
        """`x` (batch, n, dim) plus what `attend` finds."""
        assert self.out.bias is not None
        y = x + self.out.bias.to(x.dtype)
        if not run.recompute:
            return y + self._find(x, attend, slice(0, self.heads))
        kept = 0
        if run.budget.left and torch.is_grad_enabled():
            found, kept = self._find_kept(x, attend, run.budget)
            y = y if found is None else y + found
        for head in range(kept, self.heads):
            heads = slice(head, head + 1)
            y = y + checkpoint(self._find, x, attend, heads, use_reentrant=False, preserve_rng_state=False)
        return y

    def _find_kept(self, x: Tensor, attend: Attend, budget: Budget) -> tuple[Tensor | None, int]:
        """What the first heads find that `budget` pays for, and how many these are."""
        with counted_saves([x, *self.parameters()]) as saves:
            found = self._find(x, attend, slice(0, 1))
        size = saves.bytes + found.nbytes
        if not budget.take(size):
            return None, 0
        kept = 1
        while kept < self.heads and budget.take(size):
            found = found + self._find(x, attend, slice(kept, kept + 1))
            kept += 1
        return found, kept

    def _find(self, x: Tensor, attend: Attend, heads: slice) -> Tensor:
        """What some heads find in `x`, projected: (batch, n, dim)."""
        size = x.shape[-1] // self.heads
        rows = slice(heads.start * size, heads.stop * size)
        # (3 * dim, dim) -> (3, h * head_dim, dim) -> (3 * h * head_dim, dim)
        weight = self.qkv.weight.unflatten(0, (3, -1))[:, rows].flatten(0, 1)
        projected = torch.cat([F.linear(self.norm(part), weight) for part in x.split(PART, dim=1)], dim=1)
        # (batch, n, 3 * h * head_dim) -> three of (batch, h, n, head_dim)
        q, k, v = projected.unflatten(-1, (3, -1, size)).permute(2, 0, 3, 1, 4).unbind(0)
        found = attend(q, k, v, heads).transpose(1, 2).flatten(2)  # -> (batch, n, h * head_dim)
        out = self.out.weight[:, rows]
        return torch.cat([F.linear(part, out).to(x.dtype) for part in found.split(PART, dim=1)], dim=1)


def attention_heads(config: ContextConfig) -> int:
    """Heads as configured, or of about 32 channels.

    Raises:
        ConfigError: 2-D rotary positions need a head width that is a multiple of 4.
    """
    if config.dim % 4:
        raise ConfigError(
            f"context.dim: `{config.kind}` needs a multiple of 4 (2-D rotary positions), got {config.dim}"
        )
    heads = config.heads or largest_divisor(config.dim // 4, max(1, config.dim // 32))
    if config.dim % (4 * heads):
        raise ConfigError(
            f"context.heads: `{config.kind}` needs `dim` divisible by 4 x heads (2-D rotary positions), got dim "
            f"{config.dim} and {heads} heads"
        )
    return heads
