"""Swin V2's window attention without keeping its scores, bias and shift mask included.

timm writes the attention out: scores, scaled, biased, masked, softmax, each a tensor of (windows, heads, cells, cells)
that autograd keeps. With q' = scale * q / |q| and k' = k / |k| the cosine attention of Swin V2 is an ordinary one,
softmax(q' k'^T + bias) v. On CUDA a fused kernel of PyTorch computes that; on a CPU, where none has a gradient of the
bias, a few windows at a time are computed in the cache, and again in the backward pass.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import torch
from timm.models.swin_transformer_v2 import WindowAttention
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from gigaxt.streaming.rows import at_least_float32

LARGEST_SCALE = 100.0
"""Swin V2 clamps its learnt scale there."""
LARGEST_BIAS = 16.0
SCORES_AT_ONCE = 2**18
"""Numbers of a block of scores that stay in a core's cache, on a CPU."""


def fuse_window_attention(module: nn.Module) -> None:
    """Make every Swin V2 attention below `module` a `FusedWindowAttention`, in place.

    The class alone changes: parameters, buffers, hooks and their names stay, and copies and pickles follow.
    """
    for child in module.modules():
        if type(child) is WindowAttention:
            child.__class__ = FusedWindowAttention


class FusedWindowAttention(WindowAttention):
    """timm's, but where attention drops out: then its own forward runs."""

    fused_attn = True
    """As in timm's other attentions. `key_dropout` sets it to False where attention drops out, which is not keyed in a
    kernel."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend within windows.

        Args:
            x: (images * w, cells, dim), the w windows of an image side by side.
            mask: of shifted windows, (w, cells, cells), added to the scores; None: none.

        Returns:
            (images * w, cells, dim).
        """
        if not self.fused_attn:
            found: Tensor = super().forward(x, mask)
            return found
        windows, cells, dim = x.shape
        parts = (self.q_bias, cast(Tensor, self.k_bias), self.v_bias)  # all None without `qkv_bias`
        qkv_bias = None if self.q_bias is None else torch.cat(parts)
        # (windows, cells, 3 * dim) -> (windows, cells, 3, heads, d) -> three of (windows, heads, cells, d)
        qkv = F.linear(x, self.qkv.weight, qkv_bias).unflatten(2, (3, self.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        scale = self.logit_scale.clamp(max=math.log(LARGEST_SCALE)).exp()  # (heads, 1, 1)
        # Rounded last: one over a small norm is infinite in float16.
        q, k = (q * (scale * _one_over_norm(q))).to(v.dtype), (k * _one_over_norm(k)).to(v.dtype)
        attended = attend(q, k, v, self.position_bias(), mask)
        attended = attended.transpose(1, 2).reshape(windows, cells, dim)  # from (windows, heads, cells, d)
        out: Tensor = self.proj_drop(self.proj(attended))
        return out

    def position_bias(self) -> Tensor:
        """(heads, cells, cells), 0 to 16: of each pair of cells of a window, by where they lie to each other."""
        table = LARGEST_BIAS * self.cpb_mlp(self.relative_coords_table).flatten(0, -2).sigmoid()  # (places, heads)
        table = table.to(at_least_float32(table.dtype)).T.contiguous()  # adds up its gradient four times as fast so
        pairs = cast(Tensor, self.relative_position_index)  # (cells, cells)
        bias: Tensor = table.index_select(1, pairs.flatten()).unflatten(1, pairs.shape)
        return bias


def _one_over_norm(x: Tensor) -> Tensor:
    """(..., d) -> (..., 1), in float32 or better; where x is nearly zero as `F.normalize` has it."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=at_least_float32(x.dtype))
    one_over: Tensor = norm.clamp(min=1e-12).reciprocal()
    return one_over


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q k^T + bias + mask) v of each window, with a gradient of the bias.

    Args:
        q: (images * w, heads, cells, d), the w windows of an image side by side.
        k: as q.
        v: as q.
        bias: (heads, cells, cells), the same for all windows.
        mask: (w, cells, cells), which takes no gradient; None: none.
    """
    # A compiler is given the plain form: it cannot look into the other.
    if _kernel_takes_bias(q) or torch.compiler.is_compiling():
        return _attend_in_one(q, k, v, bias, mask)
    found: Tensor = _BlockedAttention.apply(q, k, v, bias, mask)
    return found


def _kernel_takes_bias(q: Tensor) -> bool:
    """Whether a fused kernel of this device takes a bias that needs a gradient."""
    return q.is_cuda or q.is_meta  # of meta tensors, which hold no numbers, only shapes are asked


def _attend_in_one(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor | None) -> Tensor:
    """`attend` by one call, which is given bias and mask of all windows of an image."""
    w = 1 if mask is None else len(mask)
    if mask is not None:
        bias = (bias + mask.unsqueeze(1)).flatten(0, 1)  # (w, heads, cells, cells) -> (w * heads, cells, cells)
    # (images * w, heads, cells, d) -> (images, w * heads, cells, d): one bias serves all images, unrepeated.
    q, k, v = (x.unflatten(0, (-1, w)).flatten(1, 2) for x in (q, k, v))
    attended = F.scaled_dot_product_attention(q, k, v, bias.to(v.dtype).unsqueeze(0), scale=1.0)
    of_windows: Tensor = attended.unflatten(1, (w, -1)).flatten(0, 1)  # -> (images * w, heads, cells, d)
    return of_windows


class _BlockedAttention(torch.autograd.Function):
    """`attend`, some windows or heads at a time. Scores are computed again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = (x.contiguous() for x in (q, k, v))
        ctx.save_for_backward(q, k, v, bias, mask)
        bias = bias.detach()  # the flash kernel for CPUs takes no bias that asks for a gradient
        with torch.autocast(q.device.type, enabled=False):
            if mask is None:
                return F.scaled_dot_product_attention(q, k, v, bias.to(q.dtype).unsqueeze(0), scale=1.0)
            attended = torch.empty_like(v)
            for block in _blocks(bias.shape, len(q)):
                at, added = block.at, block.bias_and_mask(bias, mask).to(q.dtype)
                attended[at] = F.scaled_dot_product_attention(q[at], k[at], v[at], added, scale=1.0)
            return attended

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, bias, mask = ctx.saved_tensors
        with torch.autocast(grad.device.type, enabled=False):
            return *_gradients(q, k, v, bias, mask, grad.contiguous()), None


def _gradients(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor | None, grad: Tensor) -> tuple[Tensor, ...]:
    """Of q, k, v and bias. Softmax and sums in float32 or better: scores of up to 116 lose too much in bfloat16."""
    found = [torch.empty_like(t) for t in (q, k, v)]
    wide = at_least_float32(bias.dtype)
    grad_bias = torch.zeros_like(bias, dtype=wide)
    windows = len(q)
    q, k, v, grad, grad_q, grad_k, grad_v = (t.flatten(0, 1) for t in (q, k, v, grad, *found))  # (windows * heads, ..)
    for block in _blocks(bias.shape, windows):
        own = block.flat
        weights = torch.bmm(q[own], k[own].mT).to(wide)  # (n * heads of the block, cells, cells), as all below
        weights.unflatten(0, (block.windows, -1)).add_(block.bias_and_mask(bias, mask))
        weights = weights.softmax(-1)
        torch.bmm(weights.to(q.dtype).mT, grad[own], out=grad_v[own])
        of_weights = torch.bmm(grad[own], v[own].mT).to(wide)
        of_scores = torch._softmax_backward_data(of_weights, weights, -1, wide)
        # (n * heads, cells, cells) -> (heads, cells, cells)
        of_bias = of_scores if block.windows == 1 else of_scores.unflatten(0, (block.windows, -1)).sum(0)
        grad_bias[block.at[1]] += of_bias
        of_scores = of_scores.to(q.dtype)
        torch.bmm(of_scores, k[own], out=grad_q[own])
        torch.bmm(of_scores.mT, q[own], out=grad_k[own])
    return *found, grad_bias.to(bias.dtype)


class _Block(NamedTuple):
    """Neighbouring windows with all their heads, or some heads of one window."""

    at: tuple[slice, slice]
    """Windows and heads."""
    flat: slice
    """The same where windows and heads are one dimension."""

    @property
    def windows(self) -> int:
        return int(self.at[0].stop - self.at[0].start)

    def bias_and_mask(self, bias: Tensor, mask: Tensor | None) -> Tensor:
        """What is added to the scores: (heads, cells, cells), or with a mask (windows, heads, cells, cells)."""
        own = bias[self.at[1]]
        if mask is None:
            return own
        of_image = torch.arange(self.at[0].start, self.at[0].stop) % len(mask)
        return own + mask[of_image].unsqueeze(1)


def _blocks(shape: torch.Size, windows: int) -> Iterator[_Block]:
    """Blocks of at most `SCORES_AT_ONCE` numbers, or of one head; `shape` (heads, cells, cells) is that of the bias."""
    heads, cells, _ = shape
    most = max(1, SCORES_AT_ONCE // cells**2)
    side, of_each = max(1, most // heads), min(most, heads)
    for first in range(0, windows, side):
        last = min(first + side, windows)
        for head in range(0, heads, of_each):
            end = min(head + of_each, heads)
            yield _Block((slice(first, last), slice(head, end)), slice(first * heads + head, (last - 1) * heads + end))
