"""What every context encoder must do, whatever its kind."""

from __future__ import annotations

import pytest
import torch
from live_memory import LiveMemory
from torch import Tensor

from gigaxt.nn.context import ContextConfig, ContextEncoder, build_context

KINDS = ["none", "full", "mamba2"]
MIXING = KINDS[1:]
OPTIONS = {"mamba2": {"state": 4, "chunk": 8}}


def build(kind: str, seed: int = 0, **kwargs: object) -> ContextEncoder:
    """A small encoder in float64, its norms and biases not at their initial values."""
    torch.manual_seed(seed)
    settings: dict[str, object] = {"dim": 16, "depth": 2, "summary": 4, "options": OPTIONS.get(kind, {}), **kwargs}
    encoder = build_context(ContextConfig(kind=kind, **settings)).double()
    with torch.no_grad():
        for p in encoder.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    return encoder


def lattice(rows: int, cols: int) -> Tensor:
    """(1, rows * cols, 2) as (row, col)."""
    grid = torch.stack(torch.meshgrid(torch.arange(rows), torch.arange(cols), indexing="ij"), -1)
    return grid.reshape(1, -1, 2).double()


def draw(batch: int, tokens: int, dim: int = 16, seed: int = 0) -> Tensor:
    return torch.randn(batch, tokens, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def close(a: object, b: object) -> None:
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", ["hilbert", "raster", "snake"])
def test_order_given_does_not_matter(kind: str, order: str) -> None:
    encoder, tokens, coords = build(kind, order=order), draw(1, 35), lattice(7, 5)
    shuffled = torch.randperm(35, generator=torch.Generator().manual_seed(1))
    y, _ = encoder(tokens, coords)
    z, _ = encoder(tokens[:, shuffled], coords[:, shuffled])
    close(z, y[:, shuffled])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("keep_tokens", [0, 1000])
def test_masked_tokens_change_nothing(kind: str, keep_tokens: int) -> None:
    encoder = build(kind, keep_tokens=keep_tokens, segment=24)
    tokens, coords = draw(2, 42), lattice(6, 7).repeat(2, 1, 1)
    validity = torch.rand(2, 42, generator=torch.Generator().manual_seed(2)) > torch.tensor([[0.2], [0.6]])
    tokens = torch.where(validity[..., None], tokens, torch.nan).requires_grad_()
    weights = draw(2, 42, seed=3)
    y, _ = encoder(tokens, coords, validity)
    assert y[~validity].eq(0).all()
    (y * weights).sum().backward()
    assert tokens.grad is not None
    assert tokens.grad[~validity].eq(0).all()
    grads = {name: p.grad.clone() for name, p in encoder.named_parameters() if p.grad is not None}
    encoder.zero_grad()
    for b in range(2):  # each row alone, its masked tokens left out
        inside = validity[b]
        alone = tokens.detach()[b : b + 1, inside].requires_grad_()
        z, _ = encoder(alone, coords[b : b + 1, inside])
        close(z[0], y[b, inside])
        (z * weights[b, inside]).sum().backward()
        close(alone.grad[0], tokens.grad[b, inside])
    for name, p in encoder.named_parameters():
        torch.testing.assert_close(p.grad, grads[name], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", MIXING)
@pytest.mark.parametrize("settings", [{}, {"summary": 0}, {"depth": 1}])
def test_recomputation_changes_nothing(kind: str, settings: dict[str, object]) -> None:
    results = []
    for keep_tokens in (1000, 0):
        encoder = build(kind, keep_tokens=keep_tokens, segment=30, **settings)
        tokens = draw(2, 77).requires_grad_()
        y, _ = encoder(tokens, lattice(7, 11).expand(2, -1, -1))
        (y * draw(2, 77, seed=1)).sum().backward()
        results.append((y, tokens.grad, [p.grad for p in encoder.parameters()]))
    assert all(grad is not None for grad in results[0][2])
    close(results[1], results[0])


@pytest.mark.parametrize("kind", KINDS)
def test_one_token_alone(kind: str) -> None:
    tokens = draw(1, 1).requires_grad_()
    y, _ = build(kind, keep_tokens=0)(tokens, torch.tensor([[[3.0, 5.0]]]))
    y.sum().backward()
    assert y.isfinite().all()
    assert tokens.grad is not None
    assert tokens.grad.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_same_call_gives_the_same_bits(kind: str) -> None:
    tokens, coords = draw(1, 200).float(), lattice(10, 20)
    a, b = (build(kind, keep_tokens=0, segment=64).float()(tokens, coords)[0] for _ in range(2))
    assert torch.equal(a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_context_lets_gradients_through(kind: str) -> None:
    encoder = build(kind, keep_tokens=0, segment=16).requires_grad_(False)
    tokens = draw(1, 40).requires_grad_()
    encoder(tokens, lattice(5, 8))[0].square().sum().backward()
    assert tokens.grad is not None
    assert all(p.grad is None for p in encoder.parameters())


def far_influence(encoder: ContextEncoder, regions: int, tokens_per_side: int) -> list[tuple[float, float]]:
    """From the first region to the last one's outputs and back: (relative change, relative gradient)."""
    side = regions * tokens_per_side
    coords = lattice(side, side)
    first, last = (coords < tokens_per_side).all(-1)[0], (coords >= side - tokens_per_side).all(-1)[0]
    # What fresh region encoders give: tokens that are all alike but for a tenth.
    tokens = (draw(1, 1, seed=4) + 0.1 * draw(1, side * side, seed=5)).requires_grad_()
    y, _ = encoder(tokens, coords)
    results = []
    for source, target in ((first, last), (last, first)):
        changed = tokens.detach().clone()
        changed[:, source] += 0.1 * draw(1, 1, seed=6)
        with torch.no_grad():
            z, _ = encoder(changed, coords)
        change = (z - y)[:, target].norm() / y[:, target].norm()
        (grad,) = torch.autograd.grad((y[:, target] * draw(1, 1, seed=7)).sum(), tokens, retain_graph=True)
        results.append((change.item(), (grad[:, source].norm() / grad[:, target].norm()).item()))
    return results


def fresh(kind: str, **kwargs: object) -> ContextEncoder:
    """At its default initialisation."""
    torch.manual_seed(0)
    return build_context(
        ContextConfig(kind=kind, dim=16, options={"state": 8} if kind == "mamba2" else {}, **kwargs)
    ).double()


@pytest.mark.parametrize("kind", MIXING)
def test_far_corner_hears_of_a_change(kind: str) -> None:
    for change, gradient in far_influence(fresh(kind), regions=64, tokens_per_side=1):
        assert change > 1e-6
        assert gradient > 1e-6


def test_none_hears_of_nothing() -> None:
    assert far_influence(build("none"), regions=8, tokens_per_side=2) == [(0.0, 0.0)] * 2


def test_reach_without_summary() -> None:
    # The page of Mamba-2 promises scenes of 1e5 tokens; its state alone carries the change here.
    for change, gradient in far_influence(fresh("mamba2", summary=0), regions=32, tokens_per_side=1):
        assert change > 1e-7
        assert gradient > 1e-7
    one_way = fresh("mamba2", summary=0, bidirectional=False, order="raster")
    forth, back = far_influence(one_way, regions=16, tokens_per_side=1)
    assert min(forth) > 1e-7
    assert back == (0.0, 0.0)


@pytest.mark.parametrize("kind", MIXING)
def test_starts_near_identity(kind: str) -> None:
    tokens = draw(1, 400)
    tokens /= tokens.square().mean(-1, keepdim=True).sqrt()
    y, _ = fresh(kind)(tokens, lattice(20, 20))
    assert (y - tokens).norm() / tokens.norm() < 1
    assert 0.8 < y.std() < 1.2


@pytest.mark.parametrize(("kind", "most"), [("mamba2", 8.0), ("full", 20.0)])
def test_memory_per_token(kind: str, most: float) -> None:
    """Token stores that forward and backward need above the tokens: slope between two lengths, outputs included."""
    peaks = []
    lengths = (384, 768)
    for tokens in lengths:
        encoder = build(kind, keep_tokens=0, segment=128).float()
        x = draw(1, tokens).float().requires_grad_()
        with LiveMemory([x, *encoder.parameters()]) as memory:
            y, _ = encoder(x, lattice(1, tokens).float())
            y.sum().backward()
        peaks.append(memory.peak)
    stores = (peaks[1] - peaks[0]) / ((lengths[1] - lengths[0]) * 16 * 4)
    states = {"mamba2": 3.5, "full": 1.5}[kind]  # states and places are not small beside 16 channels
    assert 2 < stores < most + states


@pytest.mark.parametrize(("kind", "keep_tokens"), [("mamba2", 1000), ("mamba2", 0)])
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # Dynamo looks at tensors between graphs
def test_compiles(kind: str, keep_tokens: int) -> None:
    encoder = build(kind, depth=1, keep_tokens=keep_tokens, segment=16)
    tokens, coords = draw(1, 40), lattice(5, 8)
    torch.compiler.reset()
    compiled = torch.compile(encoder, backend="eager")
    results = []
    for module in (encoder, compiled):
        x = tokens.clone().requires_grad_()
        y, _ = module(x, coords)
        y.square().sum().backward()
        results.append((y, x.grad))
    close(results[1], results[0])
