"""`map_pieces`: a module run over pieces of a token sequence that overlap in any way, as one differentiable operation.

It stands beside `gigaxt.streaming.scan`, whose segments follow one another and overlap at their ends: neighbours on a
lattice are not neighbours in any order of the tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from gigaxt.nn.context.neighbours import Piece
from gigaxt.streaming.replay import Aliases, Autocast, Sums, counted_saves, grad, refuse_foreign_leaves
from gigaxt.streaming.rows import Budget
from gigaxt.streaming.untraced import untraced


def map_pieces(
    module: nn.Module, x: Tensor, coords: Tensor, shared: Tensor, pieces: Sequence[Piece], budget: Budget | None
) -> Tensor:
    """Run `module` on each piece's tokens, and put its results at their places.

    With a budget nothing but `x` is kept between the passes, and pieces that it does not pay for are run again in the
    backward pass, with a graph of one at a time. Each parameter gets its gradient once; first derivatives only.

    Args:
        module: called as `module(tokens, coords, shared, piece)` with (u, dim) and (u, 2) of `piece.tokens`; returns
            (s, dim) for `piece.own`. A pure function of its arguments and parameters.
        x: (tokens, dim).
        coords: (tokens, 2); get no gradient.
        shared: a tensor that every piece is given whole; its gradients are added up in float32 or better.
        pieces: which tokens go together.
        budget: what pieces that keep their activations pay from; None keeps all, under ordinary autograd.

    Returns:
        (tokens, dim), zeros at places that no piece owns.
    """
    if budget is not None:
        result: Tensor = _map_recomputed(module, x, coords, shared, pieces, budget)
        return result
    found = [module(x.index_select(0, p.tokens), coords.index_select(0, p.tokens), shared, p) for p in pieces]
    return torch.zeros_like(x).index_copy(0, torch.cat([p.own for p in pieces]), torch.cat(found))


# Dynamo cannot trace autograd.grad inside a backward; the plain loop above compiles.
@untraced
def _map_recomputed(
    module: nn.Module, x: Tensor, coords: Tensor, shared: Tensor, pieces: Sequence[Piece], budget: Budget
) -> Tensor:
    job = _Job(
        module=module,
        coords=coords,
        pieces=pieces,
        budget=budget if torch.is_grad_enabled() else Budget(0),
        autocast=Autocast.now(x.device),
    )
    with job.autocast.one_pass():
        result: Tensor = _Map.apply(job, x, shared, *module.parameters())
    return result


class _Graph(NamedTuple):
    """One piece's autograd graph. `leaves`: its tokens, shared, parameters; detached from all else."""

    leaves: list[Tensor]
    found: Tensor


@dataclass(frozen=True, kw_only=True)
class _Job:
    """What both passes must agree on."""

    module: nn.Module
    coords: Tensor
    pieces: Sequence[Piece]
    budget: Budget
    autocast: Autocast

    def run(self, aliases: Aliases, i: int, x: Tensor, shared: Tensor) -> Tensor:
        """The module on piece `i`, of which `x` is the tokens."""
        call, piece = aliases if i else aliases.call_checked, self.pieces[i]
        with self.autocast.restored():
            found: Tensor = call(x, self.coords.index_select(0, piece.tokens), shared, piece)
        return found

    def record(self, aliases: Aliases, i: int, x: Tensor, shared: Tensor, needs: Sequence[bool]) -> _Graph:
        """The same with a graph; `x` is all tokens, `needs` says whether they and `shared` want a gradient."""
        part = x.index_select(0, self.pieces[i].tokens)
        part, shared = (t.detach().requires_grad_(need) for t, need in zip((part, shared), needs, strict=True))
        with torch.enable_grad():
            return _Graph([part, shared, *aliases], self.run(aliases, i, part, shared))


class _Map(torch.autograd.Function):
    """Tensors come as x, shared, parameters."""

    @staticmethod
    def forward(ctx: Any, job: _Job, x: Tensor, shared: Tensor, *parameters: Tensor) -> Tensor:
        aliases, y = Aliases(job.module), torch.zeros_like(x)
        graphs: dict[int, _Graph] = {}
        for i, piece in enumerate(job.pieces):
            if job.budget.left and len(graphs) == i:  # all so far are kept
                with counted_saves([shared, *aliases]) as saves:
                    graph = job.record(aliases, i, x, shared, ctx.needs_input_grad[1:3])
                found = graph.found.detach()
                if job.budget.take(saves.bytes + found.nbytes):
                    graphs[i] = graph
                del graph
            else:
                found = job.run(aliases, i, x.index_select(0, piece.tokens), shared)
            y.index_copy_(0, piece.own, found)
        ctx.job, ctx.graphs = job, graphs
        ctx.save_for_backward(x, shared, *parameters)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        job: _Job = ctx.job
        x, shared, *parameters = ctx.saved_tensors
        aliases, needs = Aliases(job.module), ctx.needs_input_grad[1:3]
        grad_x = torch.zeros_like(x) if needs[0] else None
        sums = Sums([shared, *parameters])
        with job.autocast.one_pass():
            for i, piece in enumerate(job.pieces):
                graph = ctx.graphs.pop(i, None) or job.record(aliases, i, x, shared, needs)
                if i == 0:
                    refuse_foreign_leaves([graph.found], graph.leaves)
                of_part, *others = grad([graph.found], graph.leaves, [grad_y.index_select(0, piece.own)])
                if grad_x is not None and of_part is not None:
                    grad_x.index_add_(0, piece.tokens, of_part)  # no token twice: the order of additions is fixed
                sums.add(others)
                del graph, of_part, others  # else they would stand beside the next piece's
        return None, grad_x, *sums.results()
