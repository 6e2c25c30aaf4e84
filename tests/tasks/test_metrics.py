from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gigaxt.tasks.metrics import (
    CALIBRATION_BINS,
    auroc,
    average_precision,
    calibration_error,
    concordance,
    confusion_scores,
    quadratic_kappa,
    rank_of_truth,
)

DRAWS = 7


def weights(n: int, seed: int = 0) -> Tensor:
    """How often each of n cases was drawn; the first draw is all of them once."""
    random = np.random.default_rng(seed)
    drawn = random.multinomial(n, np.full(n, 1 / n), size=DRAWS).T.astype(float)
    drawn[:, 0] = 1
    return torch.from_numpy(drawn)


def repeated(x: Tensor, w: Tensor) -> Tensor:
    """The cases of one draw, as often as they were drawn."""
    return x.repeat_interleave(w.long(), dim=0)


def each_draw(metric: Any, w: Tensor, *columns: Tensor) -> list[float]:
    return [float(metric(*(repeated(x, w[:, d]) for x in columns))) for d in range(w.shape[1])]


def naive_concordance(risk: Tensor, time: Tensor, event: Tensor) -> float:
    """Harrell's index, pair by pair."""
    pairs = right = 0.0
    for i in range(len(time)):
        for j in range(i):
            (first, second) = (i, j) if (time[i], not event[i]) < (time[j], not event[j]) else (j, i)
            if not event[first] or (time[i] == time[j] and event[i] == event[j]):
                continue  # nobody knows who was first
            pairs += 1
            right += 1 if risk[first] > risk[second] else 0.5 if risk[first] == risk[second] else 0
    return right / pairs if pairs else math.nan


@pytest.mark.parametrize("seed", range(3))
def test_scores_of_classes_equal_those_of_torchmetrics(seed: int) -> None:
    from torchmetrics.functional.classification import (
        multiclass_cohen_kappa,
        multiclass_f1_score,
        multiclass_precision,
        multiclass_recall,
    )

    torch.manual_seed(seed)
    n, classes = 40, 5
    answers, targets = torch.randint(0, classes, (n,)), torch.randint(0, classes - 1, (n,))  # one never occurs
    w = weights(n, seed)
    found = confusion_scores(w, answers, targets, classes)
    for name, metric in (
        ("precision_macro", multiclass_precision),
        ("recall_macro", multiclass_recall),
        ("f1_macro", multiclass_f1_score),
    ):
        expected = each_draw(
            lambda a, t, metric=metric: metric(a, t, num_classes=classes, average="macro"), w, answers, targets
        )
        assert found[name].tolist() == pytest.approx(expected), name
    recall = each_draw(
        lambda a, t: np.mean([(a[t == k] == k).double().mean() for k in t.unique()]), w, answers, targets
    )
    assert found["balanced_accuracy"].tolist() == pytest.approx(recall)
    kappa = each_draw(
        lambda a, t: multiclass_cohen_kappa(a, t, num_classes=classes, weights="quadratic"), w, answers, targets
    )
    assert quadratic_kappa(w, answers, targets).tolist() == pytest.approx(kappa, abs=1e-6)


@pytest.mark.parametrize("ties", [False, True])
def test_ranking_scores_equal_those_of_torchmetrics(ties: bool) -> None:
    from torchmetrics.functional.classification import binary_auroc, binary_average_precision

    torch.manual_seed(1)
    n = 60
    scores = torch.randint(0, 6, (n,)) / 6 if ties else torch.rand(n)
    truth = torch.rand(n) < 0.3
    w = weights(n)
    assert auroc(w, scores, truth).tolist() == pytest.approx(each_draw(binary_auroc, w, scores, truth.int()))
    expected = each_draw(binary_average_precision, w, scores, truth.int())
    assert average_precision(w, scores, truth).tolist() == pytest.approx(expected)


def test_calibration_equals_that_of_torchmetrics() -> None:
    from torchmetrics.functional.classification import multiclass_calibration_error

    torch.manual_seed(2)
    p, targets = (2 * torch.randn(80, 4)).softmax(1), torch.randint(0, 4, (80,))
    w = weights(80)
    expected = each_draw(
        lambda p, t: multiclass_calibration_error(p, t, num_classes=4, n_bins=CALIBRATION_BINS), w, p, targets
    )
    found = calibration_error(w, p.amax(1), p.argmax(1) == targets)
    assert found.tolist() == pytest.approx(expected, abs=1e-6)
    assert float(calibration_error(torch.ones(2, 1), torch.tensor([1.0, 0.0]), torch.tensor([True, False]))) == 0


@pytest.mark.parametrize("seed", range(5))
def test_concordance_equals_a_loop_over_pairs(seed: int) -> None:
    """Ties in time, in risk and in both, and half of the cases censored."""
    random = np.random.default_rng(seed)
    n = 25
    risk, time = (torch.from_numpy(random.integers(0, 6, n) / 2.0) for _ in range(2))
    event = torch.from_numpy(random.random(n) < 0.5)
    w = weights(n, seed)
    expected = each_draw(naive_concordance, w, risk, time, event)
    assert concordance(w, risk, time, event).tolist() == pytest.approx(expected, nan_ok=True)


def test_concordance_by_hand() -> None:
    def index(risk: list[float], time: list[float], event: list[int]) -> float:
        ones = torch.ones(len(risk), 1, dtype=torch.float64)
        return float(concordance(ones, torch.tensor(risk), torch.tensor(time), torch.tensor(event) > 0))

    assert index([3, 2, 1], [1, 2, 3], [1, 1, 1]) == 1
    assert index([1, 2, 3], [1, 2, 3], [1, 1, 1]) == 0
    assert index([1, 1, 1], [1, 2, 3], [1, 1, 1]) == 0.5
    assert index([3, 2, 1], [1, 2, 3], [0, 1, 1]) == 1  # who left first is compared with nobody
    assert math.isnan(index([2, 1], [1, 2], [0, 1]))
    assert math.isnan(index([2, 1], [2, 2], [1, 1]))  # both at once
    assert index([2, 1], [2, 2], [1, 0]) == 1  # the event before who was still without at that time
    assert index([1, 2], [2, 2], [1, 0]) == 0


def test_rank_of_the_true_class() -> None:
    logits = torch.tensor([[3.0, 2, 1], [3, 2, 1], [3, 2, 1], [1, 1, 1]])
    assert rank_of_truth(logits, torch.tensor([0, 1, 2, 2])).tolist() == [0, 1, 2, 2]
    assert (rank_of_truth(logits, logits.argmax(1)) == 0).all()


@pytest.mark.parametrize("truth", [[True, True], [False, False]])
def test_what_is_not_defined_is_nan(truth: list[bool]) -> None:
    ones, scores = torch.ones(2, 1, dtype=torch.float64), torch.tensor([0.2, 0.7])
    assert auroc(ones, scores, torch.tensor(truth)).isnan().all()
    assert average_precision(ones, scores, torch.tensor(truth)).isnan().all()
    same = torch.tensor([1, 1])
    assert quadratic_kappa(ones, same, same).isnan().all()
