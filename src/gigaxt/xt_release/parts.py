"""What a GigaXT is made of in place of its own parts where it is a published model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor, nn

from gigaxt.errors import ConfigError
from gigaxt.nn.context import ContextConfig, ContextEncoder, build_context
from gigaxt.nn.heads import ClassifyConfig, ClassifyHead
from gigaxt.nn.stages import RegionTokens
from gigaxt.xt_release.context import POOLED_KIND

if TYPE_CHECKING:
    from gigaxt.nn.xt import ModelConfig


def released_parts(config: ModelConfig) -> tuple[RegionTokens, ContextEncoder, ClassifyHead]:
    """Region encoder, context and head of a published model.

    Raises:
        ConfigError: settings that no published model has.
    """
    if not isinstance(config.head, ClassifyConfig) or config.head.pooling != "mean":
        raise ConfigError(f"context.kind: `{config.context.kind}` needs a head of kind classify with pooling: mean")
    encode = ReleasedTokens(config)
    context = build_context(config.context)
    if config.context.kind != POOLED_KIND:
        return encode, context, ClassTokenHead(config.head, config.context.dim)
    if config.context.dim != encode.encoder.dim:
        raise ConfigError(
            f"context.dim: `{POOLED_KIND}` takes tokens as they are, {encode.encoder.dim} wide; "
            f"got {config.context.dim}"
        )
    return encode, context, PooledHead(config.head, config.context)


class ReleasedTokens(RegionTokens):
    """Tokens of the raw last feature map, without a norm (Q9); projected, but not for the pooled models."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config, maps=False)
        self.norm = nn.Identity()
        if config.context.kind == POOLED_KIND:
            self.project = nn.Identity()


class ClassTokenHead(ClassifyHead):
    """Norm and linear layer on the class token; of a case of several images, on the mean of their normed ones."""

    def forward(self, context: Tensor, validity: Tensor | None = None) -> Tensor:
        """(batch, images, dim) -> logits (batch, classes); `validity` is that of the scenes' tokens, long joined."""
        return super().forward(context)


class PooledHead(ClassifyHead):
    """Mean over the tokens, then an MLP with its norm before the last layer (`cls_head: naive`)."""

    def __init__(self, config: ClassifyConfig, context: ContextConfig) -> None:
        hidden = round(context.dim * context.mlp_ratio)
        super().__init__(config, hidden)
        self.expand = nn.Linear(context.dim, hidden)

    def forward(self, context: Tensor, validity: Tensor | None = None) -> Tensor:
        """Tokens (batch, n, dim), zeros where not valid -> logits (batch, classes)."""
        count = context.shape[1] if validity is None else validity.sum(dim=1, keepdim=True)
        logits: Tensor = self.classifier(self.norm(F.gelu(self.expand(context.sum(dim=1) / count))))
        return logits
