"""Longformer: a sliding window over the scan order, and global tokens (Beltagy et al. 2020)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gigaxt.config import from_dict
from gigaxt.nn.context.attention import AttentionContext, attention_heads
from gigaxt.nn.context.base import ContextConfig, check_least
from gigaxt.nn.context.global_tokens import NearAttention, NearMixer
from gigaxt.nn.context.layered import Mixer
from gigaxt.nn.context.layers import Run
from gigaxt.nn.context.ordering import Places


@dataclass(kw_only=True)
class LongformerOptions:
    """`context.options` of `kind: longformer`."""

    window: int = 128
    """Tokens before and after itself in the scan order that a token looks at."""
    global_tokens: int = 4
    """Learned tokens that read all tokens and that all tokens read; 0 for the sliding window alone."""

    def __post_init__(self) -> None:
        check_least("context.options", self, window=1, global_tokens=0)


class Longformer(AttentionContext):
    """Longformer (Beltagy et al. 2020, "Longformer: The Long-Document Transformer").

    Each token attends, in one softmax, to `window` tokens before and after it in the scan order and to the global
    tokens; these attend to all tokens and to each other through projections of their own. So far the paper. Ours: the
    global tokens are learned and stand beside the scene's instead of being some of them; they read before they are
    read, so that content crosses the scene within one layer and the last layer's reading is not lost; positions are
    2-D rotary (global tokens have no place, see `NearAttention`); normalisation is ahead of the attention.

    Reach without the summary path: the whole scene, in any layer, but through `global_tokens` vectors only, and at the
    start faintly (one token of 4,096 changes the far corner by 1e-7). With `global_tokens=0` as well a token depends on
    `depth * window` tokens along the scan to both sides and on no others.

    Cost per token: `4 * dim**2` multiplications in projections and `dim * (6 * window + 2 * heads * global_tokens)` in
    the attention. Forward and backward take 3.6 times as long as a pair of linear layers with threefold width (CPU, dim
    256, window 128; 2.7 times where activations are kept). Memory: see `LayeredContext`; keys and values exist for one
    segment at a time and are made again for the `window` tokens ahead of and behind it.
    Blocks of `window` queries go through PyTorch's fused attention with a band as mask. FlexAttention, which could skip
    the third of the scores that the band masks, is not used: whether it is faster on CUDA has not been measured yet
    (`benchmarks/bench_flex.py`).

    Choose it for attention that asks for no lattice and costs little. Along the Hilbert order a window of 128 is about
    the 16 x 16 tokens around, not centred: `window` sees the same square around every token, in 1.6 times the time.
    """

    options_class = LongformerOptions

    @classmethod
    def count_global_tokens(cls, config: ContextConfig) -> int:
        """See `LayeredContext.count_global_tokens`."""
        return _options(config).global_tokens

    def build_mixer(self, config: ContextConfig, gain: float) -> Mixer:
        """See `LayeredContext.build_mixer`."""
        return LongformerMixer(config.dim, attention_heads(config), _options(config), gain)


class LongformerMixer(NearMixer):
    """What is near lies at most `window` tokens away in the scan order."""

    def __init__(self, dim: int, heads: int, options: LongformerOptions, gain: float) -> None:
        super().__init__(dim, heads, options.global_tokens, gain)
        self.window = options.window

    def look_around(self, x: Tensor, global_tokens: Tensor, places: Places, run: Run) -> Tensor:
        """See `NearMixer.look_around`."""
        tokens = x.shape[1]
        window = min(self.window, max(1, tokens - 1))
        alone = not run.recompute or tokens <= run.segment // run.batch  # one segment: nothing lies around it
        halo = 0 if alone else window
        y, _ = run(
            SlidingWindow(self.attention, window, halo),
            (x, places.coords, places.valid),
            shared=(global_tokens,),
            halo=(halo, halo),
            multiple=1 if alone else window,
        )
        assert y is not None
        return y


class SlidingWindow(nn.Module):
    """The attention of one segment of tokens that comes with `halo` tokens more at both ends."""

    def __init__(self, attention: NearAttention, window: int, halo: int) -> None:
        super().__init__()
        self.attention, self.window, self.halo = attention, window, halo

    def forward(self, x: Tensor, coords: Tensor, valid: Tensor, global_tokens: Tensor) -> tuple[Tensor]:
        """`x` (batch, halo + n + halo, dim) and `global_tokens` (batch, g, dim) -> (batch, n, dim)."""
        attention, own = self.attention, slice(self.halo, x.shape[1] - self.halo)
        global_scores, global_key, global_value = attention.of_global_tokens(global_tokens)
        normed = attention.norm(x)
        query = attention.queries(normed[:, own], coords[:, own], global_scores)
        key, value = attention.keys_values(normed, coords, global_tokens.shape[1])

        n, length = query.shape[1], key.shape[1]
        # Of few tokens one block that sees all; else blocks as long as the window, each with those around it.
        block, ahead = (n, self.halo) if length <= 3 * self.window else (self.window, self.window)
        query = _pad(query, 0, -n % block).unflatten(1, (-1, block))
        blocks = query.shape[1]
        near = self._near(block, torch.cat(self._around(valid, blocks), dim=2), ahead)

        def seen(x: Tensor, of_global_tokens: Tensor) -> Tensor:
            """(batch, length, heads, width), (batch, g, heads, width) -> (batch * blocks, keys + g, heads, width)."""
            behind = of_global_tokens.unsqueeze(1).expand(-1, blocks, -1, -1, -1)
            return torch.cat((*self._around(x, blocks), behind), dim=2).flatten(0, 1)

        found = attention.attend(
            query.flatten(0, 1), seen(key, global_key), seen(value, global_value), near.flatten(0, 1)
        )
        # (batch * blocks, block, dim) -> (batch, n, dim)
        found = found.unflatten(0, (-1, blocks)).flatten(1, 2)[:, :n]
        return (x[:, own] + attention.out(found).to(x.dtype),)

    def _around(self, x: Tensor, blocks: int) -> tuple[Tensor, ...]:
        """What each block sees of `x` (batch, length, ...), in parts (batch, blocks, keys, ...) to be joined."""
        if x.shape[1] <= 3 * self.window:
            return (x.unsqueeze(1),)
        before = self.window - self.halo
        after = (blocks + 2) * self.window - before - x.shape[1]
        parts = _pad(x, before, after).unflatten(1, (-1, self.window))
        return parts[:, :-2], parts[:, 1:-1], parts[:, 2:]

    def _near(self, block: int, valid: Tensor, ahead: int) -> Tensor:
        """Which keys the queries of each block look at: (batch, blocks, block, keys) for `valid` (batch, blocks, keys).

        `ahead` keys lie before a block's first query. A query sees itself, valid or not, so that no softmax is empty.
        """
        query = torch.arange(block, device=valid.device).unsqueeze(1) + ahead
        distance = (query - torch.arange(valid.shape[-1], device=valid.device)).abs()
        return (distance <= self.window) & valid.unsqueeze(2) | (distance == 0)


def _pad(x: Tensor, before: int, after: int) -> Tensor:
    """Zeros (False) before and after the tokens of (batch, tokens, ...)."""
    return F.pad(x, (0, 0) * (x.ndim - 2) + (before, after))


def _options(config: ContextConfig) -> LongformerOptions:
    return from_dict(LongformerOptions, config.options, "context.options")
