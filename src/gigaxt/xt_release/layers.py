"""The release's attention and Mamba layers. Parameters have their published names."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gigaxt.nn.context.layers import Norm, split_heads
from gigaxt.nn.context.selective_scan import selective_scan
from gigaxt.nn.context.state_space import CausalConvolution, inverse_softplus

EPS = 1e-5
"""Of all its norms; 1e-6 in RMS norms, their usual value, moves logits by 3e-5 (Q7)."""


class AttentionLayer(nn.Module):
    """Pre-norm attention and gated MLP, as in LLaMA but with GELU (Q6).

    Args:
        dim: width of the tokens.
        hidden: of the MLP.
        causal: heads of 128 channels (or a few more, Q1), each token told of those before it (`attention_method:
            hyper`); else heads of one channel, told of all (`naive`, Q5: an argument bound to the wrong name).
    """

    def __init__(self, dim: int, hidden: int, *, causal: bool) -> None:
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = Norm(dim), Norm(dim)
        self.input_layernorm.eps = self.post_attention_layernorm.eps = EPS
        self.attn = Attention(dim, dim // 128 if causal else dim, causal=causal)
        self.mlp = GatedMlp(dim, hidden)

    def forward(self, x: Tensor, last: bool) -> Tensor:
        """(batch, n, dim) -> the same shape, or with `last` the last token only: (batch, 1, dim)."""
        found = self.attn(self.input_layernorm(x), last).to(x.dtype)
        x = (x[:, -1:] if last else x) + found
        y: Tensor = x + self.mlp(self.post_attention_layernorm(x)).to(x.dtype)
        return y


class Attention(nn.Module):
    """Exact softmax attention."""

    def __init__(self, dim: int, heads: int, *, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        # Below 128 channels the wrong argument of Q5 is 0 and switches the bias off.
        self.qkv = nn.Linear(dim, 3 * dim, bias=dim >= 128)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, last: bool) -> Tensor:
        """Normed tokens (batch, n, dim) -> what all, or with `last` only the last one, find in them."""
        q, k, v = (split_heads(t, self.heads) for t in self.qkv(x).chunk(3, dim=-1))
        if last:
            q = q[:, :, -1:]
        found = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal and not last)
        y: Tensor = self.proj(found.transpose(1, 2).flatten(2))  # (batch, heads, n, head_dim) -> (batch, n, dim)
        return y


class GatedMlp(nn.Module):
    """Two linear layers, one of them a gate."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(dim, hidden, bias=False), nn.Linear(dim, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) -> (..., dim)."""
        y: Tensor = self.down_proj(F.gelu(self.gate_proj(x)) * self.up_proj(x))
        return y


class MambaLayer(nn.Module):
    """Mamba whose residual path holds the normed tokens (Q3).

    Args:
        dim: width of the tokens.
        reverse: run from the last token, the class token, to the first (every even layer, Q4).
    """

    def __init__(self, dim: int, *, reverse: bool) -> None:
        super().__init__()
        self.reverse = reverse
        self.norm, self.mixer = nn.LayerNorm(dim, eps=EPS), MambaMixer(dim)

    def forward(self, x: Tensor, last: bool) -> Tensor:
        """(batch, n, dim) -> the same shape, or with `last` the last token only: (batch, 1, dim)."""
        y = self.norm(x.flip(1) if self.reverse else x)
        y = y + self.mixer(y).to(y.dtype)
        found: Tensor = y.flip(1) if self.reverse else y
        return found[:, -1:] if last else found


class MambaMixer(nn.Module):
    """Mamba (Gu & Dao 2023) as `mamba_ssm` has it, forwards, from an empty state; the scan in float32 or better."""

    def __init__(self, dim: int, state: int = 16, conv: int = 4, expand: int = 2) -> None:
        super().__init__()
        inner, rank = expand * dim, math.ceil(dim / 16)
        self.sizes = [rank, state, state]
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False)
        self.conv1d = CausalConvolution(inner, conv)
        self.x_proj = nn.Linear(inner, sum(self.sizes), bias=False)
        self.dt_proj = nn.Linear(rank, inner)
        self.A_log = nn.Parameter(torch.arange(1.0, state + 1).log().repeat(inner, 1))
        self.D = nn.Parameter(torch.ones(inner))
        self.A_log._no_weight_decay = True  # type: ignore[attr-defined]  # read by gigaxt.training.optim
        self.out_proj = nn.Linear(inner, dim, bias=False)
        with torch.no_grad():  # steps from 0.001 to 0.1
            self.dt_proj.bias.copy_(inverse_softplus(torch.logspace(-3, -1, inner)))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, n, dim) -> what is found, the same shape."""
        mixed, gate = self.in_proj(x).chunk(2, dim=-1)  # (batch, n, inner) each
        start = self.conv1d.start(mixed)
        mixed, _ = self.conv1d(mixed, torch.ones(x.shape[:2], dtype=torch.bool, device=x.device), start)
        step, keys, queries = self.x_proj(mixed).split(self.sizes, dim=-1)
        dtype = mixed.dtype
        step = F.softplus(F.linear(step, self.dt_proj.weight).to(dtype) + self.dt_proj.bias)
        empty = mixed.new_zeros(len(x), *self.A_log.shape)  # (batch, inner, state)
        y, _ = selective_scan(mixed, step, self.A_log.to(dtype).exp(), keys.to(dtype), queries.to(dtype), empty)
        found: Tensor = self.out_proj((y + self.D * mixed) * F.silu(gate))
        return found
