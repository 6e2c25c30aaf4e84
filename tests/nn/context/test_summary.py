from __future__ import annotations

import torch

from gigaxt.nn.context.layers import Run, split_heads
from gigaxt.nn.context.summary import Read, Summary


def read_plainly(read: Read, x: torch.Tensor, valid: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    key, value = (split_heads(t, read.heads) for t in read.key_value(read.norm(x)).chunk(2, dim=-1))
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    return scores.masked_fill(~valid[:, None, None], -torch.inf).softmax(-1) @ value


def test_softmax_in_segments_equals_softmax() -> None:
    torch.manual_seed(0)
    read = Read(8, 2).double()
    x = torch.randn(2, 23, 8, dtype=torch.float64, requires_grad=True)
    query = (100 * torch.randn(2, 2, 3, 4, dtype=torch.float64)).requires_grad_()
    valid = torch.rand(2, 23) > 0.3
    valid[0, :12] = False  # whole segments masked, the first ones
    leaves = [x, query, *read.parameters()]
    weights = torch.randn(2, 2, 3, 4, dtype=torch.float64)

    expected = read_plainly(read, x, valid, query)
    expected_grads = torch.autograd.grad((expected * weights).sum(), leaves)
    for keep_tokens in (0, 1000):
        run = Run(2, 23, segment=10, keep_tokens=keep_tokens)
        _, (_, total, weighted) = run(read, (x, valid), read.start(query), shared=(query,))
        torch.testing.assert_close(weighted / total, expected, rtol=1e-10, atol=1e-12)
        grads = torch.autograd.grad(((weighted / total) * weights).sum(), leaves)
        torch.testing.assert_close(grads, expected_grads, rtol=1e-9, atol=1e-11)


def test_all_latents_hear_of_every_token() -> None:
    torch.manual_seed(0)
    summary = Summary(8, 2, gain=0.5).double()
    x = torch.randn(1, 20, 8, dtype=torch.float64, requires_grad=True)
    latents, memory = summary(
        x, torch.ones(1, 20, dtype=torch.bool), torch.randn(1, 3, 8, dtype=torch.float64), Run(1, 20, 6, 0)
    )
    assert latents.shape == (1, 3, 8)
    assert [m.shape for m in memory] == [(1, 2, 3, 4)] * 2
    for latent in latents[0]:
        (grad,) = torch.autograd.grad(latent.square().sum(), x, retain_graph=True)
        assert grad.abs().amax(-1).min() > 1e-6
