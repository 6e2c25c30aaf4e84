"""Swin V2's window attention through PyTorch's fused kernels, bias and shift mask included, on CUDA.

timm writes the attention out: scores, scaled, biased, masked, softmax, each a tensor of (windows, heads, cells, cells)
that autograd keeps. `F.scaled_dot_product_attention` makes none of them: with q' = scale * q / |q| and k' = k / |k| the
cosine attention of Swin V2 is an ordinary one, softmax(q' k'^T + bias) v.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from timm.models.swin_transformer_v2 import WindowAttention
from torch import Tensor, nn
from torch.nn import functional as F

LARGEST_SCALE = 100.0
"""Swin V2 clamps its learnt scale there."""
LARGEST_BIAS = 16.0


def fuse_window_attention(module: nn.Module) -> None:
    """Make every Swin V2 attention below `module` a `FusedWindowAttention`, in place.

    The class alone changes: parameters, buffers, hooks and their names stay, and copies and pickles follow.
    """
    for child in module.modules():
        if type(child) is WindowAttention:
            child.__class__ = FusedWindowAttention


class FusedWindowAttention(WindowAttention):
    """timm's, through a fused kernel where one takes a bias that needs a gradient: on CUDA, without dropout.

    On a CPU PyTorch has no such kernel (its flash attention refuses the gradient) and timm's own forward runs.
    """

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
        if not (self.fused_attn and _kernel_takes_bias(x)):
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
        attended = F.scaled_dot_product_attention(
            q, k.to(q.dtype), v.to(q.dtype), bias.unsqueeze(0).to(q.dtype), scale=1.0
        )
        # (b, w * heads, cells, d) -> (b, w, heads, cells, d) -> (b, w, cells, heads, d) -> (b * w, cells, dim)
        attended = attended.unflatten(1, (w, self.num_heads)).transpose(2, 3).reshape(windows, cells, dim)
        out: Tensor = self.proj_drop(self.proj(attended))
        return out

    def position_bias(self) -> Tensor:
        """(heads, cells, cells), 0 to 16: of each pair of cells of a window, by where they lie to each other."""
        table = LARGEST_BIAS * self.cpb_mlp(self.relative_coords_table).flatten(0, -2).sigmoid()  # (places, heads)
        pairs = cast(Tensor, table[self.relative_position_index])  # (cells, cells, heads)
        return pairs.permute(2, 0, 1).contiguous()


def _kernel_takes_bias(x: Tensor) -> bool:
    """Whether a fused kernel of this device takes a bias that needs a gradient."""
    return x.is_cuda
