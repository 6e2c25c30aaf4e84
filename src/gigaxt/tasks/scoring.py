"""How the answers to one kind of question are scored: one class, several labels, numbers, or times of an event."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from gigaxt.datasets.labels import is_integer
from gigaxt.errors import ConfigError
from gigaxt.nn.heads.survival import event_probabilities, risk, survival_losses
from gigaxt.tasks.metrics import (
    auroc,
    average_precision,
    calibration_error,
    concordance,
    confusion_scores,
    counts,
    moments_scores,
    quadratic_kappa,
    rank_of_truth,
)

NAMED = 5
"""Classes that a note names; the rest are counted."""


class Scoring(ABC):
    """The answers to all cases of a split beside their targets.

    Args:
        logits: (n, classes).
        targets: (n, ...), see `ClassifyHead.loss`.
        names: of the classes.
    """

    def __init__(self, logits: Tensor, targets: Tensor, names: Sequence[str]) -> None:
        self.logits, self.targets, self.names = logits, targets, names
        self.once = torch.ones(len(logits), 1, dtype=torch.float64)

    @staticmethod
    @abstractmethod
    def metric_names(names: Sequence[str]) -> tuple[str, ...]:
        """The scores, in the order of tables, where these are the classes."""

    @abstractmethod
    def scores(self, weights: Tensor) -> dict[str, Tensor]:
        """Scores of weighted cases: (n, draws) -> each (draws,), NaN where not defined."""

    @abstractmethod
    def per_class(self) -> dict[str, Tensor]:
        """Columns of the table of classes, (classes,) each."""

    @abstractmethod
    def badness(self) -> Tensor:
        """How wrong each answer is, (n,); higher is worse."""

    @abstractmethod
    def captions(self) -> list[str]:
        """What was expected and what came, of each case."""

    def confusion(self) -> list[list[float]] | None:
        """Cases of each true (row) and answered class."""
        return None

    def notes(self) -> list[str]:
        """What is not defined in `scores`, and why."""
        return []


class OneClass(Scoring):
    """One class a case: targets (n,) int64."""

    def __init__(self, logits: Tensor, targets: Tensor, names: Sequence[str]) -> None:
        super().__init__(logits, targets, names)
        self.probabilities = logits.softmax(dim=1)
        self.answers = logits.argmax(dim=1)
        self.rank = rank_of_truth(logits, targets)

    @staticmethod
    def metric_names(names: Sequence[str]) -> tuple[str, ...]:
        """Those that mean something: no top 3 of three classes, no quadratic kappa but of grades (whole numbers)."""
        top = [f"top{k}_accuracy" for k in (3, 5) if len(names) > k]
        grades = ["quadratic_kappa"] if all(map(is_integer, names)) else []
        macro = ["balanced_accuracy", "precision_macro", "recall_macro", "f1_macro", "auroc"]
        return ("accuracy", *top, *macro, *grades, "calibration_error")

    def scores(self, weights: Tensor) -> dict[str, Tensor]:
        """See `metric_names`."""
        total = weights.sum(dim=0)
        names = self.metric_names(self.names)
        found = {"accuracy": (self.rank < 1).double() @ weights / total}
        found |= {f"top{k}_accuracy": (self.rank < k).double() @ weights / total for k in (3, 5)}
        found |= confusion_scores(weights, self.answers, self.targets, len(self.names))
        found["auroc"] = self._auroc(weights).nanmean(dim=0)
        if "quadratic_kappa" in names:
            found["quadratic_kappa"] = quadratic_kappa(weights, self.answers, self.targets)
        found["calibration_error"] = calibration_error(weights, self.probabilities.amax(dim=1), self.rank < 1)
        return {name: found[name] for name in names}

    def _auroc(self, weights: Tensor) -> Tensor:
        """Of each class against the others: (classes, draws)."""
        return torch.stack(
            [auroc(weights, self.probabilities[:, k], self.targets == k) for k in range(len(self.names))]
        )

    def per_class(self) -> dict[str, Tensor]:
        """Recall, precision, area under the ROC curve, and how many."""
        confusion = self._confusion()
        right, true, answered = confusion.diag(), confusion.sum(dim=1), confusion.sum(dim=0)
        return {
            "recall": right / true,
            "precision": right / answered,
            "auroc": self._auroc(self.once)[:, 0],
            "cases": true,
        }

    def confusion(self) -> list[list[float]]:
        """Cases of each true (row) and answered class."""
        matrix: list[list[float]] = self._confusion().tolist()
        return matrix

    def _confusion(self) -> Tensor:
        k = len(self.names)
        return counts(self.once, self.targets * k + self.answers, k * k).reshape(k, k)  # (k * k, 1) -> (k, k)

    def badness(self) -> Tensor:
        """The probability that was not given to the true class."""
        return 1 - self.probabilities.gather(1, self.targets[:, None])[:, 0]

    def captions(self) -> list[str]:
        """Like "dog, answered cat (0.99)"."""
        triples = zip(
            self.targets.tolist(), self.answers.tolist(), self.probabilities.amax(dim=1).tolist(), strict=True
        )
        return [f"{self.names[true]}, answered {self.names[got]} ({share:.2f})" for true, got, share in triples]

    def notes(self) -> list[str]:
        """Classes that do not occur."""
        occurring = counts(self.once, self.targets, len(self.names))[:, 0] > 0
        absent = [name for name, there in zip(self.names, occurring.tolist(), strict=True) if not there]
        if int(occurring.sum()) == 1:
            return [f"auroc is not defined: every case is of the class {self.names[int(self.targets[0])]}"]
        return [f"auroc and balanced_accuracy leave out what does not occur: {_listed(absent)}"] if absent else []


class ManyLabels(Scoring):
    """Any number of labels a case: targets (n, classes) of 0 and 1, NaN where a label is not known."""

    def __init__(self, logits: Tensor, targets: Tensor, names: Sequence[str]) -> None:
        super().__init__(logits, targets, names)
        self.known = ~torch.isnan(targets)
        self.probabilities, self.truth = logits.sigmoid(), targets > 0.5
        self.answers = self.probabilities > 0.5

    @staticmethod
    def metric_names(names: Sequence[str]) -> tuple[str, ...]:
        """Exact match, then means over the labels."""
        macro = ("balanced_accuracy", "precision_macro", "recall_macro", "f1_macro", "auroc", "average_precision")
        return ("exact_match", *macro, "calibration_error")

    def scores(self, weights: Tensor) -> dict[str, Tensor]:
        """Exact match of the labels that are known; means over the labels for which a score is defined."""
        asked = self.known.any(dim=1)
        exact = ((self.answers == self.truth) | ~self.known).all(dim=1) & asked
        labels = [self._label(weights, k) for k in range(len(self.names))]
        macro = {name: torch.stack([found[name] for found in labels]).nanmean(dim=0) for name in labels[0]}
        return {"exact_match": exact.double() @ weights / (asked.double() @ weights), **macro}

    def _label(self, weights: Tensor, k: int) -> dict[str, Tensor]:
        """Scores (draws,) of one label over the cases of which it is known."""
        known = self.known[:, k]
        w, p, truth, answer = weights[known], *(x[known, k] for x in (self.probabilities, self.truth, self.answers))
        right, missed, wrong, left = (
            (a & b).double() @ w for a, b in ((answer, truth), (~answer, truth), (answer, ~truth), (~answer, ~truth))
        )
        # Precision, recall and F1 are 0 where a label was missed altogether, and left out where it never played a part.
        absent = torch.where(right + missed + wrong > 0, 0.0, torch.nan)
        return {
            "balanced_accuracy": (right / (right + missed) + left / (left + wrong)) / 2,
            "precision_macro": absent + right / (right + wrong).clamp(min=1),
            "recall_macro": absent + right / (right + missed).clamp(min=1),
            "f1_macro": absent + 2 * right / (2 * right + missed + wrong).clamp(min=1),
            "auroc": auroc(w, p, truth),
            "average_precision": average_precision(w, p, truth),
            "calibration_error": calibration_error(w, p, truth),
        }

    def per_class(self) -> dict[str, Tensor]:
        """F1, areas under both curves, and how many have the label of how many of which it is known."""
        labels = [self._label(self.once, k) for k in range(len(self.names))]
        columns = {"f1": "f1_macro", "auroc": "auroc", "average_precision": "average_precision"}
        table = {column: torch.cat([found[name] for found in labels]) for column, name in columns.items()}
        return {**table, "cases": self.truth.sum(dim=0), "known": self.known.sum(dim=0)}

    def badness(self) -> Tensor:
        """The worst error of probability among the labels that are known."""
        error = torch.where(self.truth, 1 - self.probabilities, self.probabilities)
        return torch.where(self.known, error, 0).amax(dim=1)

    def captions(self) -> list[str]:
        """Like "red, blue (green not known), answered red"."""
        return [
            f"{self._some(true)}{f' ({self._some(~known)} not known)' if not bool(known.all()) else ''}, "
            f"answered {self._some(got & known)}"
            for true, got, known in zip(self.truth, self.answers, self.known, strict=True)
        ]

    def notes(self) -> list[str]:
        """Labels that are never known, or always the same."""
        found = []
        asked, positive = self.known.sum(dim=0), (self.truth & self.known).sum(dim=0)
        for what, wrong in (
            ("not known of any case", asked == 0),
            ("0 in every case that is known", (asked > 0) & (positive == 0)),
            ("1 in every case that is known", (asked > 0) & (positive == asked)),
        ):
            names = [name for name, at in zip(self.names, wrong.tolist(), strict=True) if at]
            if names:
                found.append(f"auroc and average_precision are not defined where a label is {what}: {_listed(names)}")
        return found

    def _some(self, chosen: Tensor) -> str:
        return ", ".join(self.names[i] for i in chosen.nonzero()[:, 0].tolist()) or "nothing"


class Numbers(Scoring):
    """Numbers: answers and targets (n, numbers) in the targets' units, NaN where a target is not known."""

    def __init__(self, logits: Tensor, targets: Tensor, names: Sequence[str]) -> None:
        super().__init__(logits, targets, names)
        self.known = ~torch.isnan(targets)
        self.error = torch.where(self.known, logits - targets, 0).double()
        centre = targets.double().nanmean(dim=0).nan_to_num(0.0)
        self.centred = torch.where(self.known, targets.double() - centre, 0)

    @staticmethod
    def metric_names(names: Sequence[str]) -> tuple[str, ...]:
        """Means over the numbers."""
        return ("rmse", "mae", "r2")

    def scores(self, weights: Tensor) -> dict[str, Tensor]:
        """Means over the numbers."""
        return {name: column.nanmean(dim=0) for name, column in self._columns(weights).items()}

    def _columns(self, weights: Tensor) -> dict[str, Tensor]:
        """Root mean square and mean error, and share of the variance explained: (numbers, draws)."""
        parts = (self.known.double(), self.error.square(), self.error.abs(), self.centred, self.centred.square())
        return moments_scores(torch.stack([part.T @ weights for part in parts]))

    def per_class(self) -> dict[str, Tensor]:
        """The same of each number."""
        return {name: column[:, 0] for name, column in self._columns(self.once).items()}

    def badness(self) -> Tensor:
        """Mean absolute error over the numbers that are known."""
        return self.error.abs().sum(dim=1) / self.known.sum(dim=1).clamp(min=1)

    def captions(self) -> list[str]:
        """Like "4, 20, answered 3.5, 17"."""
        return [
            f"{_numbers(true)}, answered {_numbers(got)}" for true, got in zip(self.targets, self.logits, strict=True)
        ]

    def notes(self) -> list[str]:
        """Numbers without spread."""
        flat = [name for name, r2 in zip(self.names, self.per_class()["r2"].tolist(), strict=True) if r2 != r2]
        return [f"r2 is not defined where there are not two different targets: {_listed(flat)}"] if flat else []


