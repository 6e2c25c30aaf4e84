"""`scan`: a module run over segments of a token sequence, as one differentiable operation.

The second primitive beside `streaming.stream`: there the chunks are independent and are read from disk, here each
segment hands a state to the next and the tokens are in memory. A recurrence (a state-space model) uses inputs, state
and output; a reduction over all tokens only the state; a map only the output.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from gigaxt.errors import ConfigError
from gigaxt.streaming.host_copies import HostCopies
from gigaxt.streaming.replay import Aliases, Autocast, Sums, counted_saves, refuse_foreign_leaves
from gigaxt.streaming.rows import Budget, differentiable
from gigaxt.streaming.untraced import untraced

State = tuple[Tensor, ...]
NOTHING = Budget(0)
T = TypeVar("T")


def scan(
    module: nn.Module,
    inputs: Sequence[Tensor],
    state: Sequence[Tensor] = (),
    *,
    shared: Sequence[Tensor] = (),
    segment: int,
    budget: Budget | None = NOTHING,
    host: HostCopies | None = None,
    reverse: bool = False,
    halo: tuple[int, int] = (0, 0),
) -> tuple[Tensor | None, State]:
    """Run `module` over segments of the token axis, each with the state that the one before it returned.

    `module(*segment_inputs, *shared, *state)` returns `(output, *state)`. The result and all gradients equal those of
    the plain loop up to rounding, but what is kept between the passes is only `inputs` and the states at the segment
    borders: the backward pass runs the segments again, last to first, with a graph of one segment at a time. Each
    parameter gets its gradient once, so that DDP, accumulation and hooks see one ordinary operation; first derivatives
    only.

    The module must be a pure function of its arguments, parameters and (constant) buffers: no dropout, no BatchNorm.

    Args:
        module: what one segment does. Its forward hooks run once a segment.
        inputs: tensors (batch, tokens, ...), cut along `tokens`. At least one.
        state: the state before the first segment; `module` returns as many tensors, of any shape.
        shared: tensors that every segment is given whole; their gradients are added up in float32 or better.
        segment: tokens in a segment; the last one processed may be shorter.
        budget: memory that segments pay from to keep their activations, first come, first served; these are not run
            again. May be shared by several scans. `Budget(0)` keeps nothing; None keeps all, under ordinary autograd.
        host: where the inputs wait for the backward pass in place of the device, as far as it has room; segments come
            back one at a time. Not read where `budget` is None.
        reverse: process from the last token to the first. Each segment is handed over flipped, so that `module` need
            not know, and the output is in the order of the inputs.
        halo: tokens before and after (in the order of processing) that every segment is given of the inputs beside its
            own, zeros beyond the ends of the sequence; the output has the segment's own tokens only. So sliding windows
            and memories of earlier segments need no more kept than `inputs`.

    Returns:
        The output (batch, tokens, ...), or None if the module returns None in its place; and the state after the last
        segment.

    Raises:
        ConfigError: no tokens, inputs of different length, or an output whose tokens are not the segment's.
    """
    tokens = _count_tokens(inputs, segment)
    plan = _Plan(
        module=module,
        bounds=_bounds(tokens, segment, reverse),
        reverse=reverse,
        halo=halo,
        budget=budget or NOTHING,
        host=host,
        counts=(len(inputs), len(shared), len(state)),
        device=inputs[0].device,
    )
    if budget is None:
        return _plain_loop(plan, tuple(inputs), tuple(shared), tuple(state))
    result: tuple[Tensor | None, State] = _scan_recomputed(plan, tuple(inputs), tuple(shared), tuple(state))
    return result


# Dynamo cannot trace autograd.grad inside a backward; the plain loop above compiles.
@untraced
def _scan_recomputed(plan: _Plan, inputs: State, shared: State, state: State) -> tuple[Tensor | None, State]:
    if not torch.is_grad_enabled():
        plan.budget, plan.host = NOTHING, None
    with plan.autocast.one_pass():
        output, *final = _Scan.apply(plan, *inputs, *shared, *state, *plan.module.parameters())
    return output, tuple(final)


@dataclass(kw_only=True)
class _Plan:
    """What both passes must agree on; see `scan` for what is not described here."""

    module: nn.Module
    bounds: tuple[tuple[int, int], ...]
    """(start, stop) of the segments' tokens, in the order of processing."""
    reverse: bool
    halo: tuple[int, int]
    budget: Budget
    host: HostCopies | None
    counts: tuple[int, int, int]
    """How many inputs, shared tensors, and tensors of a state there are."""
    device: torch.device

    @cached_property
    def autocast(self) -> Autocast:
        """The state at the forward pass, which asks first; the plain loop never does, and runs on any device."""
        return Autocast.now(self.device)

    def window(self, i: int) -> tuple[int, int]:
        """Segment `i` with its halo; may reach beyond the ends of the sequence."""
        start, stop = self.bounds[i]
        before, after = reversed(self.halo) if self.reverse else self.halo
        return start - before, stop + after

    def turned(self, piece: Tensor) -> Tensor:
        """From the order of the sequence to that in which the module sees a segment, and back."""
        return piece.flip(1) if self.reverse else piece

    def cut(self, inputs: Iterable[Tensor], i: int) -> list[Tensor]:
        """Segment `i` of the inputs, halo included, on the device."""
        start, stop = self.window(i)
        return [self.turned(_padded(t, start, stop, self.device)) for t in inputs]

    def add(self, whole: Tensor, i: int, grad: Tensor) -> None:
        """Add the gradient of segment `i` as `cut` gives it, halo included, to the gradient `whole` of its input."""
        start, stop = self.window(i)
        first, last = max(start, 0), min(stop, whole.shape[1])
        piece = self.turned(grad)[:, first - start : last - start]
        if any(self.halo):
            whole[:, first:last] += piece
        else:
            whole[:, first:last] = piece


