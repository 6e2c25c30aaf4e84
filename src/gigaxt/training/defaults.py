"""A run's settings where there is no YAML file: those of `gigaxt check data.csv --write`."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from gigaxt.datasets.check import check_manifest
from gigaxt.datasets.run_config import write_config
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
