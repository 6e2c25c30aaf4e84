from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from gigaxt.amounts import GIB
from gigaxt.errors import ConfigError
from gigaxt.nn.context.neighbours import Piece, find_pieces
from gigaxt.nn.context.ordering import find_places
from gigaxt.nn.context.pieces import map_pieces
from gigaxt.streaming.rows import Budget


class Blend(nn.Module):
    """Each of a piece's own tokens plus something of all its tokens; counts its runs."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.runs = 0

    def forward(self, x: Tensor, coords: Tensor, shared: Tensor, piece: Piece) -> Tensor:
        self.runs += 1
        all_together = (self.linear(x).tanh() * coords.sum(-1, keepdim=True)).sum(0)
        return (x * all_together + shared.sum(0)).index_select(0, piece.queries().flatten()[piece.filled()])


def setting() -> tuple[Blend, Tensor, Tensor, Tensor, list[Piece]]:
    generator = torch.Generator().manual_seed(0)
    coords = torch.rand(2, 250, 2, dtype=torch.float64, generator=generator) * 20
    validity = torch.rand(2, 250, generator=generator) > torch.tensor([[0.0], [0.3]])
    places = find_places(coords, validity, "hilbert", torch.device("cpu"))
    pieces = find_pieces(places, 2, 64)
    assert len(pieces) > 4
    torch.manual_seed(0)
    x = torch.randn(500, 4, dtype=torch.float64, requires_grad=True)
    shared = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    return Blend().double(), x, places.coords.flatten(0, 1), shared, pieces


def test_nothing_kept_equals_all_kept() -> None:
    module, x, coords, shared, pieces = setting()
    results, runs = [], []
    weights = torch.randn(500, 4, dtype=torch.float64)
    for budget in (None, Budget(0), Budget(40_000 / GIB), Budget(1)):
        module.runs = 0
        y = map_pieces(module, x, coords, shared, pieces, budget)
        results.append((y, torch.autograd.grad((y * weights).sum(), [x, shared, *module.parameters()])))
        runs.append(module.runs)
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-11, atol=1e-12)
    assert runs[0] == runs[3] == len(pieces)
    assert runs[1] == 2 * len(pieces)
    assert runs[0] < runs[2] < runs[1]  # some fit the budget
    owned = torch.cat([piece.own for piece in pieces])
    assert results[0][0].index_fill(0, owned, 0).eq(0).all()


def test_only_what_asks_for_a_gradient_gets_one() -> None:
    module, x, coords, shared, pieces = setting()
    module.requires_grad_(False)
    y = map_pieces(module, x.detach(), coords, shared, pieces, Budget(0))
    (grad,) = torch.autograd.grad(y.sum(), shared)
    assert grad.abs().min() > 0
    budget = Budget(1)
    with torch.no_grad():
        assert not map_pieces(module, x, coords, shared, pieces, budget).requires_grad
    assert budget.left == GIB  # nothing to keep
    assert not map_pieces(module, x.detach(), coords, shared.detach(), pieces, Budget(0)).requires_grad


def test_a_tensor_that_is_no_input_is_refused() -> None:
    module, x, coords, shared, pieces = setting()
    foreign = torch.ones(4, dtype=torch.float64, requires_grad=True)
    module.linear.register_forward_hook(lambda module, args, y: y * foreign)
    y = map_pieces(module, x, coords, shared, pieces, Budget(0))
    with pytest.raises(ConfigError, match="not among its own parameters"):
        y.sum().backward()
