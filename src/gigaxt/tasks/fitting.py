"""What of a head follows from the data that it is trained on."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from gigaxt.datasets.manifest import Manifest
from gigaxt.errors import DataError
from gigaxt.nn.heads import ClassifyConfig
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
