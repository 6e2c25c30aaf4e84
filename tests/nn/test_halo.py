"""Decoding with a halo: no seam at the borders of cores, whatever is at work there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gigaxt.errors import ConfigError
from gigaxt.nn.layout import with_halo
from gigaxt.nn.xt import GigaXT, ModelConfig, build_model

DIM = 12


class Patches(nn.Module):
    """Sees nothing beyond its own patches, so that only the decoder can make seams."""

    map_channels, map_strides, dim = (8, DIM), (4, 8), DIM

    def __init__(self, region: int) -> None:
        super().__init__()
        self.tokens_per_side = region // 32
        self.fine, self.coarse = nn.Conv2d(3, 8, 4, stride=4), nn.Conv2d(3, DIM, 8, stride=8)

    def forward(self, pixels: Tensor) -> tuple[Tensor, list[Tensor]]:
        maps = [self.fine(pixels).tanh(), self.coarse(pixels).tanh()]
        return F.avg_pool2d(maps[1], 4).permute(0, 2, 3, 1), maps


HEADS: dict[str, dict[str, Any]] = {
    "segment": {"kind": "segment", "classes": 3, "dim": 8},
    "points": {"kind": "points", "classes": 2, "dim": 8, "stride": 2},
    "detect": {"kind": "detect", "classes": 2, "dim": 8, "depth": 1, "max_cells": 4.0},
}


def make(head: str, core: int, halo: int, context: str = "none") -> GigaXT:
    """The same weights whatever core and halo are."""
    config = ModelConfig.from_dict(
        {
            "region_encoder": {"name": "convnextv2_atto", "region": core + 2 * halo},
            "context": {"kind": context, "dim": DIM, "depth": 1, "summary": 2},
            "head": HEADS[head],
            "input": {"halo": halo},
        }
    )
    torch.manual_seed(0)
    return build_model(config, region_encoder=Patches(core + 2 * halo)).double().eval()


def answers(model: GigaXT, image: Tensor) -> list[Tensor]:
    with torch.no_grad():
        found = model(image)
    return [found] if isinstance(found, Tensor) else list(found)


@pytest.mark.parametrize("context", ["none", "full"])
@pytest.mark.parametrize("head", HEADS)
def test_cores_are_as_if_the_scene_were_one_region(head: str, context: str) -> None:
    """Exactly, where a halo is as deep as the decoder looks and the context is the same."""
    image = torch.rand(1, 3, 192, 320, dtype=torch.float64)
    whole = answers(make(head, 320, 64, context), image)
    cut = answers(make(head, 64, 64, context), image)
    seams = answers(make(head, 64, 0, context), image)
    for one, some, without in zip(whole, cut, seams, strict=True):
        stride = 192 // one.shape[2]
        own = 64 // stride  # the scene's own border is another matter
        one, some, without = (x[:, :, own:-own, own:-own] for x in (one, some, without))
        torch.testing.assert_close(some, one, rtol=0, atol=1e-12)
        assert (without - one).abs().max() > 1e-3  # there was something to mend


def test_left_out_neighbours_have_no_context() -> None:
    """Of a region whose neighbours are left out, the halo's context is zero; it is still answered for."""
    model = make("segment", 64, 32)
    context = torch.arange(1.0, 5.0).reshape(1, 4, 1).expand(1, 4, DIM)  # one region of 2 x 2 tokens
    grid = model.batch(torch.rand(1, 3, 64, 64, dtype=torch.float64)).scenes[0].grid
    found = with_halo(context, grid, 2, 1)[0, 0, :, 0].reshape(4, 4)
    assert found.tolist() == [[0, 0, 0, 0], [0, 1, 2, 0], [0, 3, 4, 0], [0, 0, 0, 0]]


def test_a_halo_that_cuts_a_cell() -> None:
    config = ModelConfig.from_dict(
        {
            "region_encoder": {"name": "convnextv2_atto", "region": 192},
            "context": {"dim": DIM},
            "head": HEADS["segment"],
            "input": {"halo": 32},
        }
    )
    encoder = Patches(192)
    encoder.map_strides = (4, 64)
    with pytest.raises(ConfigError, match="map_strides"):
        build_model(config, region_encoder=encoder)
