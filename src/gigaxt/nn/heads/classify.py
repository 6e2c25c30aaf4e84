"""One answer per case: a class, several labels, numbers, or the time until an event."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gigaxt.errors import ConfigError, DataError
from gigaxt.nn.heads.base import BaseHeadConfig, check_class_indices, weights_tensor, widened
from gigaxt.nn.heads.pooling import at_once, pooled_in_segments
from gigaxt.nn.heads.survival import survival_losses


@dataclass(kw_only=True)
class ClassifyConfig(BaseHeadConfig):
    """Settings of the classification head."""

    kind: Literal["classify"] = "classify"
    pooling: Literal["attention", "mean"] = "attention"
    """attention: tokens weighted by learned queries; mean: all alike"""
    target: Literal["single", "multi", "regression", "survival"] = "single"
    """single: one class (cross entropy); multi: any number of labels (binary cross entropy); regression: numbers (mean
    squared error); survival: time until an event, `classes` bins of time (likelihood of discrete hazards)"""
    label_columns: list[str] | None = None
    """multi: columns of the CSV with 0, 1 or nothing where not known, one a class; regression: with numbers; None: the
    column `label`"""
    target_mean: list[float] | None = None
    """regression: of each number in the training data; None: filled in when training begins"""
    target_std: list[float] | None = None
    """regression: likewise; the loss is in units of it"""
    time_bins: list[float] | None = None
    """survival: times between the bins, `classes` - 1; None: quantiles of the training data's event times"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target == "single" and self.classes < 2:
            raise ConfigError("head.classes: one class leaves nothing to decide; for yes or no use 2, or target: multi")
        if self.target == "survival" and self.classes < 2:
            raise ConfigError("head.classes: one bin of time leaves nothing to tell; use at least 2")
        self._refuse("label_smoothing", self.label_smoothing != 0, ("single", "multi"))
        self._refuse("class_weights", self.class_weights is not None, ("single", "multi", "regression"))
        self._refuse("label_columns", self.label_columns is not None, ("multi", "regression"))
        self._refuse("target_mean", self.target_mean is not None or self.target_std is not None, ("regression",))
        self._refuse("time_bins", self.time_bins is not None, ("survival",))
        self._check_length("label_columns", self.label_columns)
        if self.label_columns is not None and len(set(self.label_columns)) < len(self.label_columns):
            raise ConfigError(f"head.label_columns: expected different columns, got {self.label_columns}")
        self._check_standardisation()
        self._check_bins()

    def _refuse(self, key: str, given: bool, targets: Sequence[str]) -> None:
        if given and self.target not in targets:
            raise ConfigError(
                f"head.{key}: has no meaning for target: {self.target} (but for {', '.join(targets)}); leave it out"
            )

    def _check_standardisation(self) -> None:
        if (self.target_mean is None) != (self.target_std is None):
            raise ConfigError("head: expected `target_mean` and `target_std` together, got one of them")
        self._check_length("target_mean", self.target_mean)
        self._check_length("target_std", self.target_std)
        if not all(math.isfinite(mean) for mean in self.target_mean or ()):
            raise ConfigError(f"head.target_mean: expected finite numbers, got {self.target_mean}")
        if not all(0 < std < math.inf for std in self.target_std or ()):
            raise ConfigError(f"head.target_std: expected numbers above 0, got {self.target_std}")

    def _check_bins(self) -> None:
        edges = self.time_bins
        if edges is None:
            return
        if len(edges) != self.classes - 1:
            raise ConfigError(
                f"head.time_bins: {self.classes} bins (`classes`) have {self.classes - 1} times between them, "
                f"got {len(edges)}"
            )
        if not all(low < high for low, high in pairwise([0.0, *edges, math.inf])):
            raise ConfigError(f"head.time_bins: expected rising times above 0, got {edges}")


