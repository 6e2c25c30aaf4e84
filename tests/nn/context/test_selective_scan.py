from __future__ import annotations

import sys
from collections.abc import Sequence
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensorMode

from gigaxt.nn.context import selective_scan as module
from gigaxt.nn.context.selective_scan import find_kernel, scan_by_kernel, scan_in_pieces, selective_scan


def one_by_one(
    x: Tensor, step: Tensor, rates: Tensor, keys: Tensor, queries: Tensor, h: Tensor
) -> tuple[Tensor, Tensor]:
    """The recurrence as the paper defines it."""
    outputs = []
    for t in range(x.shape[1]):
        h = (-rates * step[:, t, :, None]).exp() * h + (step * x)[:, t, :, None] * keys[:, t, None]
        outputs.append((h * queries[:, t, None]).sum(-1))
    return torch.stack(outputs, dim=1), h


def kernel_stand_in(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, z: Tensor | None = None,
    delta_bias: Tensor | None = None, delta_softplus: bool = False, return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """What `mamba_ssm` computes: from zeros, and its last state has no gradient."""
    if delta_bias is not None:
        delta = delta + delta_bias[:, None]
    if delta_softplus:
        delta = F.softplus(delta)
    h, outputs = u.new_zeros(u.shape[0], u.shape[1], A.shape[1]), []
    for t in range(u.shape[-1]):
        h = (delta[..., t, None] * A).exp() * h + (delta * u)[..., t, None] * B[:, None, :, t]
        outputs.append((h * C[:, None, :, t]).sum(-1))
    y = torch.stack(outputs, dim=-1)
    y = y if D is None else y + u * D[:, None]
    y = y if z is None else y * F.silu(z)
    return (y, h.detach()) if return_last_state else y


def draw(tokens: int, dtype: torch.dtype = torch.float64, batch: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(tokens)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    inner, state = 4, 3
    step = F.softplus(4 * normal(batch, tokens, inner) - 2)  # from 1e-5 to 10
    step[:, tokens // 2] = 0  # a masked token
    tensors = (
        normal(batch, tokens, inner), step, normal(inner, state).exp(),
        normal(batch, tokens, state), normal(batch, tokens, state), normal(batch, inner, state),
    )  # fmt: skip
    return [t.to(dtype).requires_grad_() for t in tensors]


def with_grads(results: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    """The results, and the gradients of a weighted sum of them."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(t.shape, dtype=torch.float64, generator=generator).to(t) for t in results]
    total = sum((t * w).sum() for t, w in zip(results, weights, strict=True))
    return [*results, *torch.autograd.grad(total, inputs)]


@pytest.mark.parametrize("tokens", [1, 2, 31, 32, 33, 75])
@pytest.mark.parametrize("piece", [1, 120, 24 * 64, 2**18])  # numbers: 24 a token
def test_pieces_equal_the_recurrence(tokens: int, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CPU_PIECE", piece)
    monkeypatch.setattr(module, "CHUNK", 16)
    inputs = draw(tokens)
    expected = with_grads(one_by_one(*inputs), inputs)
    found = with_grads(scan_in_pieces(*inputs), inputs)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_gradients_equal_finite_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CPU_PIECE", 12 * 4)
    monkeypatch.setattr(module, "CHUNK", 2)
    assert torch.autograd.gradcheck(scan_in_pieces, draw(7, batch=1))


@pytest.mark.parametrize("used", [0, 1])
def test_one_result_alone_has_a_gradient(used: int) -> None:
    inputs = draw(9)
    read = inputs[:4] + inputs[5:] if used else inputs  # the last state does not depend on the queries
    expected = torch.autograd.grad(one_by_one(*inputs)[used].square().sum(), read)
    found = torch.autograd.grad(scan_in_pieces(*inputs)[used].square().sum(), read)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_fast_decays_do_not_spoil_slow_ones_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CPU_PIECE", 24 * 512)
    monkeypatch.setattr(module, "CHUNK", 128)
    exact = draw(1000)
    with torch.no_grad():
        exact[1][:, 100:200] = 1e3  # the state is gone: exp(-1e5), and the sum of rates is 1e5
        exact[1][:, 200:] *= 1e-4
    inputs = [t.detach().float().requires_grad_() for t in exact]
    expected = with_grads(one_by_one(*exact), exact)
    for found, wanted in zip(with_grads(scan_in_pieces(*inputs), inputs), expected, strict=True):
        assert (found - wanted).norm() < 1e-5 * wanted.norm()


def test_backward_under_autocast_stays_exact() -> None:
    inputs = draw(40, torch.float32)
    expected = with_grads(selective_scan(*inputs), inputs)
    with torch.autocast("cpu", torch.bfloat16):
        found = with_grads(selective_scan(*inputs), inputs)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("tokens", [1, 30])
def test_kernel_equals_plain(dtype: torch.dtype, rtol: float, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KERNEL_TOKENS", 2 * (2 * 3 + 8))  # 8 tokens of each of 2 rows, and 2 x 3 for the state
    lengths = []

    def counted(u: Tensor, *rest: Tensor) -> Tensor:
        lengths.append(u.shape[-1])
        y = kernel_stand_in(u, *rest)
        assert isinstance(y, Tensor)
        return y

    inputs = draw(tokens, dtype)
    found = with_grads(scan_by_kernel(counted, *inputs), inputs)
    expected = with_grads(scan_in_pieces(*inputs), inputs)
    torch.testing.assert_close(found, expected, rtol=rtol, atol=rtol)
    assert max(lengths) <= 14
    assert sum(lengths) == tokens + 6 * len(lengths)


def install(monkeypatch: pytest.MonkeyPatch, kernel: object) -> None:
    for name in ("mamba_ssm", "mamba_ssm.ops"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    interface = SimpleNamespace(selective_scan_fn=kernel)
    monkeypatch.setitem(sys.modules, "mamba_ssm.ops.selective_scan_interface", interface)


def test_kernel_is_used_on_cuda_only(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def kernel(u: Tensor, *rest: Tensor) -> Tensor:
        calls.append(u.device.type)
        return u + 0

    monkeypatch.setitem(sys.modules, "mamba_ssm", None)
    assert find_kernel() is None
    install(monkeypatch, kernel)
    assert find_kernel() is kernel
    inputs = draw(5, torch.float32)
    selective_scan(*inputs)
    assert calls == []
    with FakeTensorMode():  # of CUDA tensors it knows the shapes, without a device
        for dtype, expected in ((torch.float64, []), (torch.float32, ["cuda"])):
            y, hidden = selective_scan(*(torch.empty(t.shape, device="cuda", dtype=dtype) for t in inputs))
            assert calls == expected
            assert (y.shape, hidden.shape, y.dtype) == (inputs[0].shape, inputs[-1].shape, dtype)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_equals_cpu() -> None:
    inputs = draw(3000, torch.float32)
    on_cuda = [t.detach().cuda().requires_grad_() for t in inputs]
    expected = with_grads(scan_in_pieces(*inputs), inputs)
    for scan in (scan_in_pieces, selective_scan):  # the second one by the kernel, where it is installed
        results = [t.cpu() for t in with_grads(scan(*on_cuda), on_cuda)]
        torch.testing.assert_close(results, expected, rtol=1e-4, atol=1e-4)
