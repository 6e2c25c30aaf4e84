from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from gigaxt.errors import ConfigError
from gigaxt.nn.context import ContextConfig
from gigaxt.nn.context.mamba import MambaOptions, MambaStep


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"heads": 4}, "context.heads: `mamba` has none, got 4"),
        ({"options": {"step_rank": 0}}, "context.options.step_rank: expected at least 1, got 0"),
        ({"options": {"state": 0}}, "context.options.state: expected at least 1, got 0"),
        ({"options": {"conv": 1}}, "context.options.conv: expected at least 2, got 1"),
        ({"options": {"chunk": 8}}, "context.options.chunk: unknown key"),
    ],
)
def test_config_refuses(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ContextConfig(kind="mamba", **settings)
    assert message in str(caught.value)


def test_options_set_the_sizes() -> None:
    step = MambaStep(40, MambaOptions(expand=3, state=5, conv=2), gain=1.0, residual=True)
    assert step.log_rate.shape == (120, 5)
    assert step.step_proj.weight.shape == (120, 3)  # 40 / 16, rounded up
    assert step.conv.weight.shape == (120, 1, 2)
    assert MambaStep(40, MambaOptions(step_rank=7), gain=1.0, residual=True).step_proj.in_features == 7


def test_decay_rates_are_spread_from_one_token_to_the_scene() -> None:
    step = MambaStep(32, MambaOptions(), gain=1.0, residual=True)
    rates = (F.softplus(step.step_bias).unsqueeze(-1) * step.log_rate.exp()).detach()  # (inner, state)
    assert rates.max().item() == pytest.approx(1, rel=1e-4)
    assert rates.min().item() == pytest.approx(1e-5, rel=1e-4)
    ratios = rates[:-1] / rates[1:]
    assert ratios.min() > 1
    assert ratios.max() < 1.3


def test_channels_hold_means_over_their_reach() -> None:
    torch.manual_seed(0)
    step = MambaStep(32, MambaOptions(), gain=1.0, residual=True)
    x = torch.ones(1, 3000, 32)
    with torch.no_grad():
        step.step_proj.weight.zero_()  # so that every token has its channel's own step
        mixed, _ = step.conv(step.in_proj(step.norm(x)).chunk(2, dim=-1)[0], x[..., 0] > 0, step.start(x)[1])
        _, keys, _ = step.select(mixed).split([step.rank, 16, 16], dim=-1)
        _, hidden, _ = step(x, x[..., 0] > 0, *step.start(x))
    steps = F.softplus(step.step_bias.detach())
    mean = mixed[0, -1, :, None] * keys[0, -1]  # (inner, state), of tokens that are all alike
    expected = mean * (steps / -(-steps).expm1()).unsqueeze(-1)  # a factor from 1.6 for the fastest channel to 1
    reached = steps > 1e-2  # by the 3000 tokens
    assert 20 < reached.sum() < 40
    torch.testing.assert_close(hidden[0, reached], expected[reached], rtol=1e-3, atol=1e-4)


def test_mixer_is_heard_at_the_start() -> None:
    torch.manual_seed(0)
    step = MambaStep(64, MambaOptions(), gain=0.2, residual=False)
    x = torch.randn(1, 500, 64)
    y, *_ = step(x, torch.ones(1, 500, dtype=torch.bool), *step.start(x))
    assert 0.1 < y.std() < 0.4


def test_bfloat16_autocast_keeps_slow_rates() -> None:
    torch.manual_seed(0)
    step = MambaStep(32, MambaOptions(), gain=1.0, residual=True)
    x = torch.randn(1, 400, 32)
    valid = torch.ones(1, 400, dtype=torch.bool)
    with torch.no_grad():
        _, exact, _ = step(x, valid, *step.start(x))
        with torch.autocast("cpu", torch.bfloat16):
            _, hidden, _ = step(x, valid, *step.start(x))
    slow = F.softplus(step.step_bias) < 1e-3
    error = (hidden - exact)[0, slow].norm() / exact[0, slow].norm()
    assert error < 5e-3  # with the bias in bfloat16: 0.013
