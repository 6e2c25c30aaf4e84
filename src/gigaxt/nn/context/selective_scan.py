"""The selective scan, a recurrence whose decay, input and readout depend on the token (Gu & Dao 2023, "Mamba")."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from gigaxt.streaming.untraced import untraced

CHUNK = 32
"""Tokens that are walked through one after the other, in all chunks of a piece at once."""
CPU_PIECE, DEVICE_PIECE = 2**18, 2**25
"""Numbers in all states of a piece: as many as a core's cache holds; enough for few launches, in 128 MiB."""
KERNEL_TOKENS = 2**16
"""The most tokens in one call of the kernel, of all batch rows together; its indices overflow far above."""
INJECTION = 2.0**-40
"""Step size of the tokens that hand a state to the kernel: decays by it are 1, and scaling by it is exact."""

Kernel = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""`mamba_ssm`'s selective_scan_fn(u, delta, A, B, C), tokens last."""


def selective_scan(
    x: Tensor, step: Tensor, rates: Tensor, keys: Tensor, queries: Tensor, hidden: Tensor
) -> tuple[Tensor, Tensor]:
    """h_t = exp(-rates * step_t) h_(t-1) + (step_t x_t) keys_t^T, y_t = h_t queries_t, for each channel on its own.

    A token of step 0 changes nothing. On CUDA in float32 the kernel of `mamba_ssm` is used if it is installed, and
    plain PyTorch otherwise; both cost the same per token whatever the number of tokens. First derivatives only.

    Args:
        x: (batch, tokens, inner).
        step: (batch, tokens, inner), at least 0.
        rates: (inner, state), at least 0.
        keys: (batch, tokens, state), shared by the channels.
        queries: (batch, tokens, state), shared by the channels.
        hidden: (batch, inner, state) before the first token.

    Returns:
        y like `x`, and the state after the last token. All in the dtype of the inputs, float32 or better.
    """
    kernel = find_kernel() if x.is_cuda and x.dtype == torch.float32 else None
    with torch.autocast(x.device.type, enabled=False):
        result: tuple[Tensor, Tensor] = (
            scan_in_pieces(x, step, rates, keys, queries, hidden)
            if kernel is None
            else scan_by_kernel(kernel, x, step, rates, keys, queries, hidden)
        )
    return result


def find_kernel() -> Kernel | None:
    """The CUDA kernel of `mamba_ssm`, or None where it is not installed."""
    try:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    except ImportError:
        return None
    kernel: Kernel = selective_scan_fn
    return kernel


