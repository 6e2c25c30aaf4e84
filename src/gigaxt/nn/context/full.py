"""Full attention: every token looks at every other, at quadratic cost."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from gigaxt.nn.context.attention import AttentionContext, HeadByHead, attention_heads
from gigaxt.nn.context.base import ContextConfig
from gigaxt.nn.context.layered import Mixer
from gigaxt.nn.context.layers import Run
from gigaxt.nn.context.ordering import Places
from gigaxt.nn.context.positions import rotary_angles, rotate
from gigaxt.streaming.recurrence import State


class Full(AttentionContext):
    """Multi-head softmax attention with axial 2-D rotary positions (Vaswani et al. 2017; Su et al. 2021).

    Cost per token: `4 * dim**2` multiplications in projections and `2 * dim * tokens` in the attention. Memory: linear
    through PyTorch's fused kernels; a layer's attention is computed again in the backward pass where
    `config.keep_tokens` says so, and takes about 11 token stores more than `LayeredContext` says while it is at work.
    Choose it up to some ten thousand tokens (100,000 on a large GPU), and as the reference for what the others miss.
    """

    def build_mixer(self, config: ContextConfig, gain: float) -> Mixer:
        """See `LayeredContext.build_mixer`."""
        return FullMixer(config.dim, attention_heads(config), gain)


class FullMixer(Mixer):
    """Adds what attention found to the tokens."""

    def __init__(self, dim: int, heads: int, gain: float) -> None:
        super().__init__()
        self.attention = HeadByHead(dim, heads, gain)

    def forward(
        self, x: Tensor, global_tokens: Tensor | None, places: Places, run: Run, state: State | None
    ) -> tuple[Tensor, Tensor | None, State | None]:
        """See `Mixer`."""
        mask = places.valid[:, None, None, :] if places.ragged else None

        def attend(q: Tensor, k: Tensor, v: Tensor, heads: slice) -> Tensor:
            turn = rotary_angles(places.coords, q.shape[-1])  # made here, so that nothing is kept of it
            return F.scaled_dot_product_attention(rotate(q, *turn), rotate(k, *turn), v, attn_mask=mask)

        return self.attention(x, attend, run), global_tokens, None
