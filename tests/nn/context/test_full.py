from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from gigaxt.nn.context import ContextConfig, build_context
from gigaxt.nn.context.full import FullMixer
from gigaxt.nn.context.layers import Run
from gigaxt.nn.context.ordering import find_places
from gigaxt.nn.context.positions import rotary_angles, rotate
from gigaxt.streaming.rows import Budget
from gigaxt.testing.live_memory import LiveMemory


def dense(mixer: FullMixer, x: Tensor, coords: Tensor) -> Tensor:
    """Attention written out, one row of a batch, one head at a time."""
    attention = mixer.attention
    q, k, v = attention.qkv(attention.norm(x)).chunk(3, dim=-1)
    cos, sin = (t[0] for t in rotary_angles(coords[None], x.shape[-1] // attention.heads))
    found = []
    for q_head, k_head, v_head in zip(*(t.chunk(attention.heads, dim=-1) for t in (q, k, v)), strict=True):
        q_head, k_head = rotate(q_head[None], cos, sin)[0], rotate(k_head[None], cos, sin)[0]
        found.append((q_head @ k_head.T / math.sqrt(q_head.shape[-1])).softmax(-1) @ v_head)
    return x + attention.out(torch.cat(found, dim=-1))


def test_equals_attention_written_out() -> None:
    torch.manual_seed(0)
    mixer = FullMixer(16, 2, gain=1.0).double()
    x = torch.randn(2, 10, 16, dtype=torch.float64)
    coords = torch.rand(2, 10, 2, dtype=torch.float64) * 20
    validity = torch.tensor([[True] * 10, [True] * 7 + [False] * 3])
    places = find_places(coords, validity, "raster", x.device)
    for keep_tokens in (0, 100):
        y, _, state = mixer(places.sort(x), None, places, Run(2, 10, segment=4, keep_tokens=keep_tokens), None)
        assert state is None
        back = places.unsort(y)
        for row, count in ((0, 10), (1, 7)):
            expected = dense(mixer, x[row, :count], coords[row, :count])
            torch.testing.assert_close(back[row, :count], expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", ["full", "hyper"])
def test_heads_keep_what_the_budget_pays_for(kind: str) -> None:
    """Live tensors after the forward pass grow with the budget and by no more; the result is the same."""
    kept, results = [], []
    options = {"exact_below": 0, "block": 16, "samples": 16} if kind == "hyper" else {}
    for budget_mib in (0, 1, 2, 64):
        torch.manual_seed(0)
        config = ContextConfig(
            kind=kind, dim=32, depth=1, heads=8, summary=0, keep_tokens=0, budget_gib=budget_mib / 1024, options=options
        )
        mixer = build_context(config).double().layers[0].mixer
        x = torch.randn(1, 512, 32, dtype=torch.float64, requires_grad=True)
        coords = torch.cartesian_prod(torch.arange(16), torch.arange(32))[None].double()
        places = find_places(coords, None, "raster", x.device)
        run = Run(1, 512, 4096, 0, Budget(config.budget_gib))
        with LiveMemory([x, *mixer.parameters()]) as memory:
            y, _, _ = mixer(x, None, places, run, None)
            kept.append(memory.now / 2**20)
        grads = torch.autograd.grad(y.square().sum(), [x, *mixer.parameters()])
        results.append((y, grads))
        torch.testing.assert_close(results[-1], results[0], rtol=1e-10, atol=1e-12)
    more = [k - kept[0] for k in kept]
    assert 0.4 < more[1] <= 1 < more[2] <= 2 < more[3]
