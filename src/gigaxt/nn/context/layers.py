"""What all context encoders are made of besides their mixer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch.nn.functional as F
from torch import Tensor, nn

from gigaxt.streaming.host_copies import HostCopies
from gigaxt.streaming.recurrence import State, scan
from gigaxt.streaming.rows import Budget, at_least_float32


@dataclass(frozen=True)
class Run:
    """Runs modules over segments of a batch's tokens, and decides what is kept for the backward pass."""

    batch: int
    tokens: int
    """Of each batch row."""
    segment: int
    """Tokens of all rows together that are computed at once."""
    keep_tokens: int
    """Batches of up to this many tokens keep their activations."""
    budget: Budget = field(default_factory=lambda: Budget(0))
    """What segments of larger batches may keep, all layers together."""
    host: HostCopies = field(default_factory=lambda: HostCopies(0))
    """Where what goes into the layers' parts of larger batches waits for the backward pass."""

    @property
    def recompute(self) -> bool:
        """Whether activations are computed again in the backward pass, but for what the budget pays for."""
        return self.batch * self.tokens > self.keep_tokens

    def __call__(
        self,
        module: nn.Module,
        inputs: Sequence[Tensor],
        state: State = (),
        *,
        shared: Sequence[Tensor] = (),
        reverse: bool = False,
        halo: tuple[int, int] = (0, 0),
        multiple: int = 1,
    ) -> tuple[Tensor | None, State]:
        """See `gigaxt.streaming.scan`. Segments begin at multiples of `multiple` tokens in the order of processing."""
        if not self.recompute:
            segment = self.tokens
        else:
            segment = max(multiple, self.segment // self.batch // multiple * multiple)
        budget = self.budget if self.recompute else None
        return scan(
            module,
            inputs,
            state,
            shared=shared,
            segment=segment,
            budget=budget,
            host=self.host,
            reverse=reverse,
            halo=halo,
        )


class Norm(nn.RMSNorm):
    """RMS norm computed in float32 or better, in and out in the same dtype."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) -> (..., dim)."""
        dtype = at_least_float32(x.dtype)
        return F.rms_norm(x.to(dtype), self.normalized_shape, self.weight.to(dtype), self.eps).to(x.dtype)


class Mlp(nn.Sequential):
    """Two linear layers around a GELU."""

    def __init__(self, dim: int, ratio: float, gain: float) -> None:
        hidden = round(dim * ratio)
        super().__init__(linear(dim, hidden, bias=True), nn.GELU(), linear(hidden, dim, gain, bias=True))


class Finish(nn.Module):
    """The rest of a layer, token by token: read the latents (if there are any), then the MLP.

    Args:
        dim: width of the tokens.
        heads: of the attention to the latents; 0 for none.
        mlp_ratio: hidden width of the MLP over `dim`.
        gain: of the MLP's last projection at the start.
        final_norm: normalise the result, as the last layer does.
    """

    def __init__(self, dim: int, heads: int, mlp_ratio: float, gain: float, final_norm: bool) -> None:
        super().__init__()
        self.heads = heads
        if heads:
            self.read_norm, self.read_query = Norm(dim), linear(dim, dim)
            # Full gain: the mean of many latents' values is small, and a far region must still have an effect in it.
            self.read_out = linear(dim, dim, bias=True)
        self.norm, self.mlp = Norm(dim), Mlp(dim, mlp_ratio, gain)
        self.final_norm = Norm(dim) if final_norm else None

    def forward(self, x: Tensor, *memory: Tensor) -> tuple[Tensor]:
        """`x` (batch, tokens, dim) -> the same shape. `memory`: the latents' keys and values, if there are latents."""
        if self.heads:
            query = split_heads(self.read_query(self.read_norm(x)), self.heads)
            keys, values = memory
            # (batch, heads, tokens, head_dim) -> (batch, tokens, dim)
            found = F.scaled_dot_product_attention(query, keys, values).transpose(1, 2).flatten(2)
            x = x + self.read_out(found).to(x.dtype)
        x = x + self.mlp(self.norm(x)).to(x.dtype)
        return (x if self.final_norm is None else self.final_norm(x).to(x.dtype),)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(batch, tokens, dim) -> (batch, heads, tokens, head_dim)."""
    split: Tensor = x.unflatten(-1, (heads, -1))
    return split.transpose(1, 2)


def linear(dim_in: int, dim_out: int, gain: float = 1.0, bias: bool = False) -> nn.Linear:
    """A linear layer that at first maps unit scale to scale `gain` (PyTorch's own: to 0.58), with zero bias."""
    layer = nn.Linear(dim_in, dim_out, bias=bias)
    nn.init.normal_(layer.weight, std=gain * dim_in**-0.5)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def largest_divisor(number: int, most: int) -> int:
    """The largest divisor of `number` that is at most `most`."""
    return next(d for d in range(most, 0, -1) if number % d == 0)
