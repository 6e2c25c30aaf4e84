"""One direction of Mamba and Mamba-2 against Hugging Face's mixers and against the papers' recurrences."""

from __future__ import annotations

import inspect
from itertools import pairwise
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gigaxt.nn.context.mamba import MambaOptions, MambaStep
from gigaxt.nn.context.mamba2 import Mamba2Options, Mamba2Step
from gigaxt.nn.context.state_space import Direction

DIM, INNER, HEADS, STATE, RANK, TOKENS = 16, 32, 4, 8, 3, 21
OURS = {
    "mamba": ["in_proj.weight", "conv.weight", "conv.bias", "select.weight", "step_proj.weight", "step_bias",
              "log_rate", "skip", "out_proj.weight"],
    "mamba2": ["in_proj.weight", "conv.weight", "conv.bias", "step_bias", "log_rate", "skip", "gated_norm.weight",
               "out_proj.weight"],
}  # fmt: skip
THEIRS = {
    "mamba": ["in_proj.weight", "conv1d.weight", "conv1d.bias", "x_proj.weight", "dt_proj.weight", "dt_proj.bias",
              "A_log", "D", "out_proj.weight"],
    "mamba2": ["in_proj.weight", "conv1d.weight", "conv1d.bias", "dt_bias", "A_log", "D", "norm.weight",
               "out_proj.weight"],
}  # fmt: skip


def ours(kind: str) -> Direction:
    torch.manual_seed(0)
    if kind == "mamba":
        return MambaStep(DIM, MambaOptions(state=STATE, step_rank=RANK), gain=1.0, residual=False)
    return Mamba2Step(DIM, HEADS, Mamba2Options(state=STATE, chunk=8), gain=1.0, residual=False)