@dataclass
class _Graph:
    """One segment's autograd graph. `leaves`: inputs, shared, state, parameters; detached from all else."""

    leaves: list[Tensor]
    outputs: tuple[Tensor | None, ...]


class _Scan(torch.autograd.Function):
    """Both passes over the segments as one operation on tensors in this order: inputs, shared, state, parameters."""

    @staticmethod
    def forward(ctx: Any, plan: _Plan, *tensors: Tensor) -> tuple[Tensor | None, ...]:
        aliases = Aliases(plan.module)
        inputs, shared, state, _ = _split(plan, tensors)
        borders = _Borders(len(plan.bounds) - 1, kept=any(ctx.needs_input_grad))
        graphs: dict[int, _Graph] = {}
        whole: Tensor | None = None
        outputs: tuple[Any, ...]
        graph_bytes = 0  # of one segment; the first one shows it, and is paid for afterwards
        for i in range(len(plan.bounds)):
            if plan.budget.left and plan.budget.take(graph_bytes):
                graph, counted = _record_counted(plan, aliases, i, (inputs, shared, state), ctx.needs_input_grad[1:])
                outputs = tuple(None if t is None else t.detach() for t in graph.outputs)
                if i == 0:
                    graph_bytes = counted
                if i or plan.budget.take(graph_bytes):
                    graphs[i] = graph
                del graph
            else:
                with plan.autocast.restored():
                    call = aliases if i else aliases.call_checked
                    outputs = call(*plan.cut(inputs, i), *shared, *state)
            if outputs[0] is not None:
                _check_length(outputs[0], plan.bounds[i])
                if whole is None:
                    tokens = inputs[0].shape[1]
                    whole = outputs[0].new_empty((outputs[0].shape[0], tokens, *outputs[0].shape[2:]))
                start, stop = plan.bounds[i]
                whole[:, start:stop] = plan.turned(outputs[0])
            state = borders.after(i, outputs[1:])
        ctx.plan, ctx.graphs = plan, graphs
        # A copy on the host is saved in place of its input, which the device can then free.
        waiting = [plan.host.of(t) if plan.host else t for t in inputs]
        ctx.save_for_backward(*waiting, *tensors[len(inputs) :], *borders.states)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(t for t in state if not differentiable(t)))
        return whole, *state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_whole: Tensor | None, *grad_state: Tensor | None) -> tuple[Tensor | None, ...]:
        plan: _Plan = ctx.plan
        needs: tuple[bool, ...] = ctx.needs_input_grad[1:]
        tensors, borders = ctx.saved_tensors[: len(needs)], ctx.saved_tensors[len(needs) :]
        aliases = Aliases(plan.module)
        inputs, shared, state, parameters = _split(plan, tensors)
        count = len(state)
        states = [state, *(borders[i * count : (i + 1) * count] for i in range(len(plan.bounds) - 1))]

        grad_inputs = [
            torch.zeros_like(t, device=plan.device) if need else None for t, need in zip(inputs, needs, strict=False)
        ]
        sums = Sums([*shared, *parameters])
        with plan.autocast.one_pass():
            for i in reversed(range(len(plan.bounds))):
                graph = ctx.graphs.pop(i, None) or _record(plan, aliases, i, (inputs, shared, states[i]), needs)
                if i == len(plan.bounds) - 1:
                    refuse_foreign_leaves([t for t in graph.outputs if t is not None], graph.leaves)
                start, stop = plan.bounds[i]
                incoming = None if grad_whole is None else plan.turned(grad_whole[:, start:stop])
                grads = _segment_grads(graph, [incoming, *grad_state])
                of_inputs, of_shared, grad_state, of_parameters = _split(plan, grads)
                for whole, grad in zip(grad_inputs, of_inputs, strict=True):
                    if whole is not None and grad is not None:
                        plan.add(whole, i, grad)
                sums.add([*of_shared, *of_parameters])
                del graph, grads, of_inputs, of_shared, of_parameters  # else they would stand beside the next segment's
        totals = sums.results()
        return None, *grad_inputs, *totals[: len(shared)], *grad_state, *totals[len(shared) :]


