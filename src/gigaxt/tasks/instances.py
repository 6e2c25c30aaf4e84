"""Objects of a scene with boxes and masks: COCO's average precision of both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from gigaxt.datasets.boxes import RowBoxes, have_area, learnt_boxes, row_boxes
from gigaxt.datasets.instances import Rle, row_masks
from gigaxt.datasets.row import Row
from gigaxt.found.objects import Objects
from gigaxt.image.base import Image
from gigaxt.metrics import coco_score
from gigaxt.shapes.crops import painted
from gigaxt.shapes.run_lengths import crop_of, run_lengths
from gigaxt.targets.boxes import BoxTarget
from gigaxt.targets.instances import InstanceTarget
from gigaxt.tasks.base import Evaluation
from gigaxt.tasks.detection import Detection, DetectionTally, Masks, or_nan

MASK_METRICS = {"mask_AP": "AP", "mask_AP50": "AP50", "mask_AP75": "AP75"}
"""Name of a metric -> COCO's name of it."""


class TruthInstances(InstanceTarget):
    """Objects to learn, which remember what their file says of them for the scores."""

    truth: RowBoxes
    truth_masks: list[Rle]
    size_px: tuple[int, int]


class Instances(Detection):
    """Objects with boxes, masks and classes; arguments as of `Detection`."""

    best = "mask_AP"
    metric_names: tuple[str, ...] = (*MASK_METRICS, *Detection.metric_names)

    def target(self, row: Row, image: Image) -> TruthInstances:  # type: ignore[override]  # the target of another head
        """The objects, in px of `image`."""
        truth, size = row_boxes(row, image, self.classes), (image.height, image.width)
        masks, boxes = row_masks(row, image, truth), learnt_boxes(truth, image)
        target = TruthInstances(
            BoxTarget(boxes.boxes_xyxy, boxes.classes, boxes.crowd, name=str(row.target_path), size_px=size),
            [crop_of(rle) for rle, kept in zip(masks, have_area(truth, image), strict=True) if kept],
        )
        target.truth, target.truth_masks, target.size_px = truth, masks, size
        return target

    def tally(self) -> InstancesTally:
        """A fresh, empty tally."""
        return InstancesTally(self)


class InstancesTally(DetectionTally):
    """Objects of each image of a split with their masks, and the truth."""

    def update(self, rows: Sequence[Row], targets: Sequence[Any], output: Mapping[str, Any]) -> None:
        """Add what `Detection.answer` says of one image."""
        (target,) = targets
        objects: Objects = output["objects"]
        super().update(rows, targets, {**output, "objects": replace(objects, masks=None)})
        self.images[-1] = self.images[-1]._replace(masks=Masks(target.truth_masks, _rles(objects, *target.size_px)))

    def compute(self) -> Evaluation:
        """As of boxes, and COCO's AP of the masks."""
        found = super().compute()
        scores = coco_score(*self.as_coco(), iou="segm", max_dets=(1, 10, self.most_of_a_class()))
        found.metrics = {name: or_nan(scores["stats"][key]) for name, key in MASK_METRICS.items()} | found.metrics
        for i, name in enumerate(self.task.class_names, start=1):
            found.per_class[name] = {"mask_AP": or_nan(scores["per_category_AP"][str(i)]), **found.per_class[name]}
        return found

    def _loss_of(self, output: Mapping[str, Any]) -> tuple[float, float]:
        return float(output["loss"]), 1.0


def _rles(objects: Objects, height: int, width: int) -> list[Rle]:
    assert objects.masks is not None
    assert objects.boxes_xyxy is not None
    crops = (
        painted(mask, box, height, width) for mask, box in zip(objects.masks, objects.boxes_xyxy.tolist(), strict=True)
    )
    return [run_lengths(crop, height, width) for crop in crops]
