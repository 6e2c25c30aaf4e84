"""What of a head follows from the data that it is trained on."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from gigaxt.datasets.manifest import Manifest
from gigaxt.datasets.statistics import BandStatistics, number_statistics
from gigaxt.errors import DataError
from gigaxt.image.open import open_image
from gigaxt.nn.heads import ClassifyConfig, SegmentConfig
from gigaxt.nn.heads.survival import quantile_edges


def fitted(head: ClassifyConfig, manifest: Manifest) -> ClassifyConfig:
    """The head with mean and standard deviation of a regression's targets, or with the bins of time of survival.

    What the config gives already stays as it is.

    Args:
        head: as the user set it.
        manifest: read for it.

    Raises:
        DataError: a split without any known label, a label that no training case has, or no events to make bins of.
    """
    if manifest.target == "single" or not manifest.cases("train"):
        return head
    if head.label_columns is not None:
        _check_known(manifest)
    numbers = _numbers(manifest, "train")
    if head.target == "regression" and head.target_mean is None:
        std = np.nanstd(numbers, axis=0)
        mean, std = np.nanmean(numbers, axis=0), np.where(std > 0, std, 1.0)  # equal targets have no unit
        return replace(head, target_mean=mean.tolist(), target_std=std.tolist())
    if head.target == "survival" and head.time_bins is None:
        try:
            return replace(head, time_bins=quantile_edges(numbers[numbers[:, 1] == 1, 0], head.classes))
        except DataError as error:
            raise DataError(f"{manifest.path}, split train: {error}") from error
    return head


def fitted_numbers(head: SegmentConfig, manifest: Manifest) -> SegmentConfig:
    """The head with mean and standard deviation of the numbers in the training rasters, or in a sample of them.

    Raises:
        DataError: a raster without the bands that the head has, or no number known. ImageError: one cannot be read.
    """
    if head.target != "regression" or head.target_mean is not None:
        return head
    rows, found = manifest.split("train"), BandStatistics(head.classes)
    for row in rows:
        assert row.target_path is not None
        raster = open_image(row.target_path)
        if raster.channels != head.classes:
            raise DataError(
                f"{raster.name}: expected {head.classes} bands of numbers (model.head.classes), got {raster.channels}"
            )
        found.merge(number_statistics(raster, STATISTICS_PIXELS // len(rows)))
    if rows and not found.count.all():
        raise DataError(
            f"{manifest.path}: no number is known in band {int(found.count.argmin()) + 1} of the rasters of the split "
            "train; correct them, or set model.head.target_mean and target_std"
        )
    std = np.where(found.std > 0, found.std, 1.0)  # equal targets have no unit
    return replace(head, target_mean=found.mean.tolist(), target_std=std.tolist()) if rows else head


STATISTICS_PIXELS = 1 << 28
"""Of all rasters together, from which the unit of the numbers is found."""


def _check_known(manifest: Manifest) -> None:
    columns = manifest.answer_columns
    for split in ("train", "val"):
        known = ~np.isnan(_numbers(manifest, split))
        if len(known) and not known.any():
            raise DataError(
                f"{manifest.path}: no label of the split {split} is known: {', '.join(columns)} are empty in each row"
            )
        empty = [column for i, column in enumerate(columns) if not known[:, i].any()] if len(known) else []
        if split == "train" and empty:
            raise DataError(
                f"{manifest.path}: `{empty[0]}` is empty in each row of the split train, so it cannot be learnt; "
                "leave it out of head.label_columns"
            )


def _numbers(manifest: Manifest, split: str) -> NDArray[np.float64]:
    return np.asarray([case[0].answer.numbers for case in manifest.cases(split)], dtype=np.float64)
