"""One label, several labels, or numbers for a whole scene.

torchmetrics is imported where it is used: it takes as long to import as torch.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gigaxt.datasets.manifest import Manifest, Row
from gigaxt.errors import ConfigError, DataError
from gigaxt.image.base import Image
from gigaxt.tasks.base import Evaluation, Tally, Task, WorstCase, worst_first


class Classification(Task):
    """Labels of whole images: one class, any number of classes, or numbers, as `manifest.target` says.

    Args:
        manifest: its classes are the model's, in the same order.
        class_names: names of the numbers of a regression; None: their positions.
    """

    def __init__(self, manifest: Manifest, class_names: Sequence[str] | None = None) -> None:
        self.manifest = manifest
        self.class_names = manifest.classes or tuple(class_names or map(str, range(manifest.outputs)))
        self.metric_names = {
            "single": ("accuracy", "balanced_accuracy", "f1_macro", "auroc"),
            "multi": ("exact_match", "f1_macro", "auroc", "average_precision"),
            "regression": ("rmse", "mae", "r2"),
        }[manifest.target]
        self.best = {"single": "balanced_accuracy", "multi": "average_precision", "regression": "rmse"}[manifest.target]
        self.higher_is_better = manifest.target != "regression"

    def target(self, row: Row, image: Image) -> int | Tensor:
        """A class index, or float32 (classes,): zeros and ones for `multi`, numbers for `regression`."""
        target = self.manifest.target_of(row)
        assert not isinstance(target, Path), "a manifest of labels has no masks"
        return target if isinstance(target, int) else torch.from_numpy(target)

    def tally(self) -> ClassificationTally:
        """A fresh, empty tally."""
        return ClassificationTally(self)

    def class_counts(self, split: str) -> list[float]:
        """Images of each class."""
        if self.manifest.target != "single":
            raise ConfigError(f"balancing classes needs one label per image; the model's is {self.manifest.target!r}")
        return [float(count) for count in self.manifest.class_counts(split).values()]


class ClassificationTally(Tally):
    """Logits and targets of a split."""

    def __init__(self, task: Classification) -> None:
        self.task = task
        self.rows: list[Row] = []
        self.logits: list[Tensor] = []
        self.targets: list[Tensor] = []
        self.loss_sum = 0.0

    def update(self, rows: Sequence[Row], targets: Sequence[Any], output: Mapping[str, Any]) -> None:
        """Add `{"logits": (images, classes), "loss": mean over the images}`."""
        self.rows += rows
        self.logits.append(output["logits"].detach().float().cpu())
        self.targets.append(torch.stack([torch.as_tensor(target) for target in targets]))
        self.loss_sum += float(output["loss"]) * len(rows)

    def compute(self) -> Evaluation:
        """Metrics by the kind of target."""
        if not self.rows:
            raise DataError("there is no image to evaluate")
        logits, targets = torch.cat(self.logits), torch.cat(self.targets)  # (images, classes), (images[, classes])
        evaluate = {"single": single_label, "multi": multi_label, "regression": regression}[self.task.manifest.target]
        metrics, per_class, confusion, badness, captions = evaluate(logits, targets, self.task.class_names)
        cases = [
            WorstCase(image=str(row.image), badness=bad, caption=caption)
            for row, bad, caption in zip(self.rows, badness.tolist(), captions, strict=True)
        ]
        return Evaluation(
            images=len(self.rows),
            loss=self.loss_sum / len(self.rows),
            metrics=metrics,
            per_class=per_class,
            confusion=confusion,
            worst=worst_first(cases),
        )


_Result = tuple[dict[str, float], dict[str, dict[str, float]], list[list[float]] | None, Tensor, list[str]]


def single_label(logits: Tensor, targets: Tensor, names: Sequence[str]) -> _Result:
    """Metrics of one class per image: logits (images, classes), targets (images,) int64."""
    from torchmetrics.functional.classification import binary_auroc, multiclass_confusion_matrix, multiclass_f1_score

    classes = logits.shape[1]
    probabilities = logits.softmax(1)
    answers = logits.argmax(1)
    confusion = multiclass_confusion_matrix(answers, targets, num_classes=classes).double()
    right, true, answered = confusion.diag(), confusion.sum(1), confusion.sum(0)
    # NaN where a class does not occur; a mean over the classes that do occur is what scikit-learn calls balanced.
    recall, precision = right / true, right / answered
    auroc = torch.stack([_ranked(binary_auroc, probabilities[:, i], targets == i) for i in range(classes)])
    metrics = {
        "accuracy": float((answers == targets).double().mean()),
        "balanced_accuracy": float(recall.nanmean()),
        "f1_macro": float(multiclass_f1_score(answers, targets, num_classes=classes, average="macro")),
        "auroc": float(auroc.nanmean()),
    }
    columns = {"recall": recall, "precision": precision, "auroc": auroc, "images": true}
    badness = 1 - probabilities.gather(1, targets[:, None])[:, 0]
    captions = [
        f"{names[target]}, answered {names[answer]} ({probability:.2f})"
        for target, answer, probability in zip(
            targets.tolist(), answers.tolist(), probabilities.amax(1).tolist(), strict=True
        )
    ]
    return metrics, _table(columns, names), confusion.tolist(), badness, captions


def multi_label(logits: Tensor, targets: Tensor, names: Sequence[str]) -> _Result:
    """Metrics of any number of classes per image: logits and targets (images, classes)."""
    from torchmetrics.functional.classification import binary_auroc, binary_average_precision, multilabel_f1_score

    classes = logits.shape[1]
    probabilities, truth = logits.sigmoid(), targets > 0.5
    answers = probabilities > 0.5
    auroc = torch.stack([_ranked(binary_auroc, probabilities[:, i], truth[:, i]) for i in range(classes)])
    precision = torch.stack(
        [_ranked(binary_average_precision, probabilities[:, i], truth[:, i]) for i in range(classes)]
    )
    f1 = multilabel_f1_score(answers.int(), truth.int(), num_labels=classes, average="none").reshape(classes)
    metrics = {
        "exact_match": float((answers == truth).all(1).double().mean()),
        "f1_macro": float(f1.double().mean()),
        "auroc": float(auroc.nanmean()),
        "average_precision": float(precision.nanmean()),
    }
    columns = {"f1": f1, "auroc": auroc, "average_precision": precision, "images": truth.sum(0)}
    badness = torch.where(truth, 1 - probabilities, probabilities).amax(1)
    captions = [f"{_some(row, names)}, answered {_some(got, names)}" for row, got in zip(truth, answers, strict=True)]
    return metrics, _table(columns, names), None, badness, captions


def regression(logits: Tensor, targets: Tensor, names: Sequence[str]) -> _Result:
    """Metrics of numbers: logits and targets (images, classes), in the targets' units."""
    from torchmetrics.functional import r2_score

    error = (logits - targets).double()
    # One image has no variance to explain; r2_score refuses it.
    r2 = (
        r2_score(logits.double(), targets.double(), multioutput="raw_values").reshape(-1)
        if len(error) > 1
        else torch.full((len(names),), torch.nan)
    )
    rmse, mae = error.square().mean(0).sqrt(), error.abs().mean(0)
    metrics = {"rmse": float(rmse.mean()), "mae": float(mae.mean()), "r2": float(r2.mean())}
    badness = error.abs().mean(1)
    captions = [
        f"{_numbers(target)}, answered {_numbers(answer)}" for target, answer in zip(targets, logits, strict=True)
    ]
    return metrics, _table({"rmse": rmse, "mae": mae, "r2": r2}, names), None, badness, captions


def _ranked(metric: Any, probabilities: Tensor, truth: Tensor) -> Tensor:
    """A ranking metric, NaN where the split holds only one of the two answers."""
    if truth.all() or not truth.any():
        return torch.tensor(torch.nan)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        value: Tensor = metric(probabilities, truth.int())
    return value


def _table(columns: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, dict[str, float]]:
    return {name: {key: float(column[i]) for key, column in columns.items()} for i, name in enumerate(names)}


def _some(chosen: Tensor, names: Sequence[str]) -> str:
    return ", ".join(names[i] for i in chosen.nonzero()[:, 0].tolist()) or "nothing"


def _numbers(values: Tensor) -> str:
    return ", ".join(f"{value:.4g}" for value in values.tolist())
