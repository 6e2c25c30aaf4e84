from __future__ import annotations

import math

import torch
from torch import Tensor

from gigaxt.nn.context.full import FullMixer
from gigaxt.nn.context.layers import Run
from gigaxt.nn.context.ordering import find_places
from gigaxt.nn.context.positions import rotary_angles, rotate


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
