"""The region encoder through `torch.compile`: regions all have one size, so that it is compiled once."""

from __future__ import annotations

import torch
from timm.models.swin_transformer_v2 import WindowAttention
from torch import Tensor

from gigaxt.errors import ConfigError
from gigaxt.nn.xt import GigaXT


def compile_encoder(model: GigaXT, device: torch.device) -> None:
    """Let the region encoder be compiled when it is first called. Names of weights stay as they are.

    Raises:
        ConfigError: PyTorch cannot compile here (found out on a single addition, in seconds), or not correctly.
    """
    try:
        torch.compile(_add_one)(torch.ones(2, device=device))
    except Exception as error:  # of many kinds: no compiler, one that fails, no Triton, no room for its files
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ConfigError(
            f"train.compile: PyTorch cannot compile for {device} here: {first}; set it to false"
        ) from error
    if device.type == "cpu" and any(isinstance(module, WindowAttention) for module in model.encode.encoder.modules()):
        # Seen with PyTorch 2.14.1 and timm's own forward: LayerNorm's gradients off by more than half.
        raise ConfigError("train.compile: on a CPU PyTorch compiles wrong gradients for Swin V2; set it to false")
    model.encode.encoder.compile()


def _add_one(x: Tensor) -> Tensor:
    return x + 1
