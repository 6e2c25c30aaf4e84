"""Objects as points: precision, recall and F1 at a distance, and what is said of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gigaxt.datasets.manifest import Manifest
from gigaxt.datasets.points import Spec, class_words, known_numbers, row_points
from gigaxt.datasets.row import Row
from gigaxt.errors import ConfigError, DataError
from gigaxt.found.objects import Objects
from gigaxt.found.points import FLAG_THRESHOLD, find
from gigaxt.image.base import Image
from gigaxt.nn.heads.base import THRESHOLD
from gigaxt.nn.heads.points import PointsConfig
from gigaxt.targets.points import UNKNOWN, PointTarget
from gigaxt.tasks.base import Evaluation, ImageTally, Task, WorstCase, as_table, worst_first
from gigaxt.tasks.bootstrap import Scores, about_groups, estimate
from gigaxt.tasks.point_matching import LEFT_OUT, WRONG, Curve, flag_threshold, match_points


class Points(Task):
    """Objects at places.

    Args:
        manifest: where the points are.
        head: of the model. Thresholds that it leaves open are chosen on what is evaluated.
    """

    best = "f1"
    takes_batches = False  # its own pass finds the objects as well
    images_per_call = 1
    asked_of: ClassVar[Mapping[str, str]] = {}
    """Flags that are asked only of objects of which another flag is known to be set: name -> the other's."""

    def __init__(self, manifest: Manifest, head: PointsConfig) -> None:
        self.manifest = manifest
        names = ["object"] if head.classes == 1 else class_names_of(manifest, head)
        self.head = replace(head, class_names=list(head.class_names or names))
        self.class_names = tuple(self.head.class_names or ())
        self.spec = Spec.of(self.head)
        self.leaves_open = head.threshold is None or (bool(head.flags) and head.flag_threshold is None)
        self.metric_names: tuple[str, ...] = (
            "f1",
            "precision",
            "recall",
            "average_precision",
            *(f"{flag}_f1" for flag in head.flags),
            *(f"{number}_mae" for number in head.numbers),
        )

    def target(self, row: Row, image: Image) -> PointTarget:
        """The points of one image."""
        return row_points(self.manifest, row, image, self.spec)

    def answer(self, model: Any, images: Any, targets: Sequence[Any]) -> Mapping[str, Any]:
        """The sums of the loss and the objects found, of one image."""
        ((image,), (target,)) = images, targets
        found = find(model, image, target)
        return {**(found.sums or {}), "found": found.objects, "size_px": (image.height, image.width)}

    def settle(self, head: Any, evaluation: Evaluation) -> None:
        """Keep the thresholds that were best, unless the user set others."""
        if self.head.threshold is None:
            head.threshold = [evaluation.per_class[name]["threshold"] for name in self.class_names]
        if self.head.flag_threshold is None and head.flags:
            head.flag_threshold = [evaluation.per_class[flag]["threshold"] for flag in head.flags]

    def tally(self) -> PointsTally:
        """A fresh, empty tally."""
        return PointsTally(self)

    def class_counts(self, split: str) -> list[float]:
        """Not known without the images."""
        raise ConfigError("train.class_weights balanced: points have no classes to balance; set head.class_weights")


def fitted_points(head: PointsConfig, manifest: Manifest) -> PointsConfig:
    """The head with mean and standard deviation of its numbers, over all points that the training images' files hold.

    What the config gives already stays as it is.
    """
    if not head.numbers or (head.number_mean is not None and head.number_std is not None):
        return head
    paths = dict.fromkeys(row.target_path for row in manifest.split("train") if row.target_path is not None)
    values = known_numbers(list(paths), Spec.of(replace(head, class_names=[""] * head.classes)))
    known = (~np.isnan(values)).sum(axis=0)
    lacking = [name for name, count in zip(head.numbers, known, strict=True) if not count]
    if lacking:
        raise DataError(
            f"{manifest.path}: no training image has a known `{lacking[0]}`, so it cannot be learnt; "
            "leave it out of head.numbers"
        )
    std = np.nanstd(values, axis=0)
    mean, std = np.nanmean(values, axis=0), np.where(std > 0, std, 1.0)
    return replace(head, number_mean=head.number_mean or mean.tolist(), number_std=head.number_std or std.tolist())


def class_names_of(manifest: Manifest, head: PointsConfig) -> list[str]:
    """The classes of the training data, sorted.

    Raises:
        ConfigError: there are more or fewer than the head has.
    """
    if head.class_names is not None:
        return head.class_names
    spec = Spec.of(replace(head, class_names=[""] * head.classes))
    paths = {row.target_path for row in manifest.rows if row.target_path is not None}
    names = sorted(set().union(*(class_words(path, spec) for path in paths)))
    if len(names) != head.classes:
        shown = ", ".join(names[:8])
        raise ConfigError(
            f"model.head.classes is {head.classes}, but the points of {manifest.path} have {len(names)}: {shown}; "
            "set it to that, or set class_names"
        )
    return names


