"""Pixels of one region are heard at the far corner of a scene of 64 x 64 regions, at default initialisation."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

from gigaxt import GigaXT, ModelConfig, build_model
from gigaxt.nn.context import ContextConfig, build_context

SIDE = 64
"""Regions along a side of the scene; 32 px and one token each."""
CORNERS = ((0, -1), (-1, 0))
"""Where pixels change, where it is heard: regions in row-major order."""


@cache
def encoded() -> tuple[GigaXT, Tensor, Tensor]:
    """A model, the pixels of all regions and their tokens (1, regions, dim)."""
    torch.manual_seed(0)
    encoder = {"name": "convnext_atto", "region": 32, "options": {"depths": [1, 1, 1, 1], "dims": [4, 8, 16, 32]}}
    config = {
        "region_encoder": encoder,
        "context": {"kind": "none", "dim": 32},
        "head": {"kind": "segment", "classes": 2},
    }
    model = build_model(ModelConfig.from_dict(config)).double().eval()
    pixels = torch.rand(SIDE**2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        tokens = torch.cat([tokens_of(model, part) for part in pixels.split(512)])
    return model, pixels, tokens.flatten(0, 1)[None]


def tokens_of(model: GigaXT, pixels: Tensor) -> Tensor:
    """Pixels (n, 3, 32, 32) to tokens (n, 1, dim)."""
    n = len(pixels)
    loaded = {
        "pixels": pixels.permute(0, 2, 3, 1),
        "valid": torch.ones(n, 32, 32, 1, dtype=torch.bool),
        "scale": torch.ones(n, 3),
        "shift": torch.zeros(n, 3),
        "level": torch.zeros(n, dtype=torch.long),
    }
    tokens: Tensor = model.encode(loaded)[0]
    return tokens


def influence(**settings: object) -> list[tuple[float, float]]:
    """From the first region to the last and back.

    Relative change of the context there, and gradient of the pixels here over that of the pixels there.
    """
    model, pixels, tokens = encoded()
    torch.manual_seed(1)
    context = build_context(ContextConfig(dim=32, **settings)).double()
    coords = torch.cartesian_prod(torch.arange(SIDE), torch.arange(SIDE))[None]
    leaf = tokens.clone().requires_grad_()
    joined, _ = context(leaf, coords)
    found = []
    for here, there in CORNERS:
        changed = tokens.clone()
        with torch.no_grad():
            changed[:, here] = tokens_of(model, torch.rand_like(pixels[:1]))[:, 0]
            heard, _ = context(changed, coords)
        change = (heard - joined)[:, there].norm() / joined[:, there].norm()
        (grad,) = torch.autograd.grad(joined[:, there].sin().sum(), leaf, retain_graph=True)
        sizes = []
        for region in (here, there):
            own = pixels[region][None].clone().requires_grad_()
            tokens_of(model, own)[:, 0].backward(grad[:, region])
            assert own.grad is not None
            sizes.append(own.grad.norm())
        found.append((change.item(), (sizes[0] / sizes[1]).item()))
    return found


@pytest.mark.parametrize("kind", ["full", "hyper", "longformer", "mamba", "mamba2", "window", "xl"])
def test_far_corner_hears_of_a_change(kind: str) -> None:
    for change, gradient in influence(kind=kind):
        assert change > 1e-6
        assert gradient > 1e-6


def test_none_hears_of_nothing() -> None:
    assert influence(kind="none") == [(0.0, 0.0)] * 2
