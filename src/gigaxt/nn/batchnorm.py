"""Batch normalisation with fixed statistics.

Ordinary BatchNorm mixes the regions of a chunk and changes its buffers in the forward pass, so a streamed pass (which
runs a chunk up to twice, in chunks of any size) would not equal the in-memory one.
"""

from __future__ import annotations

from typing import TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

M = TypeVar("M", bound=nn.Module)


class FrozenBatchNorm(nn.Module):
    """A BatchNorm of any dimension in evaluation mode for good; its scale and shift are still trained.

    Keeps the state-dict keys of the layer that it replaces, and the activation that timm fuses into some of them.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, norm: _BatchNorm) -> None:
        super().__init__()
        if norm.running_mean is None or norm.running_var is None:
            norm.running_mean = torch.zeros(norm.num_features)
            norm.running_var = torch.ones(norm.num_features)
        self.eps = norm.eps
        self.weight, self.bias = norm.weight, norm.bias
        self.register_buffer("running_mean", norm.running_mean)
        self.register_buffer("running_var", norm.running_var)
        self.register_buffer("num_batches_tracked", norm.num_batches_tracked)
        # timm's BatchNormAct2d: `act` and, in some versions, `drop` run after the normalisation.
        self.drop: nn.Module = getattr(norm, "drop", nn.Identity())
        self.act: nn.Module = getattr(norm, "act", nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (n, channels, ...) by the fixed statistics."""
        x = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=self.eps)
        y: Tensor = self.act(self.drop(x))
        return y


def freeze_batchnorm(module: M) -> M:
    """Replace every BatchNorm below `module`, in place, by one with fixed statistics.

    Args:
        module: any module; if it is a BatchNorm itself, its replacement is returned.

    Returns:
        `module`, whose layers keep their parameters (still trained), buffers (never changed) and state-dict keys.
    """
    frozen: dict[nn.Module, nn.Module] = {m: FrozenBatchNorm(m) for m in module.modules() if isinstance(m, _BatchNorm)}
    for parent in list(module.modules()):
        for name, child in list(parent._modules.items()):  # named_children would pass over a second place of a layer
            if child in frozen:
                setattr(parent, name, frozen[child])
    return cast(M, frozen.get(module, module))  # a BatchNorm is the one case in which another class comes back