class Times(Scoring):
    """Time until an event: logits of hazards (n, bins), targets (n, 2) of time and event.

    Args:
        logits: (n, bins).
        targets: (n, 2).
        names: of the bins.
        edges: times between the bins.
    """

    def __init__(
        self, logits: Tensor, targets: Tensor, names: Sequence[str], edges: Sequence[float] | None = None
    ) -> None:
        super().__init__(logits.double(), targets, names)
        if edges is None:
            raise ConfigError("head.time_bins: expected the times between the bins; `gigaxt train` fills them in")
        self.edges = edges
        self.time, self.event = targets[:, 0].contiguous(), targets[:, 1] > 0.5
        self.risk = risk(self.logits)

    @staticmethod
    def metric_names(names: Sequence[str]) -> tuple[str, ...]:
        """Harrell's concordance index."""
        return ("concordance",)

    def scores(self, weights: Tensor) -> dict[str, Tensor]:
        """Harrell's concordance index."""
        return {"concordance": concordance(weights, self.risk, self.time, self.event)}

    def per_class(self) -> dict[str, Tensor]:
        """Of each bin: who came through it or had the event in it, the latter's share, and the mean hazard answered."""
        own = torch.bucketize(self.time, torch.tensor(self.edges, dtype=self.time.dtype), right=True)[:, None]  # (n, 1)
        bins = torch.arange(len(self.names))
        here = (own == bins) & self.event[:, None]  # (n, bins)
        at_risk = (bins < own) | here
        answered = torch.where(at_risk, self.logits.sigmoid(), 0).sum(dim=0)
        count = at_risk.sum(dim=0)
        return {
            "at_risk": count,
            "events": here.sum(dim=0),
            "hazard": here.sum(dim=0) / count,
            "hazard_answered": answered / count,
        }

    def badness(self) -> Tensor:
        """The negative log-likelihood."""
        return survival_losses(self.logits, self.time, self.event, self.edges)

    def captions(self) -> list[str]:
        """Like "event at 12.5, expected 30 to 48": the bin by whose end it has come with a chance of one half."""
        come = event_probabilities(self.logits).cumsum(dim=1) >= 0.5
        expected = [self.names[int(row.double().argmax())] if bool(row.any()) else "at no time" for row in come]
        return [
            f"{'event at' if event else 'no event until'} {time:.4g}, expected {name}"
            for time, event, name in zip(self.time.tolist(), self.event.tolist(), expected, strict=True)
        ]

    def notes(self) -> list[str]:
        """Whether nobody is known to have been first."""
        if bool(self.scores(self.once)["concordance"].isnan()):
            return ["concordance is not defined: of no two cases is it known who had the event first"]
        return []


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def _numbers(values: Tensor) -> str:
    return ", ".join("not known" if value != value else f"{value:.4g}" for value in values.tolist())
