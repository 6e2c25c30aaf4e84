"""One class, several labels, numbers, or the time until an event, for a whole case."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from gigaxt.datasets.manifest import Manifest
from gigaxt.datasets.row import Case, Row
from gigaxt.errors import ConfigError, DataError
from gigaxt.image.base import Image
from gigaxt.nn.heads.survival import bin_names
from gigaxt.streaming.rows import at_least_float32
from gigaxt.tasks.base import Evaluation, Tally, Task, WorstCase, as_table, worst_first
from gigaxt.tasks.bootstrap import about_groups, estimate
from gigaxt.tasks.scoring import ManyLabels, Numbers, OneClass, Scoring, Times


class Classification(Task):
    """Answers about whole cases: one class, any number of labels, numbers, or times, as `manifest.target` says.

    Args:
        manifest: its classes are the model's, in the same order.
        class_names: names of the numbers of a regression or of the bins of time; None: columns, or positions.
        time_bins: of a survival head: times between its bins.
    """

    def __init__(
        self,
        manifest: Manifest,
        class_names: Sequence[str] | None = None,
        time_bins: Sequence[float] | None = None,
    ) -> None:
        self.manifest = manifest
        self.class_names = manifest.classes or tuple(class_names or self._names(time_bins))
        kinds: dict[str, type[Scoring]] = {
            "single": OneClass,
            "multi": ManyLabels,
            "regression": Numbers,
            "survival": Times,
        }
        kind = kinds[manifest.target]
        self.scoring: Callable[[Tensor, Tensor, Sequence[str]], Scoring] = (
            partial(Times, edges=time_bins) if kind is Times else kind
        )
        self.metric_names = kind.metric_names(self.class_names)
        self.best = {
            "single": "balanced_accuracy",
            "multi": "average_precision",
            "regression": "rmse",
            "survival": "concordance",
        }[manifest.target]
        self.higher_is_better = manifest.target != "regression"

    def _names(self, time_bins: Sequence[float] | None) -> Sequence[str]:
        columns, outputs = self.manifest.answer_columns, self.manifest.outputs
        if self.manifest.target == "survival":
            return bin_names(time_bins or ())
        return columns if len(columns) == outputs else [str(i) for i in range(outputs)]

    def target(self, row: Row, image: Image) -> int | Tensor:
        """A class index; (classes,) zeros and ones or numbers, NaN where not known; (2,) time and event."""
        target = self.manifest.target_of(row)
        assert not isinstance(target, Path), "a manifest of labels has no masks"
        return target if isinstance(target, int) else torch.from_numpy(target)

    def tally(self) -> ClassificationTally:
        """A fresh, empty tally."""
        return ClassificationTally(self)

    def class_counts(self, split: str) -> list[float]:
        """Cases of each class."""
        if self.manifest.target != "single":
            raise ConfigError(f"balancing classes needs one label per image; the model's is {self.manifest.target!r}")
        return [float(count) for count in self.manifest.class_counts(split).values()]


class ClassificationTally(Tally):
    """Logits and targets of a split."""

    def __init__(self, task: Classification) -> None:
        self.task: Classification = task
        self.first_rows: list[Row] = []
        self.logits: list[Tensor] = []
        self.targets: list[Tensor] = []
        self.loss_sum = self.weight_sum = 0.0

    @property
    def rows(self) -> list[Row]:
        """The first row of each case."""
        return self.first_rows

    def update(self, rows: Sequence[Row], targets: Sequence[Any], output: Mapping[str, Any]) -> None:
        """Add `{"logits": (cases, classes), "loss": mean over what is known}`; a case is given by its first row."""
        logits = output["logits"].detach().cpu()
        answers = torch.stack([torch.as_tensor(target) for target in targets])
        # The loss is a mean over the labels that are known; so is that of the split.
        known = float((~torch.isnan(answers)).double().mean()) if answers.is_floating_point() else 1.0
        self.first_rows += rows
        self.logits.append(logits.to(at_least_float32(logits.dtype)))
        self.targets.append(answers)
        self.loss_sum += float(output["loss"]) * known * len(rows)
        self.weight_sum += known * len(rows)

    def select(self, keep: Callable[[Row], bool]) -> Self:
        """The tally of some cases, without their loss."""
        part = type(self)(self.task)
        chosen = torch.tensor([keep(row) for row in self.rows], dtype=torch.bool)
        part.first_rows = [row for row in self.rows if keep(row)]
        part.logits, part.targets = ([torch.cat(found)[chosen]] for found in (self.logits, self.targets))
        return part

    def merged(self, other: Self) -> Self:
        """The tally of the cases of both."""
        both = type(self)(self.task)
        for name in ("first_rows", "logits", "targets", "loss_sum", "weight_sum"):
            setattr(both, name, getattr(self, name) + getattr(other, name))
        return both

    def compute(self) -> Evaluation:
        """Scores with their intervals, by the kind of target."""
        if not self.rows:
            raise DataError("there is no image to evaluate")
        task = self.task
        logits, targets = torch.cat(self.logits), torch.cat(self.targets)  # (cases, classes), (cases[, ...])
        if targets.is_floating_point() and bool(torch.isnan(targets).all()):
            raise DataError(
                f"{task.manifest.path}: nothing to score: {', '.join(task.manifest.answer_columns)} are empty in "
                f"each of the {len(self.rows)} rows"
            )
        scoring = task.scoring(logits, targets, task.class_names)
        groups = self.groups
        metrics, intervals = estimate(scoring.scores, groups)
        bags = {case[0].line: case for case in task.manifest.cases()}
        cases = [bags.get(row.line, (row,)) for row in self.rows]
        found = zip(cases, scoring.badness().tolist(), scoring.captions(), strict=True)
        images = sum(map(len, cases))
        return Evaluation(
            images=images,
            cases=None if images == len(self.rows) else len(self.rows),
            loss=self.loss_sum / self.weight_sum if self.weight_sum else float("nan"),
            metrics=metrics,
            intervals=intervals,
            notes=[*scoring.notes(), *about_groups(len(set(groups)))],
            per_class=as_table(scoring.per_class(), task.class_names),
            confusion=scoring.confusion(),
            worst=worst_first([_worst_case(*case) for case in found]),
        )


def _worst_case(case: Case, badness: float, caption: str) -> WorstCase:
    first, *others = case
    about = f"case {first.case}, {len(case)} images: " if others else ""
    paths = [str(row.image) for row in others]
    return WorstCase(image=str(first.image), badness=badness, caption=about + caption, others=paths)
