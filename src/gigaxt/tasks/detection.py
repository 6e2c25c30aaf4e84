"""Objects of a scene, with boxes and classes: COCO's average precision, and F1 at one score."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gigaxt.datasets.boxes import BoxClasses, RowBoxes, box_classes, learnt_boxes, row_boxes
from gigaxt.datasets.manifest import Manifest
from gigaxt.datasets.row import Row
from gigaxt.errors import ConfigError, DataError
from gigaxt.found.objects import Objects
from gigaxt.image.base import Image
from gigaxt.metrics import coco_score
from gigaxt.nn.heads.base import ObjectsConfig
from gigaxt.targets.boxes import BoxTarget
from gigaxt.tasks.base import BEST_KEPT, Evaluation, ImageTally, Task, WorstCase, worst_first
from gigaxt.tasks.bootstrap import about_groups, estimate
from gigaxt.tasks.box_matching import FALSE, FOUND, match
from gigaxt.tasks.box_precision import average_precision, rank

MATCHED_IOU = 0.5
"""Overlap from which on an object counts as found in F1."""
COCO_MOST = 100
"""Predictions of an image and class that COCO scores; more where an image has more objects of a class."""
MOST_DRAWN = 50_000
"""Predictions of which AP gets an interval; 20,000 take 17 s on one slow core, half of it to match them."""
DRAWN = 500
"""Boxes of a kind that are drawn over an image at most, those that score best."""


class TruthTarget(BoxTarget):
    """Boxes to learn, which remember what their file says of them for the scores."""

    truth: RowBoxes


class Detection(Task):
    """Objects with boxes and classes.

    Args:
        manifest: where the boxes are.
        head: of the model.

    Raises:
        ConfigError: the files have another number of classes than the head, which names none.
    """

    best = "AP"
    metric_names: tuple[str, ...] = ("AP", "AP50", "AP75", "f1", "precision", "recall", "best_f1", "best_threshold")
    takes_batches = False  # its own pass finds the objects as well
    images_per_call = 1  # the loss of each image is wanted, and its objects are found one scene at a time

    def __init__(self, manifest: Manifest, head: ObjectsConfig) -> None:
        self.manifest, self.head = manifest, head
        self.leaves_open = head.threshold is None
        if head.class_names is not None:
            ids = head.category_ids
            self.classes = BoxClasses(tuple(head.class_names), None if ids is None else tuple(ids))
        else:
            self.classes = box_classes(manifest)
        self.class_names = self.classes.names
        if len(self.class_names) != head.classes:
            raise ConfigError(
                f"model.head.classes is {head.classes}, but the boxes of {manifest.path} have {len(self.class_names)}: "
                f"{', '.join(self.class_names[:8])}; set it to that "
                f"(--model.head.classes {len(self.class_names)})"
            )

    def target(self, row: Row, image: Image) -> TruthTarget:
        """The boxes, in px of `image`."""
        truth = row_boxes(row, image, self.classes)
        boxes = learnt_boxes(truth, image)
        target = TruthTarget(
            boxes.boxes_xyxy,
            boxes.classes,
            boxes.crowd,
            name=str(row.target_path),
            size_px=(image.height, image.width),
        )
        target.truth = truth
        return target

    def answer(self, model: Any, images: Any, targets: Sequence[Any]) -> Mapping[str, Any]:
        """The sums of the loss and the `objects` found, of one image."""
        from gigaxt.found.boxes import find  # which needs models, and they need no tasks

        ((image,), (target,)) = images, targets
        found = find(model, image, target)
        return {**(found.sums or {}), "objects": found.objects}

    def settle(self, head: Any, evaluation: Evaluation) -> None:
        """Keep the threshold that was best, unless the user set another."""
        if self.leaves_open and math.isfinite(evaluation.metrics["best_threshold"]):
            head.threshold = evaluation.metrics["best_threshold"]

    def tally(self) -> DetectionTally:
        """A fresh, empty tally."""
        return DetectionTally(self)

    def class_counts(self, split: str) -> list[float]:
        """Boxes of each class."""
        from gigaxt.image.open import open_image

        counts = np.zeros(len(self.class_names))
        for row in self.manifest.split(split):
            boxes = row_boxes(row, open_image(row.image), self.classes)
            counts += np.bincount(boxes.classes[~boxes.crowd], minlength=len(counts))
        return [float(count) for count in counts]


class Masks(NamedTuple):
    """COCO's run lengths of objects."""

    truth: list[dict[str, Any]]
    found: list[dict[str, Any]]


