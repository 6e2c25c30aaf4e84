"""What every context encoder must do, whatever its kind: `check_context`, and what holds for our own only."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gigaxt.nn.context import ContextConfig, ContextEncoder, build_context
from gigaxt.nn.context.base import KINDS
from gigaxt.testing import check_context
from gigaxt.testing.live_memory import LiveMemory
from gigaxt.testing.subject import lattice

NAMES = ["none", "full", "hyper", "longformer", "mamba", "mamba2", "window", "xl"]
MIXING = NAMES[1:]
CAUSAL = ["mamba", "mamba2", "xl"]
OPTIONS: dict[str, dict[str, object]] = {  # so small that 77 tokens go through all of it
    "hyper": {"block": 8, "samples": 8, "exact_below": 16},
    "longformer": {"window": 5, "global_tokens": 2},
    "mamba": {"state": 4},
    "mamba2": {"state": 4, "chunk": 8},
    "window": {"radius": 2, "global_tokens": 2},
    "xl": {"segment": 8},
}


def build(kind: str, **kwargs: Any) -> ContextEncoder:
    """A small encoder in float64, as it is at the start."""
    torch.manual_seed(0)
    settings = {"dim": 16, "summary": 4, "options": OPTIONS.get(kind, {}), **kwargs}
    return build_context(ContextConfig(kind=kind, **settings)).double()


def draw(tokens: int) -> Tensor:
    return torch.randn(1, tokens, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("settings", [{}, {"summary": 0, "order": "snake", "alternate": True}], ids=["default", "bare"])
def test_contract(kind: str, settings: dict[str, Any]) -> None:
    check_context(KINDS[kind], options=OPTIONS.get(kind, {}), **settings)


@pytest.mark.parametrize("kind", CAUSAL)
@pytest.mark.parametrize("settings", [{"summary": 0}, {"depth": 1, "order": "raster"}], ids=["causal", "one way"])
def test_contract_of_one_direction(kind: str, settings: dict[str, Any]) -> None:
    assert build(kind, bidirectional=False, **settings).causal == (settings.get("summary") == 0)
    check_context(KINDS[kind], bidirectional=False, options=OPTIONS.get(kind, {}), **settings)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("xl", {"segment": 8, "memory": 2, "memory_grad": True}),
        ("longformer", {"window": 5, "global_tokens": 0}),
        ("window", {"radius": 2, "global_tokens": 0}),
        ("hyper", {}),  # exact at this length
    ],
)
def test_contract_of_other_ways(kind: str, options: dict[str, Any]) -> None:
    causal = {"bidirectional": False} if kind in CAUSAL else {}
    check_context(KINDS[kind], depth=1, summary=0, options=options, **causal)


def test_every_kind_is_here() -> None:
    assert {kind for kind, cls in KINDS.items() if cls.__module__.startswith("gigaxt.nn.context.")} == {*NAMES}


@pytest.mark.parametrize("kind", MIXING)
def test_starts_near_identity(kind: str) -> None:
    tokens = draw(400)
    tokens /= tokens.square().mean(-1, keepdim=True).sqrt()
    y, _ = build(kind)(tokens, lattice(20, 20))
    assert (y - tokens).norm() / tokens.norm() < 1
    assert 0.8 < y.std() < 1.2


@pytest.mark.parametrize(("kind", "most"), [("mamba2", 8.0), ("full", 20.0)])
def test_memory_per_token(kind: str, most: float) -> None:
    """Token stores that forward and backward need above the tokens: slope between two lengths, outputs included."""
    peaks = []
    lengths = (384, 768)
    for tokens in lengths:
        encoder = build(kind, keep_tokens=0, segment=128).float()
        x = draw(tokens).float().requires_grad_()
        with LiveMemory([x, *encoder.parameters()]) as memory:
            y, _ = encoder(x, lattice(1, tokens).float())
            y.sum().backward()
        peaks.append(memory.peak)
    stores = (peaks[1] - peaks[0]) / ((lengths[1] - lengths[0]) * 16 * 4)
    states = {"mamba2": 3.5, "full": 1.5}[kind]  # states and places are not small beside 16 channels
    assert 2 < stores < most + states


@pytest.mark.parametrize(
    ("kind", "settings"),
    [*((kind, {"summary": 0, "keep_tokens": 1000}) for kind in MIXING), ("mamba2", {"keep_tokens": 0, "segment": 16})],
)
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # Dynamo looks at tensors between graphs
def test_compiles(kind: str, settings: dict[str, Any]) -> None:
    encoder = build(kind, depth=1, **settings)
    tokens, coords = draw(40), lattice(5, 8)
    torch.compiler.reset()
    compiled = torch.compile(encoder, backend="eager")
    results = []
    for module in (encoder, compiled):
        x = tokens.clone().requires_grad_()
        y, _ = module(x, coords)
        y.square().sum().backward()
        results.append((y, x.grad))
    torch.testing.assert_close(results[1], results[0], rtol=1e-10, atol=1e-12)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("keep_tokens", [0, 10**6])
def test_cuda_equals_cpu(kind: str, keep_tokens: int) -> None:
    """Ragged rows, in float64, outputs and gradients; and the activations of a budget."""
    validity = torch.rand(2, 400, generator=torch.Generator().manual_seed(1)) > torch.tensor([[0.1], [0.6]])
    results = []
    for device in ("cpu", "cuda"):
        encoder = build(kind, keep_tokens=keep_tokens, segment=64, budget_gib=1e-4).to(device)
        x = draw(400).repeat(2, 1, 1).to(device).requires_grad_()
        y, _ = encoder(x, lattice(20, 20).expand(2, -1, -1).to(device), validity.to(device))
        leaves = [x, *encoder.parameters()]
        results.append([t.cpu() for t in (y, *torch.autograd.grad(y.square().sum(), leaves))])
    torch.testing.assert_close(results[1], results[0], rtol=1e-8, atol=1e-10)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("kind", MIXING)
def test_a_step_in_bfloat16_on_cuda(kind: str) -> None:
    """Under autocast, more tokens than a segment: finite outputs and gradients."""
    encoder = build(kind, dim=64, keep_tokens=0, options={}).float().cuda()
    x = torch.randn(1, 5000, 64, device="cuda", requires_grad=True)
    with torch.autocast("cuda", torch.bfloat16):
        y, _ = encoder(x, lattice(50, 100).cuda())
    y.float().square().mean().backward()
    assert y.isfinite().all()
    assert all(t.grad is not None and t.grad.isfinite().all() for t in (x, *encoder.parameters()))


@pytest.mark.parametrize("kind", MIXING)
@pytest.mark.parametrize("summary", [0, 4])
def test_gradients_of_tokens_that_are_all_zero(kind: str, summary: int) -> None:
    """A norm's derivative at zero is 1000; were tokens still zero at the next norm, it would be multiplied again."""
    encoder = build(kind, summary=summary, depth=4)
    tokens = torch.zeros(1, 77, 16, dtype=torch.float64, requires_grad=True)
    found, _ = encoder(tokens, lattice(7, 11).double())
    (found * draw(77)).sum().backward()
    assert tokens.grad is not None
    assert 0 < float(tokens.grad.abs().max()) < 1e9
    assert all(float(p.grad.abs().max()) < 1e6 for p in encoder.parameters() if p.grad is not None)
