"""Mamba-2: a linear-cost recurrence over the scan order (Dao & Gu 2024, "Transformers are SSMs")."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gigaxt.config import from_dict
from gigaxt.errors import ConfigError
from gigaxt.nn.context.base import ContextConfig
from gigaxt.nn.context.layered import LayeredContext, Mixer
from gigaxt.nn.context.layers import Norm, Run, largest_divisor, linear
from gigaxt.nn.context.ordering import Places
from gigaxt.recurrence import State

SLOWEST_RATE = 1e-5
"""Decay per token of the slowest head at the start: it remembers a scene of 1e5 tokens."""


@dataclass(kw_only=True)
class Mamba2Options:
    """`context.options` of `kind: mamba2`."""

    expand: int = 2
    """Inner width over `dim`."""
    state: int = 64
    """Numbers that each channel remembers."""
    conv: int = 4
    """Tokens that the causal convolution ahead of the recurrence sees."""
    chunk: int = 64
    """Tokens handled at once by matrix multiplications; changes the speed, not the result."""

    def __post_init__(self) -> None:
        for name, least in (("expand", 1), ("state", 1), ("conv", 2), ("chunk", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"context.options.{name}: expected at least {least}, got {getattr(self, name)}")


class Mamba2(LayeredContext):
    """State-space model whose decay and input weights depend on the token. The default for large scenes.

    Each head keeps a matrix of `head_dim x state` numbers that decays at its own, token-dependent rate. Within chunks
    of 64 tokens it is computed as masked matrix multiplications (the dual form), between chunks as a recurrence, in
    float32 or better. With `bidirectional` a second set of weights runs over the reversed order and the results are
    added; nothing is shared between the directions. Without it, and with `summary=0`, a scene can be continued strip
    by strip: pass the state that the last call returned (`order="raster"`, strips of whole rows).

    At the start the heads' decay rates are spread from one token to 1e5 tokens, and each head's input weight equals its
    rate, so that every head holds a mean over its own reach. Far content thus arrives without the summary path, too;
    with the paper's own initial rates, from 1e-3 a token, nothing of it would.

    Cost per token and direction: about `6 * dim**2` multiplications in projections and `4 * dim * (chunk + state)` in
    the recurrence, whatever the number of tokens. Memory: see `LayeredContext`; states add 3% for `dim=192`.
    Choose it when the scene has more than some ten thousand tokens; below that `full` costs the same or less and is
    not bound to an order.
    """

    options_class = Mamba2Options

    @classmethod
    def check_config(cls, config: ContextConfig) -> None:
        """See `ContextEncoder.check_config`."""
        super().check_config(config)
        inner = config.dim * _options(config).expand
        if config.heads is not None and inner % config.heads:
            raise ConfigError(f"context.heads: expected a divisor of dim x expand = {inner}, got {config.heads}")

    def build_mixer(self, config: ContextConfig, gain: float) -> Mixer:
        """See `LayeredContext.build_mixer`."""
        return Mamba2Mixer(config, _options(config), gain)


class Mamba2Mixer(Mixer):
    """Adds what one or two directions of Mamba-2 found to the tokens."""

    def __init__(self, config: ContextConfig, options: Mamba2Options, gain: float) -> None:
        super().__init__()
        heads = config.heads or default_heads(config.dim * options.expand)
        self.forth = Mamba2Step(config.dim, heads, options, gain, residual=True)
        self.back = Mamba2Step(config.dim, heads, options, gain, residual=False) if config.bidirectional else None

    def forward(
        self, x: Tensor, global_tokens: Tensor | None, places: Places, run: Run, state: State | None
    ) -> tuple[Tensor, Tensor | None, State | None]:
        """See `Mixer`."""
        y, final = run(self.forth, (x, places.valid), state or self.forth.start(x))
        assert y is not None
        if self.back is None:
            return y, global_tokens, final
        z, _ = run(self.back, (x, places.valid), self.back.start(x), reverse=True)
        assert z is not None
        return y + z, global_tokens, None


class Mamba2Step(nn.Module):
    """One direction over one segment. State: (batch, heads, head_dim, state) and the convolution's last inputs.

    Args:
        dim: width of the tokens.
        heads: each has its own decay rate.
        options: of the kind.
        gain: of the last projection at the start.
        residual: whether the result includes the tokens themselves.
    """

    def __init__(self, dim: int, heads: int, options: Mamba2Options, gain: float, residual: bool) -> None:
        super().__init__()
        self.heads, self.residual, self.state, self.chunk = heads, residual, options.state, options.chunk
        self.inner = dim * options.expand
        self.mixed = self.inner + 2 * options.state
        self.norm = Norm(dim)
        self.in_proj = linear(dim, self.inner + self.mixed + heads)
        self.conv = nn.Conv1d(self.mixed, self.mixed, options.conv, groups=self.mixed)
        rates, steps = initial_rates(heads)
        self.log_rate = nn.Parameter((rates / steps).log())
        # Inverse of softplus.
        self.step_bias = nn.Parameter(steps + (-(-steps).expm1()).log())
        self.skip = nn.Parameter(torch.ones(heads))
        self.gated_norm = Norm(self.inner)
        self.out_proj = linear(self.inner, dim, gain)

    def start(self, x: Tensor) -> State:
        """The state before the first token."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        hidden = x.new_zeros(x.shape[0], self.heads, self.inner // self.heads, self.state, dtype=dtype)
        return hidden, x.new_zeros(x.shape[0], self.conv.kernel_size[0] - 1, self.mixed, dtype=dtype)

    def forward(self, x: Tensor, valid: Tensor, hidden: Tensor, tail: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`x` (batch, tokens, dim), `valid` (batch, tokens) -> output like `x`, new state."""
        gate, mixed, step = self.in_proj(self.norm(x)).split([self.inner, self.mixed, self.heads], dim=-1)
        mixed, tail = self._convolve(mixed * valid.unsqueeze(-1), valid, tail)
        values, keys, queries = mixed.split([self.inner, self.state, self.state], dim=-1)
        # A masked token decays nothing and adds nothing: its step is 0.
        step = F.softplus(step.to(hidden.dtype) + self.step_bias) * valid.unsqueeze(-1)
        # (batch, tokens, inner) -> (batch, tokens, heads, head_dim)
        values = values.unflatten(-1, (self.heads, -1)).to(hidden.dtype)
        decay = step * -self.log_rate.exp()
        with torch.autocast(x.device.type, enabled=False):
            y, hidden = state_space_dual(
                values * step.unsqueeze(-1), decay, keys.to(hidden.dtype), queries.to(hidden.dtype), hidden, self.chunk
            )
        y = (y + values * self.skip.unsqueeze(-1)).flatten(2)
        result: Tensor = self.out_proj(self.gated_norm(y * F.silu(gate)).to(x.dtype)).to(x.dtype)
        return x + result if self.residual else result, hidden, tail

    def _convolve(self, mixed: Tensor, valid: Tensor, tail: Tensor) -> tuple[Tensor, Tensor]:
        """Causal convolution and SiLU; the new tail ends at the last valid token."""
        length = tail.shape[1]
        window = torch.cat((tail.to(mixed.dtype), mixed), dim=1)
        places = torch.arange(1, mixed.shape[1] + 1, device=mixed.device)
        last = (places * valid).amax(dim=1, keepdim=True)  # 0 if none is valid: then the old tail stays
        index = last + torch.arange(length, device=mixed.device)
        new_tail = window.gather(1, index.unsqueeze(-1).expand(-1, -1, window.shape[-1])).to(tail.dtype)
        # (batch, tokens, channels) -> (batch, channels, tokens) and back
        y = self.conv(window.transpose(1, 2)).transpose(1, 2)
        return F.silu(y), new_tail


def state_space_dual(
    x: Tensor, decay: Tensor, keys: Tensor, queries: Tensor, hidden: Tensor, chunk: int
) -> tuple[Tensor, Tensor]:
    """h_t = exp(decay_t) h_(t-1) + x_t k_t^T, y_t = h_t q_t, by chunks: matrices within, a short recurrence between.

    Args:
        x: (batch, tokens, heads, head_dim), already multiplied by the step.
        decay: (batch, tokens, heads), at most 0.
        keys: (batch, tokens, state), shared by the heads.
        queries: (batch, tokens, state), shared by the heads.
        hidden: (batch, heads, head_dim, state) before the first token.
        chunk: tokens in a chunk.

    Returns:
        y like `x`, and the state after the last token. In the dtype of the inputs, which should be float32 or better.
    """
    tokens = x.shape[1]
    chunk = min(chunk, tokens)
    padding = -tokens % chunk
    if padding:  # x = 0 and decay = 0 change nothing
        x, decay = F.pad(x, (0, 0, 0, 0, 0, padding)), F.pad(decay, (0, 0, 0, padding))
        keys, queries = F.pad(keys, (0, 0, 0, padding)), F.pad(queries, (0, 0, 0, padding))
    # Chunks: (batch, chunks, chunk, ...); heads ahead of places, for batched matrix products.
    x = x.unflatten(1, (-1, chunk)).transpose(2, 3)  # (b, c, heads, chunk, head_dim)
    decay = decay.unflatten(1, (-1, chunk)).transpose(2, 3)  # (b, c, heads, chunk)
    keys, queries = keys.unflatten(1, (-1, chunk)), queries.unflatten(1, (-1, chunk))  # (b, c, chunk, state)
    total = decay.cumsum(-1)

    # Within a chunk: attention with weights that decay from source to target.
    weights = (queries @ keys.transpose(-1, -2)).unsqueeze(2) * segment_sums(decay).exp()
    y = weights @ x  # (b, c, heads, chunk, head_dim)
    # What each chunk adds to the state at its end: (b, c, heads, head_dim, state)
    to_end = (total[..., -1:] - total).exp().unsqueeze(-1)
    added = (x * to_end).transpose(-1, -2) @ keys.unsqueeze(2)
    # States at the chunks' borders: each is a sum over the earlier ones. (b, heads, c + 1, c + 1)
    passing = segment_sums(F.pad(total[..., -1], (0, 0, 1, 0)).transpose(1, 2)).exp()
    all_states = torch.cat((hidden.unsqueeze(1), added), dim=1).transpose(1, 2)  # (b, heads, c + 1, head_dim, state)
    borders = (passing @ all_states.flatten(3)).unflatten(3, hidden.shape[2:])
    before, final = borders[:, :, :-1].transpose(1, 2), borders[:, :, -1].clone()
    # What the state before the chunk gives: (b, c, heads, chunk, head_dim)
    y = y + (queries.unsqueeze(2) @ before.transpose(-1, -2)) * total.exp().unsqueeze(-1)
    # -> (batch, tokens, heads, head_dim)
    return y.transpose(2, 3).flatten(1, 2)[:, :tokens], final


def segment_sums(a: Tensor) -> Tensor:
    """S[..., i, j] = a[j + 1] + ... + a[i] for i >= j, -inf above the diagonal.

    Summed up row by row rather than as a difference of cumulated sums, which loses the small decays of long sequences.
    """
    n = a.shape[-1]
    below = torch.ones(n, n, dtype=torch.bool, device=a.device).tril(-1)
    # [..., i, j] = a[i] below the diagonal
    rows = a.unsqueeze(-1).expand(*a.shape, n).masked_fill(~below, 0)
    return rows.cumsum(-2).masked_fill(~(below | torch.eye(n, dtype=torch.bool, device=a.device)), -math.inf)


def _options(config: ContextConfig) -> Mamba2Options:
    return from_dict(Mamba2Options, config.options, "context.options")


def default_heads(inner: int) -> int:
    """Heads of 64 channels, but at least 4, as each has one decay rate; the next divisor below."""
    return largest_divisor(inner, max(4, inner // 64))


def initial_rates(heads: int) -> tuple[Tensor, Tensor]:
    """Decay per token, spread from 1 to `SLOWEST_RATE` in equal ratios, and the initial step sizes; (heads,) each."""
    rates = torch.logspace(0, math.log10(SLOWEST_RATE), heads)
    return rates, rates
