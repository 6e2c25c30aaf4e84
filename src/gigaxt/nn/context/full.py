"""Full attention: every token looks at every other, at quadratic cost."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gigaxt.errors import ConfigError
from gigaxt.nn.context.base import ContextConfig
from gigaxt.nn.context.layered import LayeredContext, Mixer
from gigaxt.nn.context.layers import Norm, Run, largest_divisor, linear, split_heads
from gigaxt.nn.context.ordering import Places
from gigaxt.nn.context.positions import rotary_angles, rotate
from gigaxt.recurrence import State


class Full(LayeredContext):
    """Multi-head softmax attention with axial 2-D rotary positions (Vaswani et al. 2017; Su et al. 2021).

    Cost per token: `4 * dim**2` multiplications in projections and `2 * dim * tokens` in the attention. Memory: linear
    through PyTorch's fused kernels; a layer's attention is computed again in the backward pass where
    `config.keep_tokens` says so, and takes about 11 token stores more than `LayeredContext` says while it is at work.
    Choose it up to some ten thousand tokens (100,000 on a large GPU), and as the reference for what the others miss.
    """

    fourier_positions = False
    recurrent = False

    @classmethod
    def check_config(cls, config: ContextConfig) -> None:
        """See `ContextEncoder.check_config`."""
        super().check_config(config)
        heads = _heads(config)
        if config.dim % (4 * heads):
            raise ConfigError(
                f"context.heads: full attention needs `dim` divisible by 4 x heads (2-D rotary positions), got dim "
                f"{config.dim} and {heads} heads"
            )

    def build_mixer(self, config: ContextConfig, gain: float) -> Mixer:
        """See `LayeredContext.build_mixer`."""
        return FullMixer(config.dim, _heads(config), gain)


class FullMixer(Mixer):
    """Adds what attention found to the tokens."""

    def __init__(self, dim: int, heads: int, gain: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.qkv = Norm(dim), linear(dim, 3 * dim)
        self.out = linear(dim, dim, gain, bias=True)

    def forward(self, x: Tensor, places: Places, run: Run, state: State | None) -> tuple[Tensor, State | None]:
        """See `Mixer`."""
        mask = places.valid[:, None, None, :] if places.ragged else None
        if run.recompute:
            y: Tensor = checkpoint(self.attend, x, places.coords, mask, use_reentrant=False, preserve_rng_state=False)
            return y, None
        return self.attend(x, places.coords, mask), None

    def attend(self, x: Tensor, coords: Tensor, mask: Tensor | None) -> Tensor:
        """`x` (batch, n, dim) plus attention; `mask` (batch, 1, 1, n) is True where a token may be looked at."""
        q, k, v = (split_heads(t, self.heads) for t in self.qkv(self.norm(x)).chunk(3, dim=-1))
        cos, sin = rotary_angles(coords, q.shape[-1])
        found = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, attn_mask=mask)
        # (batch, heads, n, head_dim) -> (batch, n, dim)
        y: Tensor = x + self.out(found.transpose(1, 2).flatten(2)).to(x.dtype)
        return y


def _heads(config: ContextConfig) -> int:
    return config.heads or largest_divisor(config.dim, max(1, config.dim // 32))
