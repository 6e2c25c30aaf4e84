"""Losses of pixels as functions of sums over all regions, so that they stream: what each kind of target adds up.

The sums of some regions are float64 tensors in this order:

    0   the losses that are means over pixels, mixed by their weights and added up: a scalar with a gradient
    1   the weights of the pixels that they were taken of: a scalar
    2   what scores are made of: a confusion matrix, counts a label, or moments a number
    3   with dice or jaccard only: soft areas of intersection, prediction and truth, (3, classes); two with gradients

Without dice and jaccard the loss is the first over the second, linear in what has a gradient.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from gigaxt.errors import DataError
from gigaxt.nn.heads.base import check_class_indices, widened
from gigaxt.nn.heads.segment_config import SegmentConfig

Sums = tuple[Tensor, ...]


class PixelLoss(ABC):
    """The loss of one kind of target.

    Args:
        config: of the head.
    """

    score_sums: str
    """What the sums at 2 are called."""

    def __init__(self, config: SegmentConfig) -> None:
        self.config, self.mix = config, config.mix

    @abstractmethod
    def check(self, target: Tensor, valid: Tensor) -> None:
        """Refuse values that are no targets.

        Args:
            target: see `sums`.
            valid: see `sums`.

        Raises:
            DataError: names the first of them.
        """

    @abstractmethod
    def sums(self, answers: Tensor, target: Tensor, valid: Tensor) -> Sums:
        """The sums of some regions.

        Args:
            answers: (n, outputs, H, W).
            target: of these pixels.
            valid: (n, H, W) bool, False for padding and nodata, whatever the target says there.

        Raises:
            DataError: shapes that do not fit; on a CPU also values that are no targets (elsewhere the check would wait
                for the device: see `DenseHead.check_targets`).
        """

    def loss(self, sums: Sequence[Tensor]) -> Tensor:
        """The scalar loss; 0 where no pixel counts."""
        total = sums[0] / _not_zero(sums[1])
        if not self.config.overlaps:
            return total
        both, predicted, true = sums[3]
        count = self.config.absent_classes == "count"
        present = torch.ones_like(true, dtype=torch.bool) if count else true > 0
        extra = 1.0 if count else 0.0
        weights = self._weights(true) * present
        for name, part, whole in (
            ("dice", 2 * both, predicted + true),
            ("jaccard", both, predicted + true - both),
        ):
            if name in self.mix:
                # Masked before the division: the gradient of 0 / 0 would be NaN afterwards.
                distance = 1 - (part + extra) / torch.where(present, whole + extra, 1.0)
                total = total + self.mix[name] * (distance * weights).sum() / _not_zero(weights.sum())
        return total

    def _weights(self, like: Tensor) -> Tensor:
        """Class weights (outputs,), in the dtype of `like`."""
        weights = self.config.class_weights
        return like.new_ones(self.config.classes) if weights is None else like.new_tensor(weights)

    def _checked(self, answers: Tensor, target: Tensor, valid: Tensor, bands: tuple[int, ...]) -> Tensor:
        """The answers in at least float32, if target (n, *bands, H, W) and validity have their size, and fit."""
        n, *size = (len(answers), *answers.shape[2:])
        if tuple(target.shape) != (n, *bands, *size) or tuple(valid.shape) != (n, *size):
            what = f"{bands[0]} bands" if bands else "a mask"
            raise DataError(
                f"target: expected {what} of the logits' size {tuple(size)} with a validity of that size, "
                f"got {tuple(target.shape)} and {tuple(valid.shape)}"
            )
        if target.device.type == "cpu":
            self.check(target, valid)
        return widened(answers)

    def _focal(self, log_p: Tensor) -> Tensor:
        """-(1 - p)^gamma log p, of the log-probabilities of what is true."""
        # Clamped, since a power below 1 has no derivative at 0.
        wrong = (-torch.expm1(log_p)).clamp(min=torch.finfo(log_p.dtype).tiny)
        return -(wrong**self.config.focal_gamma) * log_p


class OneClassLoss(PixelLoss):
    """One class a pixel: target (n, H, W) of integers, or the `ignore` value."""

    score_sums = "confusion"

    def check(self, target: Tensor, valid: Tensor) -> None:
        """See `PixelLoss.check`."""
        counted = valid & (target != self.config.ignore)
        check_class_indices(target.long().masked_fill(~counted, 0), self.config.classes)

    def sums(self, answers: Tensor, target: Tensor, valid: Tensor) -> Sums:
        """See `PixelLoss.sums`; scores are made of the confusion matrix (classes, classes), true class as row."""
        logits = self._checked(answers, target, valid, ())
        counted = valid & (target != self.config.ignore)
        target = target.long().masked_fill(~counted, 0)
        class_weights = self._weights(logits)
        weights = class_weights[target] * counted  # (n, H, W)
        total = logits.new_zeros((), dtype=torch.float64)
        if "cross_entropy" in self.mix:
            losses = F.cross_entropy(
                logits,
                target.masked_fill(~counted, -100),
                weight=class_weights,
                ignore_index=-100,
                label_smoothing=self.config.label_smoothing,
                reduction="none",
            )
            total = total + self.mix["cross_entropy"] * losses.sum(dtype=torch.float64)
        if "focal" in self.mix:
            log_p = logits.log_softmax(dim=1).gather(1, target[:, None])[:, 0]  # (n, H, W)
            total = total + self.mix["focal"] * (self._focal(log_p) * weights).sum(dtype=torch.float64)
        found = (total, weights.sum(dtype=torch.float64), _confusion(logits, target, counted))
        if not self.config.overlaps:
            return found
        true = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, target[:, None], True)
        return *found, _areas(logits.softmax(dim=1), true, counted[:, None])


class LabelsLoss(PixelLoss):
    """Independent labels, one a band: target (n, labels, H, W) of 0 and 1, or the `ignore` value."""

    score_sums = "counts"

    def check(self, target: Tensor, valid: Tensor) -> None:
        """See `PixelLoss.check`."""
        wrong = valid[:, None] & (target != self.config.ignore) & (target != 0) & (target != 1)
        if bool(wrong.any()):
            raise DataError(
                f"target: expected labels 0 and 1, got {target[wrong][0].item():g}; correct the mask, or mark what is "
                f"not known with the `ignore` value ({self.config.ignore})"
            )

    def sums(self, answers: Tensor, target: Tensor, valid: Tensor) -> Sums:
        """See `PixelLoss.sums`; scores are made of pixels (4, labels): yes and right, yes and wrong, missed, left."""
        logits = self._checked(answers, target, valid, (self.config.classes,))
        known = valid[:, None] & (target != self.config.ignore)
        true = known & (target == 1)
        weights = self._weights(logits)[:, None, None] * known  # (n, labels, H, W)
        total = logits.new_zeros((), dtype=torch.float64)
        if "cross_entropy" in self.mix:
            smoothing = self.config.label_smoothing
            soft = true.to(logits.dtype) * (1.0 - smoothing) + 0.5 * smoothing
            losses = F.binary_cross_entropy_with_logits(logits, soft, reduction="none")
            total = total + self.mix["cross_entropy"] * (losses * weights).sum(dtype=torch.float64)
        if "focal" in self.mix:
            log_p = F.logsigmoid(torch.where(true, logits, -logits))
            total = total + self.mix["focal"] * (self._focal(log_p) * weights).sum(dtype=torch.float64)
        yes = logits.detach() > 0
        cells = (yes & true, yes & known & ~true, ~yes & true, ~yes & known & ~true)
        counts = torch.stack([cell.sum(dim=(0, 2, 3)).double() for cell in cells])
        found = (total, weights.sum(dtype=torch.float64), counts)
        return (*found, _areas(logits.sigmoid(), true, known)) if self.config.overlaps else found


class NumbersLoss(PixelLoss):
    """Numbers, one a band: target (n, numbers, H, W), NaN where not known."""

    score_sums = "moments"

    def check(self, target: Tensor, valid: Tensor) -> None:
        """See `PixelLoss.check`."""
        if bool((valid[:, None] & torch.isinf(target)).any()):
            raise DataError("target: expected finite numbers, got infinity; correct the raster, or its nodata value")

    def sums(self, answers: Tensor, target: Tensor, valid: Tensor) -> Sums:
        """See `PixelLoss.sums`; scores are made of moments (5, numbers): pixels, sums of e^2, |e|, t and t^2."""
        answers = self._checked(answers, target, valid, (self.config.classes,))
        known = valid[:, None] & ~torch.isnan(target)
        exact = torch.where(known, target, 0).double()
        error = torch.where(known, answers - exact.to(answers.dtype), 0)
        std = self.config.target_std
        unit = error if std is None else error / error.new_tensor(std)[:, None, None]
        weights = self._weights(answers)[:, None, None] * known
        total = answers.new_zeros((), dtype=torch.float64)
        for name, weight in self.mix.items():
            total = total + weight * (self._distance(name, unit) * weights).sum(dtype=torch.float64)
        far = error.detach().double()
        moments = torch.stack([known.double(), far.square(), far.abs(), exact, exact.square()])
        return total, weights.sum(dtype=torch.float64), moments.sum(dim=(1, 3, 4))

    def _distance(self, name: str, error: Tensor) -> Tensor:
        if name == "huber":
            return F.huber_loss(error, torch.zeros_like(error), reduction="none", delta=self.config.huber_delta)
        return error.abs() if name == "l1" else error.square()


def pixel_loss(config: SegmentConfig) -> PixelLoss:
    """The loss of the head's target."""
    kinds: dict[str, type[PixelLoss]] = {"single": OneClassLoss, "multi": LabelsLoss, "regression": NumbersLoss}
    return kinds[config.target](config)


def _not_zero(total: Tensor) -> Tensor:
    return total.clamp(min=torch.finfo(total.dtype).tiny)


def _areas(p: Tensor, true: Tensor, known: Tensor) -> Tensor:
    """Probabilities and truth (n, classes, H, W), where known: areas (3, classes) of both, prediction and truth."""
    p = p * known
    return torch.stack([area.sum(dim=(0, 2, 3), dtype=torch.float64) for area in (p * true, p, true & known)])


def _confusion(logits: Tensor, target: Tensor, counted: Tensor) -> Tensor:
    """Counts (classes, classes), row true, column predicted; scatter, for `bincount` waits for the GPU."""
    classes = logits.shape[1]
    # Not argmax, which takes seven times as long over a leading dimension on a CPU; ties are alike.
    cells = (target * classes + logits.detach().max(dim=1).indices).flatten()
    counts = torch.zeros(classes * classes, dtype=torch.float64, device=logits.device)
    return counts.scatter_add_(0, cells, counted.flatten().double()).view(classes, classes)
