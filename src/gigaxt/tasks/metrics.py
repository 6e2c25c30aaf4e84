"""Scores of weighted cases, for all draws of a bootstrap at once.

torchmetrics has these scores for one set of cases. A thousand draws would be a thousand passes through each of its
metrics, so here each is a function of `weights` (n, draws): how often each of the n cases counts in each draw. Returned
are scores (draws,) in float64, NaN where one is not defined. The tests compare them with torchmetrics and plain loops.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

CALIBRATION_BINS = 15
"""Equal parts of the probabilities 0 to 1 in which calibration is measured, as in Guo et al. (2017)."""
PAIRS_AT_ONCE = 1 << 20
"""Pairs of cases that are compared at once."""


def counts(weights: Tensor, index: Tensor, size: int) -> Tensor:
    """How often each of `size` numbers occurs: weights (n, draws), index (n,) int64 -> (size, draws)."""
    return weights.new_zeros(size, weights.shape[1]).index_add_(0, index, weights)


def rank_of_truth(logits: Tensor, targets: Tensor) -> Tensor:
    """How many classes are ranked before the true one: (n, classes), (n,) -> (n,) int64, 0 where it is the answer.

    Of equal logits the first class is before the others, as in `argmax`.
    """
    own = logits.gather(1, targets[:, None])
    first = torch.arange(logits.shape[1]) < targets[:, None]
    return ((logits > own) | ((logits == own) & first)).sum(dim=1)


def confusion_scores(weights: Tensor, answers: Tensor, targets: Tensor, classes: int) -> dict[str, Tensor]:
    """Balanced accuracy, and precision, recall and F1 averaged over classes.

    Balanced accuracy is the mean recall of the classes that occur. The others are means over the classes that occur or
    were answered, with 0 where a class was missed altogether, as in torchmetrics and scikit-learn.

    Args:
        weights: (n, draws).
        answers: (n,) class numbers.
        targets: (n,) class numbers.
        classes: how many there are.
    """
    true, answered = counts(weights, targets, classes), counts(weights, answers, classes)
    right = counts(weights * (answers == targets)[:, None], targets, classes)
    absent = torch.where(true + answered > 0, 0.0, torch.nan)
    return {
        "balanced_accuracy": (right / true).nanmean(dim=0),
        "precision_macro": (absent + right / answered.clamp(min=1)).nanmean(dim=0),
        "recall_macro": (absent + right / true.clamp(min=1)).nanmean(dim=0),
        "f1_macro": (absent + 2 * right / (true + answered).clamp(min=1)).nanmean(dim=0),
    }


def quadratic_kappa(weights: Tensor, answers: Tensor, targets: Tensor) -> Tensor:
    """Cohen's kappa with quadratic weights between class numbers: 1 - observed / expected squared distance.

    Args:
        weights: (n, draws).
        answers: (n,) class numbers.
        targets: (n,) class numbers.
    """
    a, t = answers.double(), targets.double()
    total = weights.sum(dim=0)
    observed = (a - t).square() @ weights / total
    mean = [x @ weights / total for x in (a, t)]
    square = [x.square() @ weights / total for x in (a, t)]
    # Of all pairs of an answer and a target: E (a - t)^2, from the moments alone.
    expected = square[0] + square[1] - 2 * mean[0] * mean[1]
    return torch.where(expected > 0, 1 - observed / expected, torch.nan)


def calibration_error(weights: Tensor, confidence: Tensor, right: Tensor) -> Tensor:
    """Expected calibration error: mean distance of confidence and share of right answers, by bins of confidence.

    Args:
        weights: (n, draws).
        confidence: (n,), 0 to 1.
        right: (n,) bool.
    """
    place = (confidence * CALIBRATION_BINS).long().clamp(max=CALIBRATION_BINS - 1)
    excess = counts(weights * (right.double() - confidence.double())[:, None], place, CALIBRATION_BINS)
    return excess.abs().sum(dim=0) / weights.sum(dim=0)


def auroc(weights: Tensor, scores: Tensor, truth: Tensor) -> Tensor:
    """Area under the ROC curve: how often a positive is ranked above a negative, ties half.

    Args:
        weights: (n, draws).
        scores: (n,), higher is more positive.
        truth: (n,) bool.
    """
    positive, negative = truth.nonzero()[:, 0], (~truth).nonzero()[:, 0]
    ranked, order = scores[negative].sort()
    below = _cumulative(weights[negative[order]])  # (negatives + 1, draws): weight of the k lowest
    first, last = (torch.searchsorted(ranked, scores[positive], right=right) for right in (False, True))
    drawn = weights[positive]
    pairs = (drawn * (below[first] + below[last]) / 2).sum(dim=0)
    return pairs / (drawn.sum(dim=0) * below[-1])


def average_precision(weights: Tensor, scores: Tensor, truth: Tensor) -> Tensor:
    """Area under the precision-recall curve by steps: the mean of the precision at each positive's score.

    Args:
        weights: (n, draws).
        scores: (n,), higher is more positive.
        truth: (n,) bool.
    """
    positive = truth.nonzero()[:, 0]
    ranked, order = (-scores).sort()
    reached = torch.searchsorted(ranked, -scores[positive], right=True)  # how many have that score or a higher one
    ordered = weights[order]
    answered, right = (_cumulative(w)[reached] for w in (ordered, ordered * truth[order, None]))
    precision = (right / answered).nan_to_num(0.0)  # 0 / 0: neither this nor a higher one was drawn
    drawn = weights[positive]
    total = drawn.sum(dim=0)
    # With positives alone it is 1, whatever the scores.
    return torch.where(total < weights.sum(dim=0), (drawn * precision).sum(dim=0) / total, torch.nan)


def concordance(weights: Tensor, risk: Tensor, time: Tensor, event: Tensor) -> Tensor:
    """Harrell's concordance index: how often, of two cases, the one of higher risk had its event first; ties half.

    Only pairs of which it is known who was first count: the earlier time must be an event. Where both times are equal,
    an event comes before a case that had none until then, and two events are no pair.

    Args:
        weights: (n, draws).
        risk: (n,), higher is earlier.
        time: (n,) of the event, or until when there was none.
        event: (n,) bool.
    """

    def known(rows: Tensor) -> Tensor:
        own = time[rows, None]
        return ((own < time) | ((own == time) & ~event)).double()

    def right(rows: Tensor) -> Tensor:
        own = risk[rows, None]
        return known(rows) * ((own > risk).double() + 0.5 * (own == risk))

    events = event.nonzero()[:, 0]
    return _pairs(weights, events, right) / _pairs(weights, events, known)


def _cumulative(weights: Tensor) -> Tensor:
    """(n, draws) -> (n + 1, draws): the sum of the first k."""
    total = weights.new_zeros(len(weights) + 1, weights.shape[1])
    torch.cumsum(weights, dim=0, out=total[1:])
    return total


def _pairs(weights: Tensor, rows: Tensor, matrix: Callable[[Tensor], Tensor]) -> Tensor:
    """Sum of w_i w_j matrix_ij over i in `rows` and all j; `matrix` gives some of its rows, (b, n)."""
    total = weights.new_zeros(weights.shape[1])
    for block in rows.split(max(1, PAIRS_AT_ONCE // len(weights))):
        total += (weights[block] * (matrix(block) @ weights)).sum(dim=0)
    return total


def moments_scores(moments: Tensor) -> dict[str, Tensor]:
    """Root mean square and mean error, and share of the variance explained: (5, ...) -> each (...).

    Args:
        moments: how many, and sums of squared errors, absolute errors, targets, and squared targets.
    """
    count, squares, absolute, total, power = moments
    spread = power - total.square() / count
    return {
        "rmse": (squares / count).sqrt(),
        "mae": absolute / count,
        # Without spread (one value, or equal targets) there is nothing to explain.
        "r2": torch.where(spread > 1e-12 * power, 1 - squares / spread, torch.nan),
    }
