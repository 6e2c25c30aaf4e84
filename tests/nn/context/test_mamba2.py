from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gigaxt.nn.context import ContextConfig, build_context
from gigaxt.nn.context.mamba2 import Mamba2Options, Mamba2Step, initial_rates, segment_sums, state_space_dual


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


@pytest.mark.parametrize(("tokens", "chunk"), [(1, 8), (5, 8), (16, 8), (21, 8), (9, 1)])
def test_dual_form_equals_the_recurrence(tokens: int, chunk: int) -> None:
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
    error = segment_sums(decay)[63, 32] / segment_sums(decay.double())[63, 32] - 1
    assert abs(error) < 1e-5  # as a difference of cumulated sums: 0.3


def test_decay_rates_are_spread_from_one_token_to_the_scene() -> None:
    step = Mamba2Step(64, 6, Mamba2Options(), gain=1.0, residual=True)
    rates = (F.softplus(step.step_bias) * step.log_rate.exp()).detach()
    torch.testing.assert_close(rates, initial_rates(6)[0], rtol=1e-4, atol=0)
    assert rates.max().item() == pytest.approx(1, rel=1e-4)
    assert rates.min().item() == pytest.approx(1e-5, rel=1e-4)


def test_equals_the_mixer_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    modeling = pytest.importorskip("transformers.models.mamba2.modeling_mamba2")
    dim, heads, state = 16, 4, 8
    config = transformers.Mamba2Config(
        hidden_size=dim, num_heads=heads, head_dim=8, state_size=state, expand=2, n_groups=1, conv_kernel=4,
        chunk_size=8, num_hidden_layers=1, use_bias=False, use_conv_bias=True, layer_norm_epsilon=1e-6,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = modeling.Mamba2Mixer(config, layer_idx=0)
    ours = Mamba2Step(dim, heads, Mamba2Options(state=state, chunk=8), gain=1.0, residual=False)
    pairs = [
        (ours.in_proj.weight, theirs.in_proj.weight),
        (ours.conv.weight, theirs.conv1d.weight),
        (ours.conv.bias, theirs.conv1d.bias),
        (ours.step_bias, theirs.dt_bias),
        (ours.log_rate, theirs.A_log),
        (ours.skip, theirs.D),
        (ours.gated_norm.weight, theirs.norm.weight),
        (ours.out_proj.weight, theirs.out_proj.weight),
    ]
    with torch.no_grad():
        for mine, other in pairs:
            mine.copy_(other)
    x = torch.randn(2, 21, dim)
    valid = torch.ones(2, 21, dtype=torch.bool)
    y, _, _ = ours(x, valid, *ours.start(x))
    expected = theirs(ours.norm(x))
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-6)
    weights = torch.randn_like(y)
    (y * weights).sum().backward()
    (expected * weights).sum().backward()
    for mine, other in pairs:
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("keep_tokens", [0, 1000])
def test_continued_by_state_equals_one_pass(keep_tokens: int) -> None:
    torch.manual_seed(0)
    config = ContextConfig(
        dim=8, depth=2, summary=0, bidirectional=False, order="raster", segment=16, keep_tokens=keep_tokens,
        options={"state": 4, "chunk": 4},
    )  # fmt: skip
    encoder = build_context(config).double()
    rows, cols = 9, 5
    coords = torch.stack(torch.meshgrid(torch.arange(rows), torch.arange(cols), indexing="ij"), -1)
    coords = coords.reshape(1, -1, 2).double().expand(2, -1, -1)
    tokens = torch.randn(2, rows * cols, 8, dtype=torch.float64, requires_grad=True)
    # Different numbers of valid tokens in every strip and row; in one fewer than the convolution sees.
    validity = torch.rand(2, rows * cols) > 0.3
    validity[1, 15:20] = torch.tensor([True, False, False, False, False])
    weights = torch.randn(2, rows * cols, 8, dtype=torch.float64)

    whole, whole_state = encoder(tokens, coords, validity)
    whole_grad = torch.autograd.grad((whole * weights).sum(), tokens)
    state, parts = None, []
    for start, stop in ((0, 15), (15, 20), (20, 45)):
        part, state = encoder(tokens[:, start:stop], coords[:, start:stop], validity[:, start:stop], state)
        parts.append(part)
    assert state is not None
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(state, whole_state, rtol=1e-10, atol=1e-12)
    grad = torch.autograd.grad((torch.cat(parts, 1) * weights).sum(), tokens)
    torch.testing.assert_close(grad, whole_grad, rtol=1e-10, atol=1e-12)


def test_causal_tokens_hear_only_of_earlier_ones() -> None:
    torch.manual_seed(0)
    config = ContextConfig(dim=8, depth=1, summary=0, bidirectional=False, order="raster", options={"state": 4})
    encoder = build_context(config).double()
    tokens = torch.randn(1, 12, 8, dtype=torch.float64, requires_grad=True)
    coords = torch.stack((torch.zeros(12), torch.arange(12)), dim=-1)[None]
    y, _ = encoder(tokens, coords)
    (grad,) = torch.autograd.grad(y[:, 5].square().sum(), tokens)
    assert grad[0, :6].abs().amax(-1).min() > 0
    assert grad[0, 6:].abs().max() == 0


def test_bfloat16_autocast_is_near() -> None:
    torch.manual_seed(0)
    encoder = build_context(ContextConfig(dim=32, depth=1, summary=4, options={"state": 8}))
    tokens = torch.randn(1, 300, 32)
    coords = torch.stack((torch.arange(300) // 20, torch.arange(300) % 20), dim=-1)[None].float()
    exact, _ = encoder(tokens, coords)
    with torch.autocast("cpu", torch.bfloat16):
        y, _ = encoder(tokens.bfloat16(), coords)
    assert y.dtype == torch.bfloat16
    assert (y - exact).norm() / exact.norm() < 0.02
    assert math.isfinite(y.sum().item())
