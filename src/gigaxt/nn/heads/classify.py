"""One answer per image: a class, several labels, or numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gigaxt.errors import ConfigError, DataError
from gigaxt.nn.heads.base import BaseHeadConfig, at_least_float32, check_class_indices, weights_tensor


@dataclass(kw_only=True)
class ClassifyConfig(BaseHeadConfig):
    """Settings of the classification head."""

    kind: Literal["classify"] = "classify"
    pooling: Literal["attention", "mean"] = "attention"
    """attention: tokens weighted by learned queries; mean: all alike"""
    target: Literal["single", "multi", "regression"] = "single"
    """single: one class (cross entropy); multi: any number of labels (binary cross entropy); regression: numbers (mean
    squared error)"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target == "single" and self.classes < 2:
            raise ConfigError("head.classes: one class leaves nothing to decide; for yes or no use 2, or target: multi")
        if self.target == "regression" and self.label_smoothing:
            raise ConfigError("head.label_smoothing: has no meaning for target: regression; leave it out")


class ClassifyHead(nn.Module):
    """Pool the context over all tokens of an image, then one linear layer.

    Attention pooling: each of a few heads scores every token by a learned query, takes the softmax over the image's
    tokens, and averages its share of the channels with it. Memory is a constant number of token stores.

    Args:
        config: see `ClassifyConfig`.
        dim: channels of the context.
    """

    class_weights: Tensor | None

    def __init__(self, config: ClassifyConfig, dim: int) -> None:
        super().__init__()
        self.config = config
        self.norm = nn.LayerNorm(dim)
        self.heads = next(heads for heads in (8, 4, 2, 1) if dim % heads == 0)
        self.queries = nn.Linear(dim, self.heads, bias=False) if config.pooling == "attention" else None
        if self.queries is not None:
            nn.init.normal_(self.queries.weight, std=dim**-0.5)
        self.classifier = nn.Linear(dim, config.classes)
        self.register_buffer("class_weights", weights_tensor(config), persistent=False)

    def forward(self, context: Tensor, validity: Tensor | None = None) -> Tensor:
        """Logits of each image (regression: the numbers).

        Args:
            context: (B, N, dim) float.
            validity: (B, N) bool, False for tokens that are not real; None: all are.

        Returns:
            (B, classes).
        """
        tokens = self.norm(context)
        weights = self._weights(tokens, validity).to(tokens.dtype)  # (B, heads, N)
        # Every head pools all channels and keeps its own: one product, no copy of the tokens in another order.
        pooled = weights @ tokens  # (B, heads, dim)
        pooled = pooled.unflatten(2, (weights.shape[1], -1)).diagonal(dim1=1, dim2=2)  # (B, dim / heads, heads)
        logits: Tensor = self.classifier(pooled.transpose(1, 2).flatten(1))
        return logits

    def attention(self, context: Tensor, validity: Tensor | None = None) -> Tensor:
        """How much each token counts, for heat maps: (B, N), >= 0, sums to 1 over an image's valid tokens."""
        return self._weights(self.norm(context), validity).mean(dim=1)

    def _weights(self, tokens: Tensor, validity: Tensor | None) -> Tensor:
        """Normed tokens (B, N, dim) -> pooling weights (B, heads, N), in at least float32."""
        if self.queries is None:
            scores = tokens.new_zeros(len(tokens), 1, tokens.shape[1])
        else:
            scores = self.queries(tokens).transpose(1, 2)  # (B, N, heads) -> (B, heads, N)
        scores = at_least_float32(scores)
        if validity is None:
            return scores.softmax(dim=2)
        valid = validity[:, None, :]
        # The lowest finite number, not -inf: an image without any valid token would become NaN. It becomes 0.
        scores = scores.masked_fill(~valid, torch.finfo(scores.dtype).min)
        return scores.softmax(dim=2).masked_fill(~valid, 0.0)

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The mean loss over the images.

        With class weights the sum is still divided by the number of images, not by the sum of their weights, so that
        weights act in batches of one image too.

        Args:
            logits: (B, classes).
            targets: single: (B,) integer classes; multi: (B, classes) in 0..1; regression: (B, classes) finite.

        Returns:
            A scalar in at least float32.

        Raises:
            DataError: targets of another shape or out of range.
        """
        logits = at_least_float32(logits)
        smoothing = self.config.label_smoothing
        weights = None if self.class_weights is None else self.class_weights.to(logits.dtype)
        if self.config.target == "single":
            self._check_shape(targets, (len(logits),))
            check_class_indices(targets, self.config.classes)
            total = F.cross_entropy(logits, targets.long(), weight=weights, label_smoothing=smoothing, reduction="sum")
            return total / len(logits)
        self._check_shape(targets, tuple(logits.shape))
        targets = targets.to(logits.dtype)
        if not bool(torch.isfinite(targets).all()):
            raise DataError("target: expected finite numbers, got NaN or infinity; correct the labels")
        if self.config.target == "regression":
            losses = F.mse_loss(logits, targets, reduction="none")
            return (losses if weights is None else losses * weights).mean()
        outside = (targets < 0) | (targets > 1)
        if bool(outside.any()):
            raise DataError(f"target: expected labels between 0 and 1, got {float(targets[outside][0]):g}")
        targets = targets * (1.0 - smoothing) + 0.5 * smoothing
        return F.binary_cross_entropy_with_logits(logits, targets, weight=weights)

    def _check_shape(self, targets: Tensor, shape: tuple[int, ...]) -> None:
        if tuple(targets.shape) != shape:
            raise DataError(
                f"target: expected shape {shape} for target: {self.config.target} with {self.config.classes} classes, "
                f"got {tuple(targets.shape)}"
            )