class Scored(NamedTuple):
    """What came of one image."""

    row: Row
    size_px: tuple[int, int]
    truth: RowBoxes
    objects: Objects
    matched: NDArray[np.int64]
    """(objects,) `FOUND`, `FALSE` or `IGNORED`."""
    loss_sum: float
    loss_count: float
    """What the loss is a mean over."""
    masks: Masks | None = None

    @property
    def true_count(self) -> int:
        """Objects to find."""
        return int((~self.truth.crowd).sum())

    def counts(self, threshold: float) -> tuple[int, int, int]:
        """Objects found, predictions that find none, and objects to find, from a score on."""
        matched = self.matched[self.objects.scores >= threshold]
        return int((matched == FOUND).sum()), int((matched == FALSE).sum()), self.true_count


class DetectionTally(ImageTally[Scored]):
    """Objects of each image of a split, with the truth."""

    task: Detection

    def update(self, rows: Sequence[Row], targets: Sequence[Any], output: Mapping[str, Any]) -> None:
        """Add what `Detection.answer` says of one image."""
        (row,), (target,), objects = rows, targets, output["objects"]
        truth: RowBoxes = target.truth
        matched = match(objects.boxes_xyxy, objects.classes, truth.boxes_xyxy, truth.classes, truth.crowd, MATCHED_IOU)
        self.images.append(Scored(row, target.size_px, truth, objects, matched, *self._loss_of(output)))

    def _loss_of(self, output: Mapping[str, Any]) -> tuple[float, float]:
        """A sum, and what it is to be divided by."""
        return float(output["loss_sum"]), float(output["answering"])

    def compute(self) -> Evaluation:
        """COCO's AP, F1 at the model's threshold and the best one; AP and boxes per class."""
        if not self.images:
            raise DataError("there is no image to evaluate")
        most = self.most_of_a_class()
        scores = coco_score(*self.as_coco(), max_dets=(1, 10, most))
        stats = {name: or_nan(scores["stats"][name]) for name in ("AP", "AP50", "AP75")}
        counts = torch.tensor([image.counts(self.task.head.counted_from) for image in self.images], dtype=torch.float64)
        groups = self.groups
        metrics, intervals = estimate(partial(_scores, counts), groups)
        predictions = sum(len(image.objects) for image in self.images)
        if len(set(groups)) > 1 and predictions <= MOST_DRAWN:
            ranked = rank([(image.truth, image.objects) for image in self.images], len(self.task.class_names), most)
            intervals = estimate(partial(average_precision, ranked), groups)[1] | intervals
        best_f1, best_threshold = self._best_threshold()
        loss_count = sum(image.loss_count for image in self.images)
        notes = [f"F1, precision and recall count objects of a score from {self.task.head.counted_from:.3g} on"]
        if most > COCO_MOST:
            notes.append(f"AP is of up to {most} predictions an image and class, since there are so many objects")
        if predictions > MOST_DRAWN:
            notes.append(f"AP has no interval: {predictions:,} predictions, of which {MOST_DRAWN:,} would be drawn")
        cases = [self._case(image) for image in self.images]
        return Evaluation(
            images=len(self.images),
            loss=sum(image.loss_sum for image in self.images) / max(loss_count, 1),
            metrics={**stats, **metrics, "best_f1": best_f1, "best_threshold": best_threshold},
            intervals=intervals,
            notes=[*notes, *about_groups(len(set(groups)))],
            per_class=self._per_class(scores["per_category_AP"]),
            worst=worst_first(cases),
            best_cases=sorted(cases, key=lambda case: (case.badness, case.image))[:BEST_KEPT],
        )

    def as_coco(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Truth and predictions, with images and classes numbered from 1."""
        truth: list[dict[str, Any]] = []
        found: list[dict[str, Any]] = []
        for number, image in enumerate(self.images, start=1):
            columns = zip(*(column.tolist() for column in image.truth), strict=True)
            for i, (box, class_, crowd, area) in enumerate(columns):
                object_ = {"id": len(truth) + 1, "image_id": number, "category_id": class_ + 1, "area": area}
                mask = {} if image.masks is None else {"segmentation": image.masks.truth[i]}
                truth.append({**object_, "bbox": _xywh(box), "iscrowd": int(crowd), **mask})
            assert image.objects.boxes_xyxy is not None
            objects = image.objects.boxes_xyxy.tolist(), image.objects.classes.tolist(), image.objects.scores.tolist()
            for i, (box, class_, score) in enumerate(zip(*objects, strict=True)):
                object_ = {"image_id": number, "category_id": class_ + 1, "bbox": _xywh(box), "score": score}
                mask = {} if image.masks is None else {"segmentation": image.masks.found[i]}
                found.append({**object_, **mask})
        sizes = [{"id": i, "height": im.size_px[0], "width": im.size_px[1]} for i, im in enumerate(self.images, 1)]
        categories = [{"id": i} for i, _ in enumerate(self.task.class_names, start=1)]
        return {"images": sizes, "categories": categories, "annotations": truth}, found

    def most_of_a_class(self) -> int:
        """How many predictions of an image and class COCO scores."""
        most = max((int(np.bincount(im.truth.classes, minlength=1).max()) for im in self.images), default=0)
        return max(COCO_MOST, most)

    def _best_threshold(self) -> tuple[float, float]:
        """The largest F1 over all thresholds, and the score where it is reached; NaN without objects."""
        scores = np.concatenate([image.objects.scores for image in self.images])
        matched = np.concatenate([image.matched for image in self.images])
        order = np.argsort(-scores, kind="stable")
        scores, matched = scores[order], matched[order]
        true = sum(image.true_count for image in self.images)
        if not true or not len(scores):
            return (0.0 if true else math.nan), math.nan
        found, wrong = (np.cumsum(matched == kind) for kind in (FOUND, FALSE))
        f1 = 2 * found / (found + wrong + true)
        f1[:-1][scores[1:] == scores[:-1]] = -1  # a threshold takes all of one score
        best = int(f1.argmax())
        return float(f1[best]), float(scores[best])

    def _per_class(self, precision: Mapping[str, float]) -> dict[str, dict[str, float]]:
        classes = len(self.task.class_names)
        counts = sum(np.bincount(im.truth.classes[~im.truth.crowd], minlength=classes) for im in self.images)
        return {
            name: {"AP": or_nan(precision[str(i)]), "boxes": float(np.asarray(counts)[i - 1])}
            for i, name in enumerate(self.task.class_names, start=1)
        }

    def _case(self, image: Scored) -> WorstCase:
        threshold = self.task.head.counted_from
        found, wrong, true = image.counts(threshold)
        f1 = 2 * found / (found + wrong + true) if found + wrong + true else 1.0
        caption = f"F1 {f1:.3f}: {found} of {true} objects found, {wrong} predictions of nothing"
        counted = image.objects.take(image.objects.scores >= threshold)
        matched = image.matched[image.objects.scores >= threshold]
        assert counted.boxes_xyxy is not None
        drawn = {
            "object": image.truth.boxes_xyxy[~image.truth.crowd],
            "found": counted.boxes_xyxy[matched == FOUND],
            "of nothing": counted.boxes_xyxy[matched == FALSE],
        }
        boxes = {name: part[:DRAWN].round(1).tolist() for name, part in drawn.items()}
        return WorstCase(image=str(image.row.image), badness=1 - f1, caption=caption, boxes=boxes)


def _scores(counts: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """Scores (draws,) of images weighted by (images, draws), from (images, 3) found, wrong and true."""
    found, wrong, true = counts.T @ weights  # (draws,) each
    return {"f1": 2 * found / (found + wrong + true), "precision": found / (found + wrong), "recall": found / true}


def _xywh(box: Sequence[float]) -> list[float]:
    left, top, right, bottom = box
    return [left, top, right - left, bottom - top]


def or_nan(value: float) -> float:
    """COCO's -1, where nothing is defined, as NaN."""
    return math.nan if value < 0 else value
