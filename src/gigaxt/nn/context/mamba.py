"""Mamba: a linear-cost recurrence whose decay depends on channel and token (Gu & Dao 2023, "Mamba")."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gigaxt.config import from_dict
from gigaxt.errors import ConfigError
from gigaxt.nn.context.base import ContextConfig, check_least
from gigaxt.nn.context.layered import LayeredContext, Mixer
from gigaxt.nn.context.layers import Norm, linear
from gigaxt.nn.context.selective_scan import selective_scan
from gigaxt.nn.context.state_space import CausalConvolution, Direction, Directions, initial_rates, inverse_softplus
from gigaxt.streaming.recurrence import State


@dataclass(kw_only=True)
class MambaOptions:
    """`context.options` of `kind: mamba`."""

    expand: int = 2
    """Inner width over `dim`."""
    state: int = 16
    """Numbers that each channel remembers."""
    conv: int = 4
    """Tokens that the causal convolution ahead of the recurrence sees."""
    step_rank: int | None = None
    """Width of the bottleneck through which a token sets its step sizes; None: a sixteenth of `dim`, rounded up."""

    def __post_init__(self) -> None:
        check_least("context.options", self, expand=1, state=1, conv=2, step_rank=1)


class Mamba(LayeredContext):
    """State-space model whose decay, input and readout depend on the token: the first Mamba, with its selective scan.

    As in the paper: a gated block with a causal convolution, step sizes through a low-rank projection, and `state`
    numbers a channel, each of which decays at a rate of its own times the token's step. Ours: RMS norm ahead, the
    recurrence in float32 or better, the rates at the start, and the second direction. With `bidirectional` a second set
    of weights runs over the reversed order and the results are added. Without it, and with `summary=0` and
    `alternate=False`, a scene can be continued strip by strip: pass the state that the last call returned
    (`order="raster"`, strips of whole rows).

    At the start the channels' decay rates are spread from one token to 1e5 tokens, and each channel weighs its input by
    its rate, so that it holds a mean over its own reach. Far content thus arrives without the summary path, too; with
    the paper's own initial rates, from 1e-3 a token, nothing of it would.

    Cost per token and direction: about `6 * dim**2` multiplications in projections, in the recurrence some
    `20 * dim * state` and `2 * dim * state` exponentials, whatever the number of tokens; on a CPU 1.3 times that of
    Mamba-2. Memory: see `LayeredContext`; the recurrence keeps one state every few dozen tokens of a segment.
    On CUDA the kernel of `mamba_ssm` is used where it is installed, and gives the same up to rounding.
    Choose it where each channel should have a reach of its own, or to compare with published work. Mamba-2 is cheaper,
    above all on GPUs without the kernel, and remembers more: 64 numbers a channel against 16.
    """

    options_class = MambaOptions

    @classmethod
    def check_config(cls, config: ContextConfig) -> None:
        """See `ContextEncoder.check_config`."""
        super().check_config(config)
        if config.heads is not None:
            raise ConfigError(f"context.heads: `mamba` has none, got {config.heads}; leave it out or use `mamba2`")

    def build_mixer(self, config: ContextConfig, gain: float) -> Mixer:
        """See `LayeredContext.build_mixer`."""
        options = from_dict(MambaOptions, config.options, "context.options")
        forth = MambaStep(config.dim, options, gain, residual=True)
        return Directions(forth, MambaStep(config.dim, options, gain, residual=False) if config.bidirectional else None)


class MambaStep(Direction):
    """One direction over one segment. State: (batch, inner, state) and the convolution's last inputs.

    Args:
        dim: width of the tokens.
        options: of the kind.
        gain: of the last projection at the start.
        residual: whether the result includes the tokens themselves.
    """

    def __init__(self, dim: int, options: MambaOptions, gain: float, residual: bool) -> None:
        super().__init__()
        self.residual, self.state = residual, options.state
        self.inner = dim * options.expand
        self.rank = options.step_rank or math.ceil(dim / 16)
        self.norm = Norm(dim)
        self.in_proj = linear(dim, 2 * self.inner)
        self.conv = CausalConvolution(self.inner, options.conv)
        self.select = linear(self.inner, self.rank + 2 * options.state)
        self.step_proj = linear(self.rank, self.inner)
        self.step_bias = nn.Parameter(inverse_softplus(initial_rates(self.inner)))
        # A channel decays by its step size alone at first.
        self.log_rate = nn.Parameter(torch.zeros(self.inner, options.state))
        self.skip = nn.Parameter(torch.ones(self.inner))
        # What comes out of the gate is of scale 1/4 at the start; Mamba-2 has a norm there.
        self.out_proj = linear(self.inner, dim, 4 * gain)

    def start(self, x: Tensor) -> State:
        """See `Direction`."""
        tail = self.conv.start(x)
        return tail.new_zeros(x.shape[0], self.inner, self.state), tail

    def forward(self, x: Tensor, valid: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        """See `Direction`."""
        hidden, tail = state
        dtype = hidden.dtype
        mixed, gate = self.in_proj(self.norm(x * valid.unsqueeze(-1))).chunk(2, dim=-1)
        mixed, tail = self.conv(mixed, valid, tail)
        step, keys, queries = self.select(mixed.to(x.dtype)).split([self.rank, self.state, self.state], dim=-1)
        # Not in the projection: bfloat16 would round the slow channels' bias. A masked token's step is 0: no change.
        step = F.softplus(self.step_proj(step).to(dtype) + self.step_bias) * valid.unsqueeze(-1)
        rates = self.log_rate.to(dtype).exp()
        y, hidden = selective_scan(mixed, step, rates, keys.to(dtype), queries.to(dtype), hidden)
        y = (y + mixed * self.skip) * F.silu(gate.to(dtype))
        found = self.out_proj(y.to(x.dtype)).to(x.dtype)
        return x + found if self.residual else found, hidden, tail
