"""A run's settings where there is no YAML file: those of `gigaxt check data.csv --write`."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from gigaxt.datasets.check import check_manifest
from gigaxt.datasets.manifest import Manifest
from gigaxt.datasets.run_config import write_config
from gigaxt.nn.heads import ClassifyConfig, HeadConfig
from gigaxt.training.config import read_yaml

EXAMPLE: dict[str, Any] = {
    "data": {"csv": "data.csv"},
    "model": {"region_encoder": {"name": "convnextv2_atto"}, "context": {}, "head": {"kind": "classify", "classes": 2}},
}
"""What `gigaxt train --help` shows as defaults."""


def config_for(csv: str) -> dict[str, Any]:
    """Plain data of a RunConfig that fits the images of a CSV.

    Raises:
        DataError: the CSV does not fit, or no image could be read.
    """
    report = check_manifest(csv)
    with tempfile.TemporaryDirectory() as folder:
        return read_yaml(write_config(report, csv, Path(folder) / "run.yaml"))


def with_classes_of(csv: str, head: HeadConfig) -> HeadConfig:
    """The head of a model to start from, with the classes of a CSV where these are others; of classifiers by a label.

    Raises:
        DataError: the CSV does not fit.
    """
    if not isinstance(head, ClassifyConfig) or head.target not in ("single", "multi") or head.label_columns is not None:
        return head
    names = Manifest.read(csv, task="classification", target=head.target).classes
    own = head.class_names or [str(index) for index in range(head.classes)]
    if set(names) <= set(own) or (head.class_names is None and len(names) == head.classes):
        return head
    return replace(head, classes=len(names), class_names=list(names), class_weights=None)
