"""A gradient through a share of the regions: the right regions, unbiased, and no work for the others."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from test_freezing import count_passes
from test_xt import make, scenes
from torch import Tensor

from gigaxt import GigaXT, open_image
from gigaxt.streaming.single import Streaming


def gradients(model: GigaXT, images: Any, seed: int = 0) -> dict[str, Tensor]:
    model.zero_grad()
    model.loss(images, [1] * len(images), seed=seed).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def drawing(monkeypatch: pytest.MonkeyPatch, order: list[int]) -> None:
    monkeypatch.setattr(torch, "randperm", lambda n, **_: torch.tensor(order))


def test_the_mean_over_all_draws_is_the_exact_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of six regions of 2 x 3, all fifteen draws; context and head get the exact gradient in each."""
    model = make("convnext").train().eval()  # no stochastic depth
    image = [open_image(np.random.default_rng(0).integers(1, 255, (120, 180, 3), dtype=np.uint8))]
    exact = gradients(model, image)
    model.grad_share = 2 / 6
    draws = []
    for pair in itertools.combinations(range(6), 2):
        drawing(monkeypatch, [*reversed(pair), *(i for i in range(6) if i not in pair)])
        draws.append(gradients(model, image))
        for name, gradient in draws[-1].items():
            if not name.startswith("encode."):
                torch.testing.assert_close(gradient, exact[name], rtol=1e-10, atol=1e-16)
    for name, gradient in exact.items():
        mean = sum(draw[name] for draw in draws) / len(draws)
        assert (mean - gradient).abs().max() <= 1e-10 * gradient.abs().max(), name
    assert any((draws[0][name] - exact[name]).abs().max() > 1e-3 * exact[name].abs().max() for name in exact)


@pytest.mark.parametrize("streaming", [Streaming(chunk_regions=1), Streaming(chunk_regions=4, budget_gib=1.0)])
def test_the_draw_does_not_depend_on_chunks(streaming: Streaming) -> None:
    model = make("convnext", overview=[2]).train()
    model.grad_share = 0.4
    expected = gradients(model, scenes()[0], seed=5)
    model.streaming = streaming
    for name, gradient in gradients(model, scenes()[0], seed=5).items():
        assert (gradient - expected[name]).abs().max() <= 1e-10 * expected[name].abs().max() + 1e-18
    other = gradients(model, scenes()[0], seed=6)
    name = "encode.project.weight"
    assert (other[name] - expected[name]).abs().max() > 1e-3 * expected[name].abs().max()


def test_all_regions_are_seen_in_their_order() -> None:
    """The published code shuffles regions here (its `grad_ratio`): the answer must not depend on the share."""
    model = make("convnext").train()
    images = scenes()[0]
    expected = model(images, seed=2)
    for share in (0.9, 0.5, 0.01):
        model.grad_share = share
        torch.testing.assert_close(model(images, seed=2), expected, rtol=1e-12, atol=0)


def test_other_regions_are_not_run_again() -> None:
    model = make("convnext").train()
    model.grad_share = 0.3
    counts = count_passes(model)
    n = len(model.batch(scenes()[0]).places)
    gradients(model, [scenes()[0][0], scenes()[0][1]])
    k = round(0.3 * n)
    assert counts == {"forward": n + k, "backward": k}
