"""Swin V2's window attention without keeping its scores, bias and shift mask included.

timm writes the attention out: scores, scaled, biased, masked, softmax, each a tensor of (windows, heads, cells, cells)
that autograd keeps. With q' = scale * q / |q| and k' = k / |k| the cosine attention of Swin V2 is an ordinary one,
softmax(q' k'^T + bias) v. On CUDA a fused kernel of PyTorch computes that; on a CPU, where none has a gradient of the
bias, a few windows at a time are computed in the cache, and again in the backward pass.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, cast

import torch
from timm.models.swin_transformer_v2 import WindowAttention
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from gigaxt.rows import at_least_float32

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
        w = 1 if mask is None else len(mask)  # windows that differ in their mask
        parts = (self.q_bias, cast(Tensor, self.k_bias), self.v_bias)  # all None without `qkv_bias`
        qkv_bias = None if self.q_bias is None else torch.cat(parts)
        # (b * w, cells, 3 * dim) -> (b, w, cells, 3, heads, d) -> (3, b, w, heads, cells, d), then each of the
        # three -> (b, w * heads, cells, d). Windows stand beside heads, so that one mask serves all images, unrepeated.
        qkv = F.linear(x, self.qkv.weight, qkv_bias).view(windows // w, w, cells, 3, self.num_heads, -1)
        q, k, v = qkv.permute(3, 0, 1, 4, 2, 5).flatten(2, 3).unbind(0)
        scale = self.logit_scale.clamp(max=math.log(LARGEST_SCALE)).exp().repeat(w, 1, 1)  # (w * heads, 1, 1)
        bias = self.position_bias()
        if mask is not None:
            bias = (bias + mask.unsqueeze(1)).flatten(0, 1)  # (w, heads, cells, cells) -> (w * heads, cells, cells)
        q, k = F.normalize(q, dim=-1) * scale, F.normalize(k, dim=-1)
        attended = attend(q.to(v.dtype), k.to(v.dtype), v, bias.to(v.dtype))
        # (b, w * heads, cells, d) -> (b, w, heads, cells, d) -> (b, w, cells, heads, d) -> (b * w, cells, dim)
        attended = attended.unflatten(1, (w, self.num_heads)).transpose(2, 3).reshape(windows, cells, dim)
        out: Tensor = self.proj_drop(self.proj(attended))
        return out

    def position_bias(self) -> Tensor:
        """(heads, cells, cells), 0 to 16: of each pair of cells of a window, by where they lie to each other."""
        table = LARGEST_BIAS * self.cpb_mlp(self.relative_coords_table).flatten(0, -2).sigmoid()  # (places, heads)
        pairs = cast(Tensor, table[self.relative_position_index])  # (cells, cells, heads)
        return pairs.permute(2, 0, 1).contiguous()


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """softmax(q k^T + bias) v, with a gradient of the bias: (b, heads, cells, d) each, bias (heads, cells, cells)."""
    # A compiler is given the plain form: it cannot look into the other.
    if _kernel_takes_bias(q) or torch.compiler.is_compiling():
        return F.scaled_dot_product_attention(q, k, v, bias.unsqueeze(0), scale=1.0)
    found: Tensor = _BlockedAttention.apply(q, k, v, bias)
    return found


def _kernel_takes_bias(q: Tensor) -> bool:
    """Whether a fused kernel of this device takes a bias that needs a gradient."""
    return q.is_cuda or q.is_meta  # of meta tensors, which hold no numbers, only shapes are asked


class _BlockedAttention(torch.autograd.Function):
    """`attend`, some heads of one image at a time. Scores are computed again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        q, k, v, bias = (t.contiguous() for t in inputs)
        ctx.save_for_backward(q, k, v, bias)
        with torch.autocast(q.device.type, enabled=False):
            # Detached, because the flash kernel for CPUs takes no bias that asks for a gradient.
            return F.scaled_dot_product_attention(q, k, v, bias.detach().unsqueeze(0), scale=1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        q, k, v, bias = ctx.saved_tensors
        with torch.autocast(grad.device.type, enabled=False):
            return _gradients(q, k, v, bias, grad.contiguous())


def _gradients(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    """Of q, k, v and bias. Softmax and sums in float32 or better: scores of up to 116 lose too much in bfloat16."""
    grad_q, grad_k, grad_v = (torch.empty_like(t) for t in (q, k, v))
    wide_bias = bias.to(at_least_float32(bias.dtype))
    grad_bias = torch.zeros_like(wide_bias)
    for block, i in _blocks(bias.shape, len(q)):
        own = i, block  # of each (heads of the block, cells, d)
        weights = torch.bmm(q[own], k[own].mT).to(wide_bias.dtype).add_(wide_bias[block]).softmax(-1)
        torch.bmm(weights.to(q.dtype).mT, grad[own], out=grad_v[own])
        of_weights = torch.bmm(grad[own], v[own].mT).to(weights.dtype)
        of_scores = torch._softmax_backward_data(of_weights, weights, -1, weights.dtype)
        grad_bias[block] += of_scores
        of_scores = of_scores.to(q.dtype)
        torch.bmm(of_scores, k[own], out=grad_q[own])
        torch.bmm(of_scores.mT, q[own], out=grad_k[own])
    return grad_q, grad_k, grad_v, grad_bias.to(bias.dtype)


def _blocks(shape: torch.Size, images: int) -> Iterator[tuple[slice, int]]:
    """(heads, image) of each block; `shape` (heads, cells, cells) is that of the bias, which stays for all images."""
    heads, cells, _ = shape
    most = max(1, SCORES_AT_ONCE // cells**2)
    for first in range(0, heads, most):
        for image in range(images):
            yield slice(first, first + most), image