class StandardisedLinear(nn.Linear):
    """A linear layer whose outputs are learnt in units of `std` around `mean`, and given in the targets' own units.

    Without it a bias would have to climb to the targets' size in steps of the learning rate.

    Args:
        in_features: channels.
        mean: of the targets, one each.
        std: of the targets, > 0.
    """

    def __init__(self, in_features: int, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__(in_features, len(mean))
        self.mean, self.std = list(mean), list(std)  # no buffers: half precision would cut them off

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., targets), in at least float32."""
        y = widened(super().forward(x))
        return y * y.new_tensor(self.std) + y.new_tensor(self.mean)


class ClassifyHead(nn.Module):
    """Pool the context over all tokens of a case, then one linear layer.

    A case is one image, or several whose tokens stand one image after the other: one bag. Attention pooling: each of a
    few heads scores every token by a learned query, takes the softmax over the case's tokens, and averages its share of
    the channels with it. Many tokens are pooled segment by segment, again in the backward pass, so that nothing is kept
    of them but the context itself.

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
        self.classifier: nn.Linear = (
            nn.Linear(dim, config.classes)
            if config.target_mean is None or config.target_std is None
            else StandardisedLinear(dim, config.target_mean, config.target_std)
        )
        self.register_buffer("class_weights", weights_tensor(config), persistent=False)

    def forward(self, context: Tensor, validity: Tensor | None = None) -> Tensor:
        """Logits of each case (regression: the numbers; survival: logits of the hazards).

        Args:
            context: (B, N, dim) float.
            validity: (B, N) bool, False for tokens that are not real; None: all are.

        Returns:
            (B, classes).
        """
        if context.shape[0] * context.shape[1] > at_once(context.device):
            valid = context.new_ones(context.shape[:2], dtype=torch.bool) if validity is None else validity
            heads = 1 if self.queries is None else self.heads
            pooled = pooled_in_segments(self.norm, self.queries, heads, context, valid)
        else:
            tokens = self.norm(context)
            weights = self._weights(tokens, validity).to(tokens.dtype)  # (B, heads, N)
            # Every head pools all channels and keeps its own: one product, no copy of the tokens in another order.
            pooled = weights @ tokens  # (B, heads, dim)
        pooled = pooled.unflatten(2, (pooled.shape[1], -1)).diagonal(dim1=1, dim2=2)  # (B, dim / heads, heads)
        logits: Tensor = self.classifier(pooled.transpose(1, 2).flatten(1))
        return logits

    def attention(self, context: Tensor, validity: Tensor | None = None) -> Tensor:
        """How much each token counts, for heat maps: (B, N), >= 0, sums to 1 over a case's valid tokens."""
        return self._weights(self.norm(context), validity).mean(dim=1)

    def _weights(self, tokens: Tensor, validity: Tensor | None) -> Tensor:
        """Normed tokens (B, N, dim) -> pooling weights (B, heads, N), in at least float32."""
        if self.queries is None:
            scores = tokens.new_zeros(len(tokens), 1, tokens.shape[1])
        else:
            scores = self.queries(tokens).transpose(1, 2)  # (B, N, heads) -> (B, heads, N)
        scores = widened(scores)
        if validity is None:
            return scores.softmax(dim=2)
        valid = validity[:, None, :]
        # The lowest finite number, not -inf: a case without any valid token would become NaN. It becomes 0.
        scores = scores.masked_fill(~valid, torch.finfo(scores.dtype).min)
        return scores.softmax(dim=2).masked_fill(~valid, 0.0)

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The mean loss over the cases, or over the labels that are known.

        With class weights the sum is still divided by the number of cases, not by the sum of their weights, so that
        weights act in batches of one case too. A batch without any known label has loss 0.

        Args:
            logits: (B, classes).
            targets: single: (B,) integer classes; multi: (B, classes) in 0..1, NaN where not known; regression:
                (B, classes) finite, NaN where not known with `label_columns`; survival: (B, 2), time and event.

        Returns:
            A scalar in at least float32.

        Raises:
            DataError: targets of another shape or out of range. ConfigError: survival without `time_bins`.
        """
        logits = widened(logits)
        if self.config.target == "single":
            return self._one_class(logits, targets)
        if self.config.target == "survival":
            return self._survival(logits, targets)
        self._check_shape(targets, tuple(logits.shape))
        targets = targets.to(logits.dtype)
        known = ~torch.isnan(targets)
        if bool(torch.isinf(targets).any()) or not (self._may_be_unknown or bool(known.all())):
            raise DataError("target: expected finite numbers, got NaN or infinity; correct the labels")
        targets = torch.where(known, targets, 0)
        losses = self._numbers(logits, targets) if self.config.target == "regression" else self._labels(logits, targets)
        if self.class_weights is not None:
            losses = losses * self.class_weights.to(logits.dtype)
        return torch.where(known, losses, 0).sum() / known.sum().clamp(min=1)

    @property
    def _may_be_unknown(self) -> bool:
        return self.config.target == "multi" or self.config.label_columns is not None

    def _one_class(self, logits: Tensor, targets: Tensor) -> Tensor:
        self._check_shape(targets, (len(logits),))
        check_class_indices(targets, self.config.classes)
        weights = None if self.class_weights is None else self.class_weights.to(logits.dtype)
        smoothing = self.config.label_smoothing
        total = F.cross_entropy(logits, targets.long(), weight=weights, label_smoothing=smoothing, reduction="sum")
        return total / len(logits)

    def _labels(self, logits: Tensor, targets: Tensor) -> Tensor:
        outside = (targets < 0) | (targets > 1)
        if bool(outside.any()):
            raise DataError(f"target: expected labels between 0 and 1, got {float(targets[outside][0]):g}")
        smoothing = self.config.label_smoothing
        return F.binary_cross_entropy_with_logits(
            logits, targets * (1.0 - smoothing) + 0.5 * smoothing, reduction="none"
        )

    def _numbers(self, answers: Tensor, targets: Tensor) -> Tensor:
        error = answers - targets
        return (error if self.config.target_std is None else error / error.new_tensor(self.config.target_std)).square()

    def _survival(self, logits: Tensor, targets: Tensor) -> Tensor:
        if self.config.time_bins is None:
            raise ConfigError("head.time_bins: expected the times between the bins; `gigaxt train` fills them in")
        self._check_shape(targets, (len(logits), 2))
        time, event = targets.unbind(dim=1)
        if not bool((torch.isfinite(time) & (time >= 0) & ((event == 0) | (event == 1))).all()):
            raise DataError("target: expected a finite time of 0 or more, and an event of 0 or 1; correct the labels")
        return survival_losses(logits, time, event, self.config.time_bins).mean()

    def _check_shape(self, targets: Tensor, shape: tuple[int, ...]) -> None:
        if tuple(targets.shape) != shape:
            raise DataError(
                f"target: expected shape {shape} for target: {self.config.target} with {self.config.classes} classes, "
                f"got {tuple(targets.shape)}"
            )


def as_labels(targets: Any, device: torch.device) -> Tensor:
    """Targets of cases, such as a list of class numbers, as a tensor.

    Raises:
        DataError: what is no number.
    """
    if isinstance(targets, Sequence):
        targets = np.asarray([np.asarray(target) for target in targets])
        if targets.dtype.kind not in "biuf":
            raise DataError(f"expected numbers as targets, such as a class's index, got {targets.tolist()!r:.80}")
    return torch.as_tensor(targets, device=device)