@dataclass(frozen=True)
class Case:
    """What came of one image."""

    row: Row
    found: Objects
    truth: PointTarget
    loss_sum: float
    objects: float
    """That the loss counted."""
    matched: NDArray[np.int64]
    """(found,): see `match_points`."""

    def right(self, of_class: int) -> NDArray[np.bool_]:
        """Of the detections of a class that count: which are right."""
        return self.matched[self.counted(of_class)] >= 0

    def counted(self, of_class: int) -> NDArray[np.bool_]:
        """Which detections are of a class and count."""
        return np.asarray((self.found.classes == of_class) & (self.matched != LEFT_OUT))

    def true(self, of_class: int) -> int:
        """How many objects of a class there are to find."""
        return int(((self.truth.classes == of_class) & ~self.truth.ignored).sum())


class Thresholds(NamedTuple):
    """From which chance on something is so."""

    classes: NDArray[np.float64]
    flags: NDArray[np.float64]


class PointsTally(ImageTally[Case]):
    """Detections and objects of each image of a split."""

    task: Points

    def update(self, rows: Sequence[Row], targets: Sequence[Any], output: Mapping[str, Any]) -> None:
        """Add what `Points.answer` says of one image."""
        ((row,), (truth,)) = rows, targets
        found = output["found"]
        loss, objects = (float(output.get(name, math.nan)) for name in ("loss_sum", "objects"))
        self.images.append(Case(row, found, truth, loss, objects, self._matched(found, truth)))

    def compute(self) -> Evaluation:
        """Scores at the model's thresholds, or at the best ones where it has none."""
        if not self.images:
            raise DataError("there is no image to evaluate")
        task, thresholds = self.task, self.thresholds()
        curves, groups = self._curves(), self.groups
        metrics, intervals = estimate(self.scoring(thresholds), groups)
        metrics["average_precision"] = _mean([curve.average_precision() for curve in curves])
        per_class = as_table(_columns(self._all_counts(thresholds).sum(dim=0), curves, thresholds), task.class_names)
        objects = sum(case.objects for case in self.images)
        return Evaluation(
            images=len(self.images),
            loss=sum(case.loss_sum for case in self.images) / max(objects, 1),
            metrics={name: metrics[name] for name in task.metric_names},
            intervals={name: intervals[name] for name in task.metric_names if name in intervals},
            notes=about_groups(len(set(groups))),
            per_class=_one_table({**per_class, **self._attribute_table(thresholds)}),
            worst=worst_first([self._worst_case(case, thresholds) for case in self.images]),
        )

    def scoring(self, thresholds: Thresholds) -> Scores:
        """The task's metrics of weighted images, but for average precision, which is not made of sums."""
        sums = {"": self._all_counts(thresholds).sum(dim=1)}  # (images, classes, 3) -> (images, 3)
        return partial(_scores, sums | self._attribute_sums(thresholds))

    def thresholds(self) -> Thresholds:
        """Those of the head; where it has none, those of the best F1."""
        head = self.task.head
        classes = head.threshold or [curve.best_threshold(THRESHOLD) for curve in self._curves()]
        chosen = np.array(classes)
        flags = head.flag_threshold or [
            flag_threshold(*self._known(i, chosen), FLAG_THRESHOLD) for i in range(len(head.flags))
        ]
        return Thresholds(chosen, np.array(flags))

    def _matched(self, found: Objects, truth: PointTarget) -> NDArray[np.int64]:
        matched = np.full(len(found), WRONG, np.int64)
        for k in range(len(self.task.class_names)):
            rows = np.flatnonzero(found.classes == k)
            # An object of unknown class may be what was found, and is not asked for.
            of_class = np.flatnonzero((truth.classes == k) | (truth.classes == UNKNOWN) | truth.ignored)
            ignored = truth.ignored[of_class] | (truth.classes[of_class] == UNKNOWN)
            pairs = match_points(found.places[rows], truth.places[of_class], ignored, self.task.head.tolerance_px)
            matched[rows] = np.where(pairs >= 0, np.append(of_class, 0)[pairs], pairs)
        return matched

    def _curves(self) -> list[Curve]:
        curves = []
        for k in range(len(self.task.class_names)):
            scores = [case.found.scores[case.counted(k)] for case in self.images]
            right = [case.right(k) for case in self.images]
            curves.append(
                Curve.of(np.concatenate(scores), np.concatenate(right), sum(case.true(k) for case in self.images))
            )
        return curves

    def _all_counts(self, thresholds: Thresholds) -> Tensor:
        """See `_counts`: (images, classes, 3)."""
        classes = range(len(self.task.class_names))
        counts = [[self._counts(case, thresholds, k) for k in classes] for case in self.images]
        return torch.tensor(counts, dtype=torch.float64)

    def _counts(self, case: Case, thresholds: Thresholds, k: int) -> list[int]:
        """Right, wrong, and objects to find of one class in an image."""
        enough = case.found.scores[case.counted(k)] >= thresholds.classes[k]
        right = case.right(k) & enough
        return [int(right.sum()), int((enough & ~right).sum()), case.true(k)]

    def _known(self, attribute: int, classes: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Answer and truth of an attribute, over the objects that were found and of which it is known."""
        answers, truths = zip(*(self._known_in(case, attribute, classes) for case in self.images), strict=True)
        return np.concatenate(answers), np.concatenate(truths)

    def _known_in(
        self, case: Case, attribute: int, classes: NDArray[np.float64]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        names = self.task.head.attributes
        hit = (case.matched >= 0) & (case.found.scores >= classes[case.found.classes])
        truth = case.truth.attributes[case.matched[hit]]  # (hits, k)
        known = ~np.isnan(truth[:, attribute])
        if names[attribute] in self.task.asked_of:
            known &= truth[:, names.index(self.task.asked_of[names[attribute]])] == 1
        return case.found.attributes[names[attribute]][hit][known], truth[known, attribute]

    def _attribute_sums(self, thresholds: Thresholds) -> dict[str, Tensor]:
        """Of each flag right, wrong and to find, (images, 3); of each number error and known, (images, 2)."""
        head, sums = self.task.head, {}
        for i, name in enumerate(head.attributes):
            rows = []
            for case in self.images:
                answers, truth = self._known_in(case, i, thresholds.classes)
                if i < len(head.flags):
                    yes, real = answers >= thresholds.flags[i], truth > 0.5
                    rows.append([(yes & real).sum(), (yes & ~real).sum(), real.sum()])
                else:
                    rows.append([np.abs(answers - truth).sum(), len(truth)])
            sums[name] = torch.tensor(np.array(rows), dtype=torch.float64)
        return sums

    def _attribute_table(self, thresholds: Thresholds) -> dict[str, dict[str, float]]:
        """Scores of each flag and number over all images."""
        head, once = self.task.head, torch.ones(len(self.images), 1, dtype=torch.float64)
        table = {}
        for i, (name, sums) in enumerate(self._attribute_sums(thresholds).items()):
            scores = {column: float(score) for column, score in _of_sums(sums, once).items()}
            if i < len(head.flags):
                scores["threshold"] = float(thresholds.flags[i])
            table[name] = {**scores, "known": len(self._known(i, thresholds.classes)[1])}
        return table

    def _worst_case(self, case: Case, thresholds: Thresholds) -> WorstCase:
        counts = [self._counts(case, thresholds, k) for k in range(len(self.task.class_names))]
        right, wrong, true = (sum(column) for column in zip(*counts, strict=True))
        f1 = 2 * right / (right + wrong + true) if right + wrong + true else 1.0
        caption = f"F1 {f1:.3f}: {right} of {true} objects found, {wrong} detections of nothing"
        return WorstCase(image=str(case.row.image), badness=1 - f1, caption=caption)


def _scores(sums: Mapping[str, Tensor], weights: Tensor) -> dict[str, Tensor]:
    """Scores (draws,) of images weighted by (images, draws), from the sums of objects (named "") and attributes."""
    found = _of_sums(sums[""], weights)
    for name, parts in sums.items():
        if name:
            scores = _of_sums(parts, weights)
            found |= {f"{name}_{score}": scores[score] for score in ("f1", "mae") if score in scores}
    return found


def _of_sums(sums: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """From (images, 3) right, wrong and to find, or (images, 2) error and known; (draws,) each."""
    if sums.shape[1] == 2:
        error, known = sums.T @ weights
        return {"mae": error / known}
    right, wrong, true = sums.T @ weights
    return {"f1": 2 * right / (right + wrong + true), "precision": right / (right + wrong), "recall": right / true}


def _columns(counts: Tensor, curves: Sequence[Curve], thresholds: Thresholds) -> dict[str, Tensor]:
    right, wrong, true = counts.T
    return {
        "f1": 2 * right / (right + wrong + true),
        "precision": right / (right + wrong),
        "recall": right / true,
        "average_precision": torch.tensor([curve.average_precision() for curve in curves]),
        "threshold": torch.from_numpy(thresholds.classes),
        "cases": true,
    }


def _one_table(rows: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Rows with the columns of all of them, NaN where a row has none."""
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    return {name: {column: row.get(column, math.nan) for column in columns} for name, row in rows.items()}


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan
