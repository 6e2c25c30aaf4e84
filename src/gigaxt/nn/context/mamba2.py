"""Mamba-2: a linear-cost recurrence over the scan order (Dao & Gu 2024, "Transformers are SSMs")."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gigaxt.config import from_dict
from gigaxt.errors import ConfigError
from gigaxt.nn.context.base import ContextConfig, check_least
from gigaxt.nn.context.layered import LayeredContext, Mixer
from gigaxt.nn.context.layers import Norm, largest_divisor, linear
from gigaxt.nn.context.state_space import CausalConvolution, Direction, Directions, initial_rates, inverse_softplus
from gigaxt.streaming.recurrence import State

CPU_BLOCK, DEVICE_BLOCK = 64, 128
"""Chunks that hand their states to each other by one matrix product, which is quadratic in their number; on a device
fewer launches are worth more."""


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
        check_least("context.options", self, expand=1, state=1, conv=2, chunk=1)


class Mamba2(LayeredContext):
    """State-space model whose decay and input weights depend on the token. The default for large scenes.

    Each head keeps a matrix of `head_dim x state` numbers that decays at its own, token-dependent rate. Within chunks
    of 64 tokens it is computed as masked matrix multiplications (the dual form), between chunks as a recurrence, in
    float32 or better. As in the paper, with keys and queries shared by the heads (one group). Ours: RMS norm ahead, the
    rates at the start, and the second direction. With `bidirectional` a second set of weights runs over the reversed
    order and the results are added; nothing is shared between the directions. Without it, and with `summary=0` and
    `alternate=False`, a scene can be continued strip by strip: pass the state that the last call returned
    (`order="raster"`, strips of whole rows).

    At the start the heads' decay rates are spread from one token to 1e5 tokens, and each head's input weight equals its
    rate, so that every head holds a mean over its own reach. Far content thus arrives without the summary path, too;
    with the paper's own initial rates, from 1e-3 a token, nothing of it would.

    Cost per token and direction: about `6 * dim**2` multiplications in projections and `4 * dim * (chunk + state)` in
    the recurrence, whatever the number of tokens. Memory: see `LayeredContext`; states add 3% for `dim=192`.
    The CUDA kernels of `mamba_ssm` are not used, unlike in `mamba`: those for Mamba-2 index in 32 bits and are silently
    wrong on long sequences (state-spaces/mamba issue 1015), and matrix products are fast without them.
    Choose it when the scene has more than some ten thousand tokens; below that `full` is affordable, and it is not
    bound to an order.
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
        options = _options(config)
        heads = config.heads or default_heads(config.dim * options.expand)
        forth = Mamba2Step(config.dim, heads, options, gain, residual=True)
        back = Mamba2Step(config.dim, heads, options, gain, residual=False) if config.bidirectional else None
        return Directions(forth, back)


