"""The region encoder through `torch.compile`: regions all have one size, so that it is compiled once."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch
from timm.models.swin_transformer_v2 import WindowAttention
from torch import Tensor, nn

from gigaxt.errors import ConfigError
from gigaxt.nn.region_encoder import RegionEncoderConfig
from gigaxt.nn.xt import GigaXT
from gigaxt.streaming.keyed import dropout_key

TOLERANCE = 0.01
"""Largest error of a gradient, as a share of its norm: rounding makes 1e-5 of it in float32, a wrong kernel 0.5."""
SMALL = 1e-3
"""Share of the largest norm, below which that is what errors are compared with."""


def compile_encoder(model: GigaXT, device: torch.device) -> None:
    """Let the region encoder be compiled; names of weights stay as they are.

    It is tried first, on a chunk of noise: PyTorch 2.14.1 compiles gradients of Swin V2's LayerNorms on a CPU that are
    off by more than half for some widths, without a word. That one is refused whatever the trial says, since chunks of
    another size are compiled anew.

    Args:
        model: on `device`, in the mode in which it is trained.
        device: where that is.

    Raises:
        ConfigError: PyTorch cannot compile here (found out on a single addition, in seconds), or not this encoder, or
            not correctly.
    """
    with _refusing(f"for {device} here"):
        torch.compile(_add_one)(torch.ones(2, device=device))
    encoder, config, regions = model.encode.encoder, model.config.region_encoder, model.streaming.chunk_regions
    if device.type == "cpu" and any(isinstance(module, WindowAttention) for module in encoder.modules()):
        raise ConfigError("train.compile: on a CPU PyTorch compiles wrong gradients for Swin V2; set it to false")
    plain = _answers(encoder, config, device, regions)
    encoder.compile()
    try:
        with _refusing(f"{config.name} for {device} in version {torch.__version__}"):
            wrong = _largest_error(_answers(encoder, config, device, regions), plain)
    except ConfigError:
        encoder._compiled_call_impl = None  # what `compile` set
        raise
    if wrong > TOLERANCE:
        encoder._compiled_call_impl = None
        raise ConfigError(
            f"train.compile: what PyTorch {torch.__version__} compiles of {config.name} for {device} is wrong, "
            f"answers or gradients by up to {wrong:.0%}; set it to false"
        )


@contextlib.contextmanager
def _refusing(what: str) -> Iterator[None]:
    """Say that PyTorch cannot compile `what`, whatever it raises."""
    try:
        yield
    except Exception as error:  # of many kinds: no compiler, one that fails, no Triton, no room for its files
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ConfigError(f"train.compile: PyTorch cannot compile {what}: {first}; set it to false") from error


def _answers(encoder: nn.Module, config: RegionEncoderConfig, device: torch.device, regions: int) -> list[Tensor]:
    """Tokens, feature maps, and the gradients of the weights that learn, on regions of noise."""
    dtype = next(encoder.parameters()).dtype
    draw = torch.Generator().manual_seed(0)
    size = regions, config.in_channels, config.region, config.region
    pixels = torch.randn(size, generator=draw).to(device, dtype)
    with dropout_key(0, torch.arange(regions), device), torch.enable_grad():
        tokens, maps = encoder(pixels)
    found = [tokens, *maps]
    weights = [p for p in encoder.parameters() if p.requires_grad]
    if not weights:
        return [x.detach() for x in found]
    flows = [torch.randn(x.shape, generator=draw).to(x) for x in found]
    grads = torch.autograd.grad(found, weights, flows, allow_unused=True)
    return [*(x.detach() for x in found), *(torch.zeros(1) if g is None else g for g in grads)]


def _largest_error(found: list[Tensor], expected: list[Tensor]) -> float:
    """Norm of the difference of each, over its own norm, at its largest."""
    norms = [float(x.double().norm()) for x in expected]
    errors = [float((a.double() - b.double()).norm()) for a, b in zip(found, expected, strict=True)]
    if not all(map(math.isfinite, errors)):
        return math.inf
    least = SMALL * max(norms)
    return max(error / max(norm, least) for error, norm in zip(errors, norms, strict=True))


def _add_one(x: Tensor) -> Tensor:
    return x + 1
