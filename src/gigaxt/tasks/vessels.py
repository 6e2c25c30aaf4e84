"""xView3-SAR: points that are scored as the challenge does."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from gigaxt.datasets.manifest import Manifest
from gigaxt.datasets.points import row_points, table_of
from gigaxt.datasets.row import Row
from gigaxt.datasets.xview3 import SUBMISSION, scene_id, submission_columns
from gigaxt.errors import DataError
from gigaxt.found.points import decided
from gigaxt.image.base import Image
from gigaxt.metrics.matching import PIXEL_M
from gigaxt.metrics.shorelines import read_shoreline
from gigaxt.metrics.xview3 import scene_sums, scores_of
from gigaxt.nn.heads.points import PointsConfig
from gigaxt.targets.points import PointTarget
from gigaxt.tasks.base import Evaluation
from gigaxt.tasks.bootstrap import Scores
from gigaxt.tasks.points import Case, Points, PointsTally, Thresholds

TOLERANCE_M = 200.0
SCORES = ("aggregate", "loc_fscore", "loc_fscore_shore", "vessel_fscore", "fishing_fscore", "length_acc")
TRUTH = (*SUBMISSION, "confidence", "distance_from_shore_km")


class Vessels(Points):
    """The score of xView3-SAR over all scenes, those without a detection included.

    Args:
        manifest: its rows have `scene_id`, and `shoreline` if the score close to shore is wanted.
        head: see `Points`.
    """

    best = "aggregate"
    asked_of: ClassVar[Mapping[str, str]] = {"is_fishing": "is_vessel"}

    def __init__(self, manifest: Manifest, head: PointsConfig) -> None:
        super().__init__(manifest, replace(head, tolerance_px=TOLERANCE_M / PIXEL_M))
        self.metric_names = SCORES
        self.scored: dict[int, PointTarget] = {}
        """Line of a row -> its objects as they are scored: those of LOW confidence do not count."""

    def target(self, row: Row, image: Image) -> PointTarget:
        """The points of one image, those of LOW confidence as `head.low_confidence` says."""
        learnt, spec = super().target(row, image), self.spec._replace(low_confidence="ignore")
        self.scored[row.line] = learnt if spec == self.spec else row_points(self.manifest, row, image, spec)
        return learnt

    def tally(self) -> VesselsTally:
        """A fresh, empty tally."""
        return VesselsTally(self)

    def truth(self, cases: Iterable[Case]) -> dict[str, list[str]]:
        """The labels of some scenes, as they stand in their CSVs."""
        columns: dict[str, list[str]] = {name: [] for name in TRUTH}
        for case in cases:
            assert case.row.target_path is not None
            table = table_of(case.row.target_path, self.spec)
            rows = np.flatnonzero(np.array(table.words("scene_id")) == scene_of(case.row))
            for name in TRUTH:
                words = table.words(name)
                columns[name] += [words[row] for row in rows]
        return columns


class VesselsTally(PointsTally):
    """Detections and objects of each scene of a split."""

    task: Vessels

    def update(self, rows: Sequence[Row], targets: Sequence[Any], output: Mapping[str, Any]) -> None:
        """See `PointsTally.update`; what was found is compared with the objects as they are scored."""
        super().update(rows, [self.task.scored[row.line] for row in rows], output)

    def compute(self) -> Evaluation:
        """The official scores; precision, recall and F1 of all objects and of the flags in the table of classes."""
        evaluation, notes = super().compute(), []
        empty = sum(not case.true(0) for case in self.images)
        if empty:
            notes.append(
                f"{empty} of {len(self.images)} scenes have no object to find: the official scores leave them out, "
                "false alarms there, too, which count in the table of classes"
            )
        if not any(row.cells.get("shoreline") for row in self.rows):
            notes.append("no shorelines: the score close to shore is 0, and the aggregate at most 0.8")
        return replace(evaluation, notes=[*evaluation.notes, *notes])

    def scoring(self, thresholds: Thresholds) -> Scores:
        """The official scores of weighted scenes; not defined where no scene has an object."""
        truth = self.task.truth(self.images)
        if not truth["scene_id"]:
            return lambda weights: dict.fromkeys(SCORES, torch.full(weights.shape[1:], math.nan, dtype=weights.dtype))
        head = replace(self.task.head, threshold=thresholds.classes.tolist(), flag_threshold=thresholds.flags.tolist())
        predictions: dict[str, list[Any]] = {name: [] for name in SUBMISSION}
        for case in self.images:
            for name, column in submission_columns(decided(case.found, head), scene_of(case.row)).items():
                predictions[name] += column
        scenes = [scene_of(case.row) for case in self.images]
        shorelines = shorelines_of(self.task.manifest.path, self.rows)
        sums = scene_sums(predictions, truth, shorelines, scenes=scenes)
        place = {scene: i for i, scene in enumerate(sums.scenes)}
        columns = np.stack(list(sums.columns.values()))  # (sums, scenes in predictions or truth)
        columns = np.pad(columns, ((0, 0), (0, 1)))[:, [place.get(scene, -1) for scene in scenes]]  # others: 0

        def scores(weights: Tensor) -> dict[str, Tensor]:
            found = scores_of(dict(zip(sums.columns, columns @ weights.numpy(), strict=True)))
            return {name: torch.from_numpy(found[name]) for name in SCORES}

        return scores


def scene_of(row: Row) -> str:
    """The id of a row's scene: its cell `scene_id`, or the name of its folder."""
    return row.cells.get("scene_id") or scene_id(row.image)


def shorelines_of(manifest: Path, rows: Iterable[Row]) -> dict[str, Any] | None:
    """Contours of each scene; None where no row names a shoreline.

    Raises:
        DataError: some rows name one and others do not, or a file is missing.
    """
    rows = list(rows)
    named = [row for row in rows if row.cells.get("shoreline")]
    if not named:
        return None
    if len(named) < len(rows):
        lacking = next(row for row in rows if not row.cells.get("shoreline"))
        raise DataError(
            f"{manifest} line {lacking.line}: expected a path in column `shoreline`, as in other rows, got nothing; "
            "without any, the score close to shore is 0"
        )
    return {scene_of(row): [read_shoreline(manifest.parent / row.cells["shoreline"])] for row in named}
