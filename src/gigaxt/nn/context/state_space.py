"""What the state-space kinds have in common: the two directions, the causal convolution, the rates at the start."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from gigaxt.nn.context.layered import Mixer
from gigaxt.nn.context.layers import Run
from gigaxt.nn.context.ordering import Places
from gigaxt.streaming.recurrence import State
from gigaxt.streaming.rows import at_least_float32
from gigaxt.streaming.untraced import untraced

SLOWEST_RATE = 1e-5
"""Decay per token of the slowest channel at the start: it remembers a scene of 1e5 tokens."""


def initial_rates(count: int) -> Tensor:
    """Decay per token of each of `count` channels or heads, (count,), spread from 1 to `SLOWEST_RATE` in equal ratios.

    A channel whose step size is its rate, too, weighs what comes in by it and so holds a mean over its own reach.
    """
    return torch.logspace(0, math.log10(SLOWEST_RATE), count)


def inverse_softplus(x: Tensor) -> Tensor:
    """The number whose softplus is `x`, exact for small `x`, too."""
    return x + (-(-x).expm1()).log()


class Direction(nn.Module, ABC):
    """A recurrence over one segment of sorted tokens, in one direction. Masked tokens change no state."""

    @abstractmethod
    def start(self, x: Tensor) -> State:
        """The state before the first of the tokens `x` (batch, tokens, dim), in float32 or better."""

    @abstractmethod
    def forward(self, x: Tensor, valid: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        """`x` (batch, tokens, dim), `valid` (batch, tokens) bool -> output like `x`, and the state after them."""


class Directions(Mixer):
    """Runs a recurrence in one or two directions and adds the results to the tokens.

    Args:
        forth: along the scan order; its output includes the tokens themselves.
        back: against it, with weights of its own; its output is only what is added to them. None: causal, with a state.
    """

    def __init__(self, forth: Direction, back: Direction | None) -> None:
        super().__init__()
        self.forth, self.back = forth, back

    def forward(
        self, x: Tensor, global_tokens: Tensor | None, places: Places, run: Run, state: State | None
    ) -> tuple[Tensor, Tensor | None, State | None]:
        """See `Mixer`."""
        y, final = run(self.forth, (x, places.valid), self.forth.start(x) if state is None else state)
        assert y is not None
        if self.back is None:
            return y, global_tokens, final
        z, _ = run(self.back, (x, places.valid), self.back.start(x), reverse=True)
        assert z is not None
        return y + z, global_tokens, None

    def fits(self, state: State, x: Tensor) -> bool:
        """See `Mixer`."""
        return [(t.shape, t.dtype) for t in state] == [(t.shape, t.dtype) for t in self.forth.start(x)]


class CausalConvolution(nn.Conv1d):
    """Each channel mixed over the last `length` tokens, then SiLU. The tail is what the next segment has to see."""

    def __init__(self, channels: int, length: int) -> None:
        super().__init__(channels, channels, length, groups=channels)

    def start(self, x: Tensor) -> Tensor:
        """The tail before the first of the tokens `x`: (batch, length - 1, channels), in float32 or better."""
        dtype = at_least_float32(x.dtype)
        return x.new_zeros(x.shape[0], self.kernel_size[0] - 1, self.in_channels, dtype=dtype)

    def forward(  # type: ignore[override]  # a Conv1d that carries what came before
        self, x: Tensor, valid: Tensor, tail: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Convolve in the dtype of the tail.

        Args:
            x: (batch, tokens, channels), zero where masked.
            valid: (batch, tokens) bool, the masked ones last (or first, while nothing but masked ones came before).
            tail: (batch, length - 1, channels), the inputs before `x`.

        Returns:
            The result like `x`, in the dtype of the tail; and the new tail, which ends at the last valid token.
        """
        dtype = tail.dtype
        window = torch.cat((tail, x.to(dtype)), dim=1)
        # (channels, 1, length) -> (length, channels)
        assert self.bias is not None
        y = _convolve(window, self.weight.to(dtype).squeeze(1).t(), self.bias.to(dtype))
        places = torch.arange(1, x.shape[1] + 1, device=x.device)
        last = (places * valid).amax(dim=1, keepdim=True)  # 0 if none is valid: then the old tail stays
        index = last + torch.arange(tail.shape[1], device=x.device)
        new_tail = window.gather(1, index.unsqueeze(-1).expand(-1, -1, window.shape[-1]))
        return F.silu(y), new_tail


class _Convolve(torch.autograd.Function):
    """A depthwise convolution as one multiply-add a weight: channels stay last and nothing but `window` is kept.

    PyTorch's own needs channels ahead of tokens and takes four times as long on a CPU.
    """

    @staticmethod
    def forward(ctx: Any, window: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(window, weight)
        tokens = window.shape[1] - len(weight) + 1
        y = torch.addcmul(bias, window[:, :tokens], weight[0])
        for i in range(1, len(weight)):
            y.addcmul_(window[:, i : i + tokens], weight[i])
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        window, weight = ctx.saved_tensors
        tokens = grad.shape[1]
        grad_window, grad_weight = torch.zeros_like(window), torch.empty_like(weight)
        for i in range(len(weight)):
            grad_window[:, i : i + tokens].addcmul_(grad, weight[i])
            grad_weight[i] = (grad * window[:, i : i + tokens]).sum((0, 1))
        return grad_window, grad_weight, grad.sum((0, 1))


@untraced
def _convolve(window: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """(batch, length - 1 + tokens, channels), (length, channels), (channels,) -> (batch, tokens, channels)."""
    result: Tensor = _Convolve.apply(window, weight, bias)
    return result
