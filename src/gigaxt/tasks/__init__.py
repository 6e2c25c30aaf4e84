"""Loss, metrics and decoding for one kind of answer each."""

from __future__ import annotations

from pathlib import Path

from gigaxt.datasets.manifest import Manifest
from gigaxt.datasets.split import Fold
from gigaxt.errors import ConfigError
from gigaxt.nn.heads import DetectConfig, HeadConfig, MaskRCNNConfig, PointsConfig, SegmentConfig
from gigaxt.tasks.base import Evaluation, Tally, Task, WorstCase
from gigaxt.tasks.classification import Classification
from gigaxt.tasks.detection import Detection
from gigaxt.tasks.fitting import fitted, fitted_numbers
from gigaxt.tasks.instances import Instances
from gigaxt.tasks.points import Points, fitted_points
from gigaxt.tasks.segmentation import Segmentation
from gigaxt.tasks.vessels import Vessels

__all__ = [
    "Classification",
    "Detection",
    "Evaluation",
    "Instances",
    "Points",
    "Segmentation",
    "Tally",
    "Task",
    "Vessels",
    "WorstCase",
    "fitted",
    "fitted_numbers",
    "fitted_points",
    "make_task",
    "read_manifest",
]


def read_manifest(head: HeadConfig, csv: str | Path, *, split_seed: int = 0, fold: Fold | None = None) -> Manifest:
    """The manifest as the head of a model understands it.

    Args:
        head: of the model.
        csv: the manifest.
        split_seed: divides it where it has no `split` column, and into folds.
        fold: which of how many folds is the split `val`; None: as the CSV says.

    Raises:
        DataError: the CSV has no column for this head, or labels that are not the model's classes.
        ConfigError: the head has another number of classes than the CSV, and no `class_names` to tell them by.
    """
    if isinstance(head, DetectConfig | MaskRCNNConfig):
        return Manifest.read(csv, task="detection", split_seed=split_seed, fold=fold)
    if isinstance(head, PointsConfig):
        return Manifest.read(csv, task="points", split_seed=split_seed, fold=fold)
    if isinstance(head, SegmentConfig):
        return Manifest.read(csv, task="segmentation", target=head.target, split_seed=split_seed, fold=fold)

    def read(classes: list[str] | None) -> Manifest:
        return Manifest.read(
            csv,
            task="classification",
            target=head.target,
            label_columns=head.label_columns,
            classes=classes,
            split_seed=split_seed,
            fold=fold,
        )

    manifest = read(head.class_names)
    if head.target == "survival":
        return manifest  # its outputs are bins of time, of which the CSV knows nothing
    if head.target != "regression" and head.class_names is None and head.label_columns is None:
        indices = [str(index) for index in range(head.classes)]
        if set(manifest.classes) <= set(indices):  # class indices, of which some may not occur
            return read(indices)
    if manifest.outputs != head.classes:
        raise ConfigError(
            f"model.head.classes is {head.classes}, but {csv} has {manifest.outputs}"
            f"{': ' + ', '.join(manifest.classes[:8]) if manifest.classes else ' numbers a row'}; set it to that "
            f"(--model.head.classes {manifest.outputs})"
        )
    return manifest


def make_task(head: HeadConfig, manifest: Manifest) -> Task:
    """The task that goes with a model's head."""
    if isinstance(head, SegmentConfig):
        return Segmentation(manifest, head)
    if isinstance(head, DetectConfig):
        return Detection(manifest, head)
    if isinstance(head, MaskRCNNConfig):
        return Instances(manifest, head)
    if isinstance(head, PointsConfig):
        return Vessels(manifest, head) if head.scoring == "xview3" else Points(manifest, head)
    return Classification(manifest, head.class_names, head.time_bins)
