"""Where a token lies: Fourier features for state-space models, axial rotary angles for attention."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

LONGEST_WAVE = 2.0**14
"""Tokens; 2**14 tokens of stride 32 are a scene of 524,288 px."""


class FourierPositions(nn.Module):
    """Sines and cosines of row and column at fixed wavelengths from 2 tokens to the largest scene, projected to `dim`.

    The wavelengths do not depend on the scene, so a strip of it gets the same features as the whole.
    """

    def __init__(self, dim: int, waves: int = 16) -> None:
        super().__init__()
        self.waves = waves
        self.project = nn.Linear(4 * waves, dim)
        nn.init.normal_(self.project.weight, std=0.2 / math.sqrt(2 * waves))  # a fifth of the normalised tokens
        nn.init.zeros_(self.project.bias)

    def forward(self, coords: Tensor) -> Tensor:
        """(batch, tokens, 2) as (row, col) -> (batch, tokens, dim)."""
        dtype = torch.promote_types(coords.dtype, torch.float32)
        # Made here and not kept as a buffer, which model.to(torch.bfloat16) would round.
        octaves = torch.linspace(1, math.log2(LONGEST_WAVE), self.waves, dtype=dtype, device=coords.device)
        # (batch, tokens, 2) -> (batch, tokens, 2, waves)
        angles = coords.to(dtype).unsqueeze(-1) * (2 * math.pi * 2**-octaves)
        features = torch.cat((angles.sin(), angles.cos()), dim=-1).flatten(2)
        result: Tensor = self.project(features.to(self.project.weight.dtype))
        return result


def rotary_angles(coords: Tensor, head_dim: int, base: float = 1000.0) -> tuple[Tensor, Tensor]:
    """Cosines and sines for `rotate`: the first half of a head's pairs turn with the row, the second with the column.

    Args:
        coords: (batch, tokens, 2) as (row, col).
        head_dim: a multiple of 4.
        base: the slowest pair turns by about 1 / base rad a token; 1000 tells places apart over scenes of some
            thousand tokens a side.

    Returns:
        Two tensors (batch, 1, tokens, head_dim / 2), in float32 or better.
    """
    dtype = torch.promote_types(coords.dtype, torch.float32)
    steps = torch.arange(head_dim // 4, device=coords.device, dtype=dtype) / (head_dim // 4)
    # (batch, tokens, 2) -> (batch, tokens, 2, head_dim / 4) -> (batch, 1, tokens, head_dim / 2)
    angles = (coords.to(dtype).unsqueeze(-1) * base**-steps).flatten(2).unsqueeze(1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn pairs (i, i + head_dim / 2) of `x` (batch, heads, tokens, head_dim); computed in float32 or better."""
    a, b = x.to(torch.promote_types(x.dtype, cos.dtype)).chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).to(x.dtype)