def scan_by_kernel(
    kernel: Kernel, x: Tensor, step: Tensor, rates: Tensor, keys: Tensor, queries: Tensor, hidden: Tensor
) -> tuple[Tensor, Tensor]:
    """`selective_scan` by calls of `kernel` on at most `KERNEL_TOKENS` tokens.

    The kernel starts from zeros and gives its last state no gradient. So states go in and out as tokens: ahead of the
    others one for each number of a channel's state, which adds it; behind them one for each, which reads it.
    """
    count = rates.shape[1]
    one_hot = torch.eye(count, dtype=x.dtype, device=x.device).expand(x.shape[0], -1, -1)
    most = max(1, KERNEL_TOKENS // x.shape[0] - 2 * count)
    outputs = []
    for start in range(0, x.shape[1], most):
        part = slice(start, start + most)
        tensors = _with_states(x[:, part], step[:, part], keys[:, part], queries[:, part], hidden, one_hot)
        # (batch, count + tokens + count, channels) -> (batch, channels, ...)
        u, delta, b, c = (t.transpose(1, 2) for t in tensors)
        y = kernel(u, delta, -rates, b, c)
        outputs.append(y[:, :, count:-count].transpose(1, 2))
        hidden = y[:, :, -count:].clone()  # not a part of `y`, which would stay
    return torch.cat(outputs, dim=1), hidden


def _with_states(
    x: Tensor, step: Tensor, keys: Tensor, queries: Tensor, hidden: Tensor, one_hot: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The tokens between those that add `hidden` (batch, inner, state) and those that read the state."""
    none, no_keys = torch.zeros_like(hidden.transpose(1, 2)), torch.zeros_like(one_hot)
    return (
        torch.cat((hidden.transpose(1, 2) / INJECTION, x, none), dim=1),
        torch.cat((none + INJECTION, step, none), dim=1),
        torch.cat((one_hot, keys, no_keys), dim=1),
        torch.cat((no_keys, queries, one_hot), dim=1),
    )


@untraced
def scan_in_pieces(
    x: Tensor, step: Tensor, rates: Tensor, keys: Tensor, queries: Tensor, hidden: Tensor
) -> tuple[Tensor, Tensor]:
    """`selective_scan` in plain PyTorch."""
    tokens = x.shape[1]
    most = max(1, (CPU_PIECE if x.device.type == "cpu" else DEVICE_PIECE) // hidden.numel())
    chunk = min(CHUNK, most, tokens)
    padding = -tokens % chunk
    if padding:  # by tokens of step 0
        x, step, keys, queries = (F.pad(t, (0, 0, 0, padding)) for t in (x, step, keys, queries))
    sizes = chunk, most // chunk * chunk
    y, final = _SelectiveScan.apply(sizes, x, step, (-rates).t().contiguous(), keys, queries, hidden.transpose(1, 2))
    return y[:, :tokens], final.transpose(1, 2)  # (batch, state, inner) -> (batch, inner, state)


class _SelectiveScan(torch.autograd.Function):
    """Piece by piece. Only the states between the pieces are kept; the backward pass walks through each piece again.

    `slopes` (state, inner) are the negative rates; `hidden` comes as (batch, state, inner), channels last.
    """

    @staticmethod
    def forward(ctx: Any, sizes: tuple[int, int], *tensors: Tensor) -> tuple[Tensor, Tensor]:
        x, step, slopes, keys, queries, hidden = tensors
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        borders = []
        for part in _parts(x.shape[1], sizes):
            borders.append(hidden)
            piece = _Piece(x[:, part], step[:, part], keys[:, part], slopes, hidden, sizes[0])
            y[:, part] = piece.read(queries[:, part])
            hidden = piece.states[:, -1, -1].clone()  # not a part of the states, which would stay
        ctx.sizes = sizes
        ctx.save_for_backward(*tensors[:-1], *borders)
        ctx.set_materialize_grads(False)
        return y, hidden

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor | None, grad_hidden: Tensor | None) -> tuple[Tensor | None, ...]:
        x, step, slopes, keys, queries, *borders = ctx.saved_tensors
        grad_y = torch.zeros_like(x) if grad_y is None else grad_y
        grad_hidden = torch.zeros_like(borders[0]) if grad_hidden is None else grad_hidden
        totals = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, step, keys, queries)]
        grad_slopes = torch.zeros_like(slopes)
        parts = _parts(x.shape[1], ctx.sizes)
        with torch.autocast(x.device.type, enabled=False):
            for part, hidden in zip(reversed(parts), reversed(borders), strict=True):
                piece = _Piece(x[:, part], step[:, part], keys[:, part], slopes, hidden, ctx.sizes[0])
                *grads, of_slopes, grad_hidden = piece.gradients(queries[:, part], grad_y[:, part], grad_hidden)
                for total, grad in zip(totals, grads, strict=True):
                    total[:, part] = grad
                grad_slopes += of_slopes
        grad_x, grad_step, grad_keys, grad_queries = totals
        return None, grad_x, grad_step, grad_slopes, grad_keys, grad_queries, grad_hidden


def _parts(tokens: int, sizes: tuple[int, int]) -> list[slice]:
    return [slice(start, start + sizes[1]) for start in range(0, tokens, sizes[1])]


class _Piece:
    """All states of consecutive chunks of `chunk` tokens: (batch, chunks, chunk, state, inner).

    The chunks are walked through in lock-step, so there are few operations, of a good size each: first from zeros, to
    see what each chunk adds to the state, then from the state that the chunk ahead of it leaves. A single chunk needs
    the second walk only. Nothing is ever divided by a decay, so long chunks and fast decays are safe.
    """

    def __init__(self, x: Tensor, step: Tensor, keys: Tensor, slopes: Tensor, hidden: Tensor, chunk: int) -> None:
        self.slopes, self.chunk = slopes, chunk
        # (batch, tokens, inner) -> (batch, chunks, chunk, 1, inner)
        self.x, self.step = (self._split(t).unsqueeze(3) for t in (x, step))
        self.keys = self._split(keys)
        self.scaled = self.x * self.step
        self.decay = (self.step * slopes).exp_()
        self.states = self.scaled * self.keys.unsqueeze(-1)  # what each token adds, to which _fill adds the rest
        self.decays, added = self.decay.unbind(2), self.states.unbind(2)
        self.starts = self._hand_on(hidden, added, self.decays[1:])
        added[0].addcmul_(self.decays[0], self.starts)
        _fill(added, self.decays[1:])

    def read(self, queries: Tensor) -> Tensor:
        """(batch, tokens, state) -> y (batch, tokens, inner)."""
        return (self._split(queries).unsqueeze(3) @ self.states).squeeze(3).flatten(1, 2)

    def gradients(self, queries: Tensor, grad_y: Tensor, grad_hidden: Tensor) -> tuple[Tensor, ...]:
        """Those of x, step, keys, queries, (batch, tokens, ...) each; of the slopes; of the state before the piece."""
        grad_y = self._split(grad_y).unsqueeze(3)
        grad_queries = (self.states @ grad_y.transpose(3, 4)).squeeze(4)
        # Of the states: (batch, chunks, chunk, state, inner), walked through from the last token to the first.
        grad = grad_y * self._split(queries).unsqueeze(-1)
        received, decays = grad.unbind(2)[::-1], self.decays[:0:-1]
        received[0].add_(self._hand_on(grad_hidden, received, decays, backwards=True))
        _fill(received, decays)
        # (batch, chunks, chunk, state, inner) @ (..., inner, 1) -> (batch, chunks, chunk, state)
        grad_keys = (grad @ self.scaled.transpose(3, 4)).squeeze(4)
        grad_scaled = self.keys.unsqueeze(3) @ grad
        grad_hidden = self.decay[:, 0, 0] * grad[:, 0, 0]
        # Of slopes * step.
        grad *= self.decay
        grad[:, :, 1:] *= self.states[:, :, :-1]
        grad[:, :, 0] *= self.starts
        grad_step = torch.addcmul((grad * self.slopes).sum(3, keepdim=True), grad_scaled, self.x)
        grad_slopes = (grad * self.step).sum((0, 1, 2))
        grad_x = grad_scaled * self.step
        by_token = (grad_x.squeeze(3), grad_step.squeeze(3), grad_keys, grad_queries)
        # (batch, chunks, chunk, ...) -> (batch, tokens, ...)
        return *(t.flatten(1, 2) for t in by_token), grad_slopes, grad_hidden

    def _hand_on(
        self, first: Tensor, added: Sequence[Tensor], decays: Sequence[Tensor], backwards: bool = False
    ) -> Tensor:
        """What each chunk starts with: (batch, chunks, state, inner)."""
        starts = [first]
        if added[0].shape[1] > 1:
            ends = _last(added, decays)  # of chunks that start with zeros
            if backwards:
                ends = ends * self.decays[0]
            totals = (self.step.sum(2) * self.slopes).exp_()
            pairs = list(zip(totals.unbind(1), ends.unbind(1), strict=True))
            for total, end in reversed(pairs[1:]) if backwards else pairs[:-1]:
                starts.append(torch.addcmul(end, total, starts[-1]))
        return torch.stack(starts[::-1] if backwards else starts, dim=1)

    def _split(self, t: Tensor) -> Tensor:
        """(batch, tokens, ...) -> (batch, chunks, chunk, ...)."""
        parts: Tensor = t.unflatten(1, (-1, self.chunk))
        return parts


def _last(added: Sequence[Tensor], decays: Sequence[Tensor]) -> Tensor:
    """h_n of h_0 = added_0, h_i = added_i + decays_(i - 1) h_(i - 1)."""
    h = added[0]
    for a, decay in zip(added[1:], decays, strict=True):
        h = torch.addcmul(a, decay, h)
    return h


def _fill(added: Sequence[Tensor], decays: Sequence[Tensor]) -> None:
    """All h_i of `_last`, in the place of what was added."""
    for (h, a), decay in zip(pairwise(added), decays, strict=True):
        a.addcmul_(decay, h)
