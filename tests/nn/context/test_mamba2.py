from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gigaxt.nn.context import mamba2
from gigaxt.nn.context.mamba2 import Mamba2Options, Mamba2Step, decay_between, state_space_dual
from gigaxt.nn.context.state_space import initial_rates


def step_by_step(x: Tensor, decay: Tensor, keys: Tensor, queries: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """The recurrence as the paper defines it, one token at a time."""
    outputs = []
    for t in range(x.shape[1]):
        h = h * decay[:, t, :, None, None].exp() + x[:, t, :, :, None] * keys[:, t, None, None, :]
        outputs.append((h * queries[:, t, None, None, :]).sum(-1))
    return torch.stack(outputs, dim=1), h


def draw(tokens: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(tokens)
    b, heads, p, n = 2, 3, 4, 5
    x, keys, queries, h = (
        torch.randn(*shape, dtype=torch.float64, generator=generator)
        for shape in ((b, tokens, heads, p), (b, tokens, n), (b, tokens, n), (b, heads, p, n))
    )
    decay = -torch.rand(b, tokens, heads, dtype=torch.float64, generator=generator) * torch.tensor([3.0, 0.1, 1e-5])
    return tuple(t.to(dtype).requires_grad_() for t in (x, decay, keys, queries, h))


@pytest.mark.parametrize(("tokens", "chunk"), [(1, 8), (5, 8), (16, 8), (21, 8), (9, 1), (33, 8), (35, 2)])
def test_dual_form_equals_the_recurrence(tokens: int, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mamba2, "CPU_BLOCK", 4)
    args = draw(tokens)
    expected_y, expected_h = step_by_step(*args)
    y, h = state_space_dual(*args, chunk=chunk)
    torch.testing.assert_close([y, h], [expected_y, expected_h], rtol=1e-10, atol=1e-12)
    weights = torch.randn_like(y), torch.randn_like(h)
    grads = torch.autograd.grad((y * weights[0]).sum() + (h * weights[1]).sum(), args)
    expected = torch.autograd.grad((expected_y * weights[0]).sum() + (expected_h * weights[1]).sum(), args)
    torch.testing.assert_close(grads, expected, rtol=1e-10, atol=1e-11)


def test_small_decays_survive_float32_after_large_ones() -> None:
    decay = torch.full((64,), -50.0)
    decay[32:] = -1e-5
    lost, exact = 1 - decay_between(decay)[63, 32], 1 - decay_between(decay.double())[63, 32]  # 31e-5
    assert abs(lost / exact - 1) < 1e-3  # as a difference of cumulated sums: 0.3


def test_fast_decays_do_not_spoil_slow_ones_in_float32() -> None:
    exact = draw(192)
    with torch.no_grad():
        exact[1][:, :32] -= 50
        exact[1][:, 32:] *= 1e-3
    inputs = [t.detach().float() for t in exact]
    for found, wanted in zip(state_space_dual(*inputs, chunk=64), step_by_step(*exact), strict=True):
        assert (found - wanted).norm() < 2e-6 * wanted.norm()


def test_decay_rates_are_spread_from_one_token_to_the_scene() -> None:
    step = Mamba2Step(64, 6, Mamba2Options(), gain=1.0, residual=True)
    rates = (F.softplus(step.step_bias) * step.log_rate.exp()).detach()
    torch.testing.assert_close(rates, initial_rates(6), rtol=1e-4, atol=0)
    assert rates.max().item() == pytest.approx(1, rel=1e-4)
    assert rates.min().item() == pytest.approx(1e-5, rel=1e-4)
