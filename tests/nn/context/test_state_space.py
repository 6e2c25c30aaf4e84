from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gigaxt.nn.context import ContextConfig, ContextEncoder, build_context
from gigaxt.nn.context.state_space import CausalConvolution, inverse_softplus

KINDS = ["mamba", "mamba2"]
OPTIONS = {"mamba": {"state": 4}, "mamba2": {"state": 4, "chunk": 4}}


def causal(kind: str, **kwargs: object) -> ContextEncoder:
    torch.manual_seed(0)
    settings: dict[str, object] = {"dim": 8, "depth": 2, "options": OPTIONS[kind], **kwargs}
    config = ContextConfig(kind=kind, summary=0, bidirectional=False, order="raster", **settings)
    return build_context(config).double()


def raster(rows: int, cols: int) -> Tensor:
    """(2, rows * cols, 2) as (row, col)."""
    grid = torch.stack(torch.meshgrid(torch.arange(rows), torch.arange(cols), indexing="ij"), -1)
    return grid.reshape(1, -1, 2).double().expand(2, -1, -1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("keep_tokens", [0, 1000])
@pytest.mark.parametrize("bounds", [(0, 15, 20, 45), (0, 1, 2, 4, 7, 12, 40, 41, 45)])
def test_continued_by_state_equals_one_pass(kind: str, keep_tokens: int, bounds: tuple[int, ...]) -> None:
    encoder = causal(kind, segment=16, keep_tokens=keep_tokens)
    coords, generator = raster(9, 5), torch.Generator().manual_seed(1)
    tokens = torch.randn(2, 45, 8, dtype=torch.float64, generator=generator).requires_grad_()
    weights = torch.randn(2, 45, 8, dtype=torch.float64, generator=generator)
    # Different numbers of valid tokens in every strip and row; at least one, as strips of masked tokens are refused.
    validity = torch.rand(2, 45, generator=generator) > 0.3
    validity[:, list(bounds[:-1])] = True

    whole, whole_state = encoder(tokens, coords, validity)
    whole_grads = torch.autograd.grad((whole * weights).sum(), [tokens, *encoder.parameters()])
    state, parts = None, []
    for start, stop in pairwise(bounds):
        part, state = encoder(tokens[:, start:stop], coords[:, start:stop], validity[:, start:stop], state)
        parts.append(part)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(state, whole_state, rtol=1e-10, atol=1e-12)
    grads = torch.autograd.grad((torch.cat(parts, 1) * weights).sum(), [tokens, *encoder.parameters()])
    torch.testing.assert_close(grads, whole_grads, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", KINDS)
def test_causal_tokens_hear_only_of_earlier_ones(kind: str) -> None:
    tokens = torch.randn(2, 12, 8, dtype=torch.float64, requires_grad=True)
    y, _ = causal(kind)(tokens, raster(1, 12))
    (grad,) = torch.autograd.grad(y[:, 5].square().sum(), tokens)
    assert grad[:, :6].abs().amax(-1).min() > 0
    assert grad[:, 6:].abs().max() == 0


@pytest.mark.parametrize("kind", KINDS)
def test_states_are_small_and_exact(kind: str) -> None:
    encoder = causal(kind, keep_tokens=0, segment=16).bfloat16()
    _, state = encoder(torch.randn(2, 45, 8, dtype=torch.bfloat16), raster(9, 5))
    assert state is not None
    for tensor in (t for layer in state[:-1] for t in layer):
        assert tensor.dtype == torch.float32
        assert tensor.untyped_storage().nbytes() == tensor.nbytes  # it keeps nothing else alive


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_autocast_is_near(kind: str) -> None:
    torch.manual_seed(0)
    encoder = build_context(ContextConfig(kind=kind, dim=32, depth=1, summary=4, options={"state": 8}))
    tokens = torch.randn(1, 300, 32)
    coords = torch.stack((torch.arange(300) // 20, torch.arange(300) % 20), dim=-1)[None].float()
    exact, _ = encoder(tokens, coords)
    with torch.autocast("cpu", torch.bfloat16):
        y, _ = encoder(tokens.bfloat16(), coords)
    assert y.dtype == torch.bfloat16
    assert (y - exact).norm() / exact.norm() < 0.02
    assert math.isfinite(y.sum().item())


@pytest.mark.parametrize("length", [2, 4])
@pytest.mark.parametrize("tokens", [1, 2, 9])
def test_convolution_equals_pytorch(length: int, tokens: int) -> None:
    torch.manual_seed(0)
    conv = CausalConvolution(3, length).double()
    x = torch.randn(2, tokens, 3, dtype=torch.float64, requires_grad=True)
    tail = torch.randn(2, length - 1, 3, dtype=torch.float64, requires_grad=True)
    inputs = [x, tail, *conv.parameters()]
    window = torch.cat((tail, x), dim=1)
    expected = F.silu(F.conv1d(window.transpose(1, 2), conv.weight, conv.bias, groups=3)).transpose(1, 2)
    y, new_tail = conv(x, torch.ones(2, tokens, dtype=torch.bool), tail)
    torch.testing.assert_close([y, new_tail], [expected, window[:, tokens:]])
    for found, wanted in ((y, expected), (new_tail, window[:, tokens:])):
        grads = torch.autograd.grad(found.square().sum(), inputs, allow_unused=True, retain_graph=True)
        wanted_grads = torch.autograd.grad(wanted.square().sum(), inputs, allow_unused=True, retain_graph=True)
        torch.testing.assert_close(grads, wanted_grads)


def test_tail_ends_at_the_last_valid_token() -> None:
    conv = CausalConvolution(1, 4)
    valid = torch.tensor([[True, True, False], [False, False, False], [True, True, True]])
    x = torch.tensor([1.0, 2.0, 3.0]).view(1, 3, 1) * valid.unsqueeze(-1)
    tail = torch.tensor([-3.0, -2.0, -1.0]).view(1, 3, 1).expand(3, -1, -1)
    _, new_tail = conv(x, valid, tail)
    assert new_tail[..., 0].tolist() == [[-1, 1, 2], [-3, -2, -1], [1, 2, 3]]


def test_inverse_softplus() -> None:
    x = torch.tensor([1e-8, 1e-5, 1e-3, 1.0, 10.0])
    torch.testing.assert_close(F.softplus(inverse_softplus(x)), x, rtol=1e-5, atol=0)