class _Borders:
    """The states between segments, kept for the backward pass.

    A state consists of several tensors. Each of them is kept in one large tensor for all borders: small ones, allocated
    amid the temporary memory of their segments, would fragment the heap of a CPU, which then grows with the segments.

    Args:
        count: of borders, one less than the segments.
        kept: whether there will be a backward pass.
    """

    def __init__(self, count: int, *, kept: bool) -> None:
        self.count, self.kept = count, kept
        self.states: list[Tensor] = []
        """The tensors of the first border's state, then those of the second's, ..."""
        self._together: list[Tensor] = []
        """(count, ...) for each tensor of a state."""

    def after(self, i: int, state: Sequence[Tensor]) -> State:
        """The state after segment `i`, which is kept if another segment follows."""
        if i == self.count or not self.kept:
            return tuple(_owned(t) for t in state)
        self._together = self._together or [t.new_empty((self.count, *t.shape)) for t in state]
        pairs = list(zip(self._together, state, strict=True))
        own = tuple(
            rows[i].copy_(t) if (rows[i].shape, rows.dtype) == (t.shape, t.dtype) else _owned(t) for rows, t in pairs
        )
        self.states += own
        return own


def _split(plan: _Plan, tensors: Sequence[T]) -> tuple[tuple[T, ...], tuple[T, ...], tuple[T, ...], tuple[T, ...]]:
    """Into inputs, shared, state, parameters."""
    inputs_end, shared_end, state_end = accumulate(plan.counts)
    return (
        tuple(tensors[:inputs_end]),
        tuple(tensors[inputs_end:shared_end]),
        tuple(tensors[shared_end:state_end]),
        tuple(tensors[state_end:]),
    )


def _record(
    plan: _Plan, aliases: Aliases, i: int, tensors: tuple[State, State, State], needs: Sequence[bool]
) -> _Graph:
    """Run segment `i` with a graph of its own."""
    inputs, shared, state = tensors
    pieces = [*plan.cut(inputs, i), *shared, *state]
    wanted = list(needs[: len(pieces)])
    if i > 0:  # earlier segments may hold parameters and inputs that want the state's gradient
        wanted[len(inputs) + len(shared) :] = [differentiable(t) for t in state]
    leaves = [t.detach().requires_grad_(want) for t, want in zip(pieces, wanted, strict=True)]
    with torch.enable_grad(), plan.autocast.restored():
        outputs = (aliases if i else aliases.call_checked)(*leaves)
    return _Graph([*leaves, *aliases], tuple(outputs))


