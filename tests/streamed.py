"""The loss of a model and its gradients, streamed against in memory; passes over the region encoder are counted."""

from __future__ import annotations

from typing import Any

import torch

from gigaxt import GigaXT, Streaming

BUDGETS = [
    Streaming(chunk_regions=2),
    Streaming(chunk_regions=2, host_gib=1.0),
    Streaming(chunk_regions=5, budget_gib=1.0),
]
"""Nothing kept, feature maps on the host, all kept."""


def assert_streamed_exactly(model: GigaXT, image: Any, target: Any, streaming: Streaming) -> int:
    """Loss and every gradient equal those with all in memory (float64).

    Returns:
        How many regions went through the encoder in the forward direction.
    """
    found = []
    for setting in (Streaming(budget_gib=None, chunk_regions=100), streaming):
        seen: list[int] = []
        handle = model.encode.encoder.register_forward_hook(lambda m, x, y, seen=seen: seen.append(len(x[0])))
        model.streaming = setting
        model.zero_grad()
        loss = model([image], [target], seed=0)
        loss.backward()
        handle.remove()
        found.append([loss.detach(), *(p.grad for p in model.parameters())])
    for expected, streamed in zip(*found, strict=True):
        assert torch.isfinite(streamed).all()
        assert (expected - streamed).abs().max() <= 1e-10 * expected.abs().max()
    return sum(seen)
