"""An answer for every pixel of a scene: a class, labels, or numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gigaxt.datasets.manifest import Manifest
from gigaxt.datasets.row import Row
from gigaxt.errors import ConfigError, DataError
from gigaxt.image.base import Image
from gigaxt.image.open import open_image
from gigaxt.nn.heads.segment_config import SegmentConfig
from gigaxt.targets.base import BandsTarget, MaskTarget
from gigaxt.targets.masks import open_mask
from gigaxt.tasks.base import Evaluation, ImageTally, Task, WorstCase, as_table, worst_first
from gigaxt.tasks.bootstrap import about_groups, estimate
from gigaxt.tasks.pixel_scoring import SCORINGS

STRIP_ROWS = 512
"""Rows of a mask that are counted at once."""


class Segmentation(Task):
    """An answer for every pixel, scored from sums over whole scenes.

    Args:
        manifest: where the masks are.
        head: of the model.
    """

    images_per_call = 1  # the sums of each image are wanted, for the worst cases

    def __init__(self, manifest: Manifest, head: SegmentConfig) -> None:
        self.manifest, self.head = manifest, head
        self.class_names = tuple(head.class_names or map(str, range(head.classes)))
        self.scoring = SCORINGS[head.target]
        self.best, self.higher_is_better = self.scoring.best, self.scoring.higher_is_better
        self.metric_names = self.scoring.metric_names

    def target(self, row: Row, image: Image) -> MaskTarget:
        """The mask, on the grid of `image`; see `gigaxt.targets.masks.open_mask`."""
        mask = open_mask(self._mask(row), image, self.head, aoi=row.aoi)
        if self.head.target == "single":
            if mask.dtype.kind not in "uib":
                raise DataError(
                    f"{mask.name}: expected a mask of whole numbers, the classes; got {mask.dtype} "
                    "(numbers are learnt with model.head.target: regression)"
                )
            target = MaskTarget(mask)
        else:
            target = BandsTarget(mask, self.head.classes, numbers=self.head.target == "regression")
        target.check(image)
        return target

    def tally(self) -> SegmentationTally:
        """A fresh, empty tally."""
        return SegmentationTally(self)

    def class_counts(self, split: str) -> list[float]:
        """Pixels of each class in the masks, read strip by strip."""
        if self.head.target != "single":
            raise ConfigError(f"balancing classes needs one class a pixel; the target is {self.head.target!r}")
        classes = self.head.classes
        counts = np.zeros(classes, dtype=np.float64)
        for row in self.manifest.split(split):
            mask = open_mask(self._mask(row), open_image(row.image), self.head, aoi=row.aoi)
            for y in range(0, mask.height, STRIP_ROWS):
                pixels, valid = mask.read_valid(0, y, mask.width, min(STRIP_ROWS, mask.height - y))
                values = pixels[valid].astype(np.int64)
                scored = (values != self.head.ignore) & (values >= 0) & (values < classes)
                counts += np.bincount(values[scored], minlength=classes)
        return [float(count) for count in counts]

    def _mask(self, row: Row) -> Path:
        path = self.manifest.target_of(row)
        assert isinstance(path, Path), "a manifest of masks has no labels"
        return path


class _Counted(NamedTuple):
    """What came of one image."""

    row: Row
    sums: Tensor
    """What scores are made of, float64."""
    loss: float
    weight: float
    """By which the loss of the image enters that of the split."""


class SegmentationTally(ImageTally[_Counted]):
    """The sums of each image of a split."""

    task: Segmentation

    def update(self, rows: Sequence[Row], targets: Sequence[Any], output: Mapping[str, Any]) -> None:
        """Add `SegmentHead.scores` of one image."""
        (row,) = rows
        sums = output[self.task.scoring.key].detach().double().cpu()
        self.images.append(_Counted(row, sums, float(output["loss"]), float(output["weight_sum"])))

    def compute(self) -> Evaluation:
        """Scores with their intervals, and those of each class; the loss is the mean over images, by their pixels."""
        if not self.images:
            raise DataError("there is no image to evaluate")
        scoring = self.task.scoring
        each = torch.stack([counted.sums for counted in self.images])  # (images, ...)
        groups = self.groups
        metrics, intervals = estimate(partial(scoring.scores, each), groups)
        total = each.sum(dim=0)
        weight = sum(counted.weight for counted in self.images)
        loss = sum(counted.loss * counted.weight for counted in self.images)
        return Evaluation(
            images=len(self.images),
            loss=loss / weight if weight else float("nan"),
            metrics=metrics,
            intervals=intervals,
            notes=[*scoring.notes(total, self.task.class_names), *about_groups(len(set(groups)))],
            per_class=as_table(scoring.per_class(total), self.task.class_names),
            confusion=scoring.confusion(total),
            worst=worst_first([case for case in map(self._worst_case, self.images) if case is not None]),
        )

    def _worst_case(self, counted: _Counted) -> WorstCase | None:
        found, row = self.task.scoring.worst(counted.sums), counted.row
        if found is None:
            return None
        badness, caption = found
        return WorstCase(image=str(row.image), badness=badness, caption=caption, mask=str(row.target_path))
