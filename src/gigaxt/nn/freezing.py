"""A region encoder of which only the last stages learn, or nothing."""

from __future__ import annotations

from typing import Literal, cast

import torch
from timm.models import FeatureInfo
from torch import Tensor, nn

from gigaxt.errors import ConfigError
from gigaxt.nn.backbone import BackboneSpec, create
from gigaxt.nn.region_encoder import RegionEncoder
from gigaxt.nn.stages import RegionTokens

Learning = Literal["full", "last_n", "frozen"]


def freeze(encode: RegionTokens, learning: Learning, last_n: int = 1) -> None:
    """Fix the weights of a region encoder's backbone, or of all but its last stages.

    Fixed parts get no gradient and behave as in evaluation, in training too: no dropout, no stochastic depth, fixed
    statistics of BatchNorm. What comes after the backbone learns on: norm and projection of the tokens, and the maps
    that a plain ViT is given. A ready region encoder is fixed as a whole or not at all.

    Args:
        encode: of a model (`model.encode`).
        learning: `full`: all of it learns, as in a fresh model; `last_n`: the last stages; `frozen`: nothing.
        last_n: how many stages learn: those between the feature maps that timm knows; blocks, of a plain ViT.

    Raises:
        ConfigError: the backbone has no more stages than that, or is a ready module, whose stages are not known.
    """
    encoder: nn.Module = encode.encoder
    trunk = encoder.trunk if isinstance(encoder, RegionEncoder) else encoder
    learns = set(trunk.parameters())
    if learning == "frozen":
        learns = set()
    elif learning == "last_n":
        if not isinstance(encoder, RegionEncoder):
            raise ConfigError("train.encoder: a ready region encoder has no stages to tell apart; use full or frozen")
        before = _before_last(encoder, last_n)
        learns = {parameter for name, parameter in trunk.named_parameters() if name not in before}
    for parameter in trunk.parameters():
        parameter.requires_grad_(parameter in learns)
    encode.fix([] if learning == "full" else _without_learning(trunk, learns))


def _before_last(encoder: RegionEncoder, last_n: int) -> set[str]:
    """Names of the trunk's parameters that the input of its last `last_n` stages depends on."""
    config, info = encoder.config, cast(FeatureInfo, encoder.trunk.feature_info)
    depth = len(info.info)
    last = max(index % depth for index in info.out_indices)
    if not 1 <= last_n <= last:
        raise ConfigError(
            f"train.last_n: expected 1 to {last} of the {last + 1} {'blocks' if encoder.layout.plain else 'stages'} of "
            f"{config.name}, got {last_n}; all of it learns with train.encoder full"
        )
    # The same network up to there, as shapes only: whatever its map depends on comes before.
    options = {**config.options, "out_indices": [last - last_n]}
    spec = BackboneSpec(name=config.name, in_channels=config.in_channels, options=options)
    before = create(spec, config.region, meta=True).eval()
    with torch.enable_grad():
        (found,) = before(torch.empty(1, config.in_channels, config.region, config.region, device="meta"))
    reached = _leaves(found)
    return {name for name, parameter in before.named_parameters() if parameter in reached}


def _leaves(output: Tensor) -> set[Tensor]:
    """The tensors that `output` can be differentiated by."""
    stack = [output.grad_fn]
    seen, leaves = set(stack), set()
    while stack:
        node = stack.pop()
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, Tensor):
            leaves.add(leaf)
        for parent, _ in () if node is None else node.next_functions:
            if parent not in seen:
                seen.add(parent)
                stack.append(parent)
    return leaves


def _without_learning(module: nn.Module, learns: set[nn.Parameter]) -> list[nn.Module]:
    """Modules below `module` that learn nothing, and those that hold some that do beside some that do not."""
    own = [parameter in learns for parameter in module.parameters()]
    if own and all(own):
        return []
    if not any(own):
        return list(module.modules())
    return [module, *(found for child in module.children() for found in _without_learning(child, learns))]