def transformers_mixer(kind: str, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """Hugging Face's mixer with random weights, made to take its path in plain PyTorch."""
    transformers = pytest.importorskip("transformers")
    modeling: ModuleType = pytest.importorskip(f"transformers.models.{kind}.modeling_{kind}")
    for name, function in inspect.getmembers(modeling, inspect.isfunction):
        if name != "use_kernelized_func" and function is not inspect.unwrap(function):
            monkeypatch.setattr(modeling, name, inspect.unwrap(function))  # kernels, should they be installed
    common = {"hidden_size": DIM, "state_size": STATE, "expand": 2, "conv_kernel": 4, "num_hidden_layers": 1}
    torch.manual_seed(1)
    if kind == "mamba":
        config = transformers.MambaConfig(**common, time_step_rank=RANK, use_mambapy=False)
        mixer = modeling.MambaMixer(config, layer_idx=0)
    else:
        config = transformers.Mamba2Config(
            **common, num_heads=HEADS, head_dim=INNER // HEADS, n_groups=1, chunk_size=8, layer_norm_epsilon=1e-6
        )
        mixer = modeling.Mamba2Mixer(config, layer_idx=0)
    with torch.no_grad():
        for parameter in mixer.parameters():  # none at a special value
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return mixer.eval()


def slow(mixer: nn.Module, x: Tensor) -> Tensor:
    for name in ("slow_forward", "torch_forward", "forward"):  # transformers before 5 have one of the former
        if hasattr(mixer, name):
            result: Tensor = getattr(mixer, name)(x)
            return result
    raise AssertionError(name)


@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
@pytest.mark.parametrize("bounds", [(0, TOKENS), (0, 1, 3, 12, TOKENS)])
def test_equals_transformers(kind: str, bounds: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32, as theirs computes in it whatever the dtype; ours in strips with the state, too."""
    theirs, mine = transformers_mixer(kind, monkeypatch), ours(kind)
    pairs = [(mine.get_parameter(a), theirs.get_parameter(b)) for a, b in zip(OURS[kind], THEIRS[kind], strict=True)]
    assert len(pairs) + 1 == len(list(mine.parameters()))  # all but the norm ahead, which theirs has outside
    assert len(pairs) == len(list(theirs.parameters()))
    with torch.no_grad():
        for parameter, other in pairs:
            parameter.copy_(other)
    x = torch.randn(2, TOKENS, DIM, generator=torch.Generator().manual_seed(2)).requires_grad_()
    weights = torch.randn(2, TOKENS, DIM, generator=torch.Generator().manual_seed(3))

    assert isinstance(mine.norm, nn.Module)
    expected = slow(theirs, mine.norm(x))
    expected_grads = torch.autograd.grad((expected * weights).sum(), [x, *(other for _, other in pairs)])
    state, parts = mine.start(x), []
    for start, stop in pairwise(bounds):
        part, *state = mine(x[:, start:stop], torch.ones(2, stop - start, dtype=torch.bool), *state)
        parts.append(part)
    y = torch.cat(parts, dim=1)
    grads = torch.autograd.grad((y * weights).sum(), [x, *(parameter for parameter, _ in pairs)])
    for found, wanted in zip((y, *grads), (expected, *expected_grads), strict=True):
        assert (found - wanted).norm() < 2e-6 * wanted.norm()


def mamba_by_token(step: MambaStep, x: Tensor) -> Tensor:
    """The selective recurrence of Gu & Dao 2023 in their block, one token at a time, for one sequence."""
    h, outputs, before = x.new_zeros(INNER, STATE), [], [x.new_zeros(INNER)] * 3
    for token in step.norm(x):
        inside, gate = step.in_proj(token).split(INNER)
        before = [*before[-3:], inside]
        u = F.silu((torch.stack(before, -1) * step.conv.weight[:, 0]).sum(-1) + step.conv.bias)
        low, b, c = (step.select.weight @ u).split([RANK, STATE, STATE])
        delta = F.softplus(step.step_proj.weight @ low + step.step_bias)
        h = (-delta[:, None] * step.log_rate.exp()).exp() * h + (delta * u)[:, None] * b
        outputs.append(step.out_proj((h @ c + step.skip * u) * F.silu(gate)))
    return torch.stack(outputs)


def mamba2_by_token(step: Mamba2Step, x: Tensor) -> Tensor:
    """The scalar-decay recurrence of Dao & Gu 2024 in their block, one token at a time, for one sequence."""
    h, outputs, before = x.new_zeros(HEADS, INNER // HEADS, STATE), [], [x.new_zeros(INNER + 2 * STATE)] * 3
    for token in step.norm(x):
        gate, inside, delta = step.in_proj(token).split([INNER, INNER + 2 * STATE, HEADS])
        before = [*before[-3:], inside]
        mixed = F.silu((torch.stack(before, -1) * step.conv.weight[:, 0]).sum(-1) + step.conv.bias)
        u, b, c = mixed.split([INNER, STATE, STATE])
        u, delta = u.view(HEADS, -1), F.softplus(delta + step.step_bias)
        decay = (-delta * step.log_rate.exp()).exp()
        h = decay[:, None, None] * h + (delta[:, None] * u)[..., None] * b
        y = (h @ c + step.skip[:, None] * u).flatten() * F.silu(gate)
        y = y / (y.square().mean() + 1e-6).sqrt() * step.gated_norm.weight
        outputs.append(step.out_proj(y))
    return torch.stack(outputs)


@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
def test_equals_the_paper_token_by_token(kind: str) -> None:
    """In float64, masked tokens at the end of one row."""
    step = ours(kind).double()
    with torch.no_grad():
        for parameter in step.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    generator = torch.Generator().manual_seed(2)
    x, weights = (torch.randn(2, TOKENS, DIM, dtype=torch.float64, generator=generator) for _ in range(2))
    x.requires_grad_()
    valid = torch.arange(TOKENS) < torch.tensor([[TOKENS], [13]])
    inputs = [x, *step.parameters()]

    y, hidden, tail = step(x, valid, *step.start(x))
    by_token = mamba_by_token if kind == "mamba" else mamba2_by_token
    rows = [by_token(step, x[b, valid[b]]) for b in range(2)]
    expected = torch.cat(rows)
    torch.testing.assert_close(y[valid], expected, rtol=1e-10, atol=1e-12)
    grads = torch.autograd.grad((y * weights)[valid].sum(), inputs)
    expected_grads = torch.autograd.grad((expected * weights[valid]).sum(), inputs)
    torch.testing.assert_close(grads, expected_grads, rtol=1e-9, atol=1e-12)
    # The masked tokens left the state as it was.
    _, hidden_alone, tail_alone = step(x[1:, :13], valid[1:, :13], *step.start(x[1:]))
    torch.testing.assert_close([hidden[1:], tail[1:]], [hidden_alone, tail_alone], rtol=1e-12, atol=1e-14)
