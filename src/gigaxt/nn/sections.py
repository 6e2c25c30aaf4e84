"""The modules of a model's sections: built from the config, given ready, or those of a published model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from gigaxt.errors import ConfigError
from gigaxt.nn.context import build_context
from gigaxt.nn.heads import build_head
from gigaxt.nn.ready import Ready, check_ready
from gigaxt.nn.stages import RegionTokens
from gigaxt.xt_release.context import KIND, POOLED_KIND
from gigaxt.xt_release.parts import released_parts

if TYPE_CHECKING:
    from gigaxt.nn.xt import ModelConfig


def build_sections(config: ModelConfig, ready: Ready) -> tuple[RegionTokens, nn.Module, nn.Module]:
    """Region encoder, context and head; those of a published model if the context is one.

    Raises:
        ConfigError: see `gigaxt.build_model`.
    """
    if config.context.kind in (KIND, POOLED_KIND):
        if ready.given():
            raise ConfigError(f"{', '.join(ready.given())}: a published model has its own; choose another context.kind")
        return released_parts(config)
    check_ready(ready, config)
    encode = RegionTokens(config, maps=config.head.kind != "classify", encoder=ready.region_encoder)
    context = build_context(config.context) if ready.context is None else ready.context
    if ready.head is not None:
        return encode, context, ready.head
    encoder = encode.encoder
    dense = (encoder.map_channels, encoder.map_strides) if encode.maps else ()
    return encode, context, build_head(config.head, config.context.dim, *dense)