class Mamba2Step(Direction):
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
        self.conv = CausalConvolution(self.mixed, options.conv)
        self.step_bias = nn.Parameter(inverse_softplus(initial_rates(heads)))
        self.log_rate = nn.Parameter(torch.zeros(heads))  # a head decays by its step size alone at first
        self.skip = nn.Parameter(torch.ones(heads))
        self.gated_norm = Norm(self.inner)
        self.out_proj = linear(self.inner, dim, gain)

    def start(self, x: Tensor) -> State:
        """See `Direction`."""
        tail = self.conv.start(x)
        return tail.new_zeros(x.shape[0], self.heads, self.inner // self.heads, self.state), tail

    def forward(self, x: Tensor, valid: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        """See `Direction`."""
        hidden, tail = state
        dtype = hidden.dtype
        projected = self.in_proj(self.norm(x * valid.unsqueeze(-1)))
        gate, mixed, step = projected.split([self.inner, self.mixed, self.heads], dim=-1)
        mixed, tail = self.conv(mixed, valid, tail)
        values, keys, queries = mixed.split([self.inner, self.state, self.state], dim=-1)
        # A masked token decays nothing and adds nothing: its step is 0.
        step = F.softplus(step.to(dtype) + self.step_bias) * valid.unsqueeze(-1)
        decay = step * -self.log_rate.to(dtype).exp()
        # (batch, tokens, inner) -> (batch, tokens, heads, head_dim)
        values = values.unflatten(-1, (self.heads, -1))
        with torch.autocast(x.device.type, enabled=False):
            y, hidden = state_space_dual(values * step.unsqueeze(-1), decay, keys, queries, hidden, self.chunk)
        # (batch, tokens, heads, head_dim) -> (batch, tokens, inner)
        y = (y + values * self.skip.unsqueeze(-1)).flatten(2)
        found = self.out_proj(self.gated_norm(y * F.silu(gate.to(dtype))).to(x.dtype)).to(x.dtype)
        return x + found if self.residual else found, hidden, tail


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
    outputs, block = [], chunk * (CPU_BLOCK if x.device.type == "cpu" else DEVICE_BLOCK)
    for start in range(0, x.shape[1], block):
        part = slice(start, start + block)
        y, hidden = _dual_block(x[:, part], decay[:, part], keys[:, part], queries[:, part], hidden, chunk)
        outputs.append(y)
    return torch.cat(outputs, dim=1) if len(outputs) > 1 else outputs[0], hidden


def _dual_block(
    x: Tensor, decay: Tensor, keys: Tensor, queries: Tensor, hidden: Tensor, chunk: int
) -> tuple[Tensor, Tensor]:
    """`state_space_dual` over so few chunks that they may all see each other. Large tensors stay in token order."""
    tokens = x.shape[1]
    chunk = min(chunk, tokens)
    padding = -tokens % chunk
    if padding:  # x = 0 and decay = 0 change nothing
        x, decay = F.pad(x, (0, 0, 0, 0, 0, padding)), F.pad(decay, (0, 0, 0, padding))
        keys, queries = F.pad(keys, (0, 0, 0, padding)), F.pad(queries, (0, 0, 0, padding))
    # (batch, tokens, ...) -> (batch, chunks, chunk, ...)
    x, decay, keys, queries = (t.unflatten(1, (-1, chunk)) for t in (x, decay, keys, queries))
    total = decay.cumsum(2)  # (b, c, chunk, heads)

    # Within a chunk: attention with weights that decay from source to target. (b, c, heads, chunk, chunk)
    remains = decay_between(decay.transpose(2, 3))
    weights = (queries @ keys.transpose(2, 3)).unsqueeze(2) * remains
    y = (weights @ x.transpose(2, 3)).transpose(2, 3)  # (b, c, chunk, heads, head_dim)
    # What each chunk adds to the state at its end, for all heads in one product: (b, c, state, heads * head_dim)
    at_end = remains[..., -1, :].transpose(2, 3)  # (b, c, chunk, heads)
    added = keys.transpose(2, 3) @ (x * at_end.unsqueeze(-1)).flatten(3)
    # States at the chunks' borders: each is a sum over the earlier ones. (b, heads, c + 1, state, head_dim)
    added = added.unflatten(3, x.shape[3:]).permute(0, 3, 1, 2, 4)
    states = torch.cat((hidden.transpose(2, 3).unsqueeze(2), added), dim=2)
    passing = decay_between(F.pad(total[:, :, -1], (0, 0, 1, 0)).transpose(1, 2))  # (b, heads, c + 1, c + 1)
    borders = (passing @ states.flatten(3)).unflatten(3, states.shape[3:])
    # What the state before the chunk gives: (b, c, chunk, heads, head_dim)
    before = borders[:, :, :-1].permute(0, 2, 3, 1, 4).flatten(3)
    y = y + (queries @ before).unflatten(3, x.shape[3:]) * total.exp().unsqueeze(-1)
    return y.flatten(1, 2)[:, :tokens], borders[:, :, -1].transpose(2, 3).clone()


def decay_between(a: Tensor) -> Tensor:
    """D[..., i, j] = exp(a[j + 1] + ... + a[i]) for i >= j, else 0: what is left at i of what came in at j.

    Summed up row by row rather than as a difference of cumulated sums, which loses the small decays of long sequences.
    """
    rows = a.unsqueeze(-1).expand(*a.shape, a.shape[-1]).tril(-1)  # [..., i, j] = a[i] below the diagonal
    return rows.cumsum(-2).exp().tril()


def _options(config: ContextConfig) -> Mamba2Options:
    return from_dict(Mamba2Options, config.options, "context.options")


def default_heads(inner: int) -> int:
    """Heads of 64 channels, but at least 4, as each has one decay rate; the next divisor below."""
    return largest_divisor(inner, max(4, inner // 64))