def _record_counted(
    plan: _Plan, aliases: Aliases, i: int, tensors: tuple[State, State, State], needs: Sequence[bool]
) -> tuple[_Graph, int]:
    """As `_record`, and the bytes that the graph holds beside its inputs."""
    with counted_saves([*aliases, *(t for group in tensors for t in group)]) as saves:
        graph = _record(plan, aliases, i, tensors, needs)
    return graph, saves.bytes + sum(t.nbytes for t in graph.outputs if t is not None)


def _segment_grads(graph: _Graph, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Gradients of the leaves, None where there is none."""
    pairs = [
        (t, g) for t, g in zip(graph.outputs, grads, strict=True) if t is not None and g is not None and t.requires_grad
    ]
    asked = [t for t in graph.leaves if t.requires_grad]
    if not pairs or not asked:
        return [None] * len(graph.leaves)
    found = iter(torch.autograd.grad([t for t, _ in pairs], asked, [g for _, g in pairs], allow_unused=True))
    return [next(found) if t.requires_grad else None for t in graph.leaves]


def _plain_loop(plan: _Plan, inputs: State, shared: State, state: State) -> tuple[Tensor | None, State]:
    """All segments under ordinary autograd, which keeps everything."""
    pieces: list[Tensor] = []
    for i in range(len(plan.bounds)):
        output, *rest = plan.module(*plan.cut(inputs, i), *shared, *state)
        state = tuple(rest)
        if output is not None:
            _check_length(output, plan.bounds[i])
            pieces.append(plan.turned(output))
    if plan.reverse:
        pieces.reverse()
    return (torch.cat(pieces, dim=1) if len(pieces) > 1 else pieces[0] if pieces else None), state


def _padded(tensor: Tensor, start: int, stop: int, device: torch.device) -> Tensor:
    """Tokens start..stop of (batch, tokens, ...) on `device`, zeros beyond its ends."""
    tokens = tensor.shape[1]
    if start <= 0 and stop >= tokens and stop - start == tokens:
        return _onto(device, tensor)
    parts = [_onto(device, tensor[:, max(start, 0) : min(stop, tokens)])]
    for place, missing in ((0, -start), (1, stop - tokens)):
        if missing > 0:
            parts.insert(place * len(parts), parts[0].new_zeros((tensor.shape[0], missing, *tensor.shape[2:])))
    return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]


def _onto(device: torch.device, piece: Tensor) -> Tensor:
    """Tokens (batch, n, ...) on `device`, without waiting for it."""
    if piece.device == device or piece.is_contiguous():
        return piece.to(device, non_blocking=True)
    # Row by row, each contiguous: PyTorch would first gather anything else on the host, and so read from `HostCopies`
    # what may not have arrived there yet.
    return torch.stack([row.to(device, non_blocking=True) for row in piece])


def _count_tokens(inputs: Sequence[Tensor], segment: int) -> int:
    if segment < 1:
        raise ConfigError(f"scan: expected a segment of at least 1 token, got {segment}")
    lengths = {t.shape[1] for t in inputs}
    if len(lengths) != 1 or 0 in lengths:
        raise ConfigError(
            f"scan: expected inputs (batch, tokens, ...) with one number of tokens, at least 1, got shapes "
            f"{[tuple(t.shape) for t in inputs]}"
        )
    return lengths.pop()


def _bounds(tokens: int, segment: int, reverse: bool) -> tuple[tuple[int, int], ...]:
    """(start, stop) of the segments in the order of processing; only the last one is shorter."""
    if reverse:
        return tuple((max(stop - segment, 0), stop) for stop in range(tokens, 0, -segment))
    return tuple((start, min(start + segment, tokens)) for start in range(0, tokens, segment))


def _check_length(output: Tensor, bound: tuple[int, int]) -> None:
    if output.ndim < 2 or output.shape[1] != bound[1] - bound[0]:
        raise ConfigError(
            f"scan: the module returned {tuple(output.shape)} for a segment of {bound[1] - bound[0]} tokens: "
            "expected (batch, tokens, ...) with as many tokens, or None"
        )


def _owned(tensor: Tensor) -> Tensor:
    """A copy if `tensor` is a part of something larger, which it would keep alive until the backward pass."""
    return tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor
