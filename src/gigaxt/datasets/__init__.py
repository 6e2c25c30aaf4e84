"""What a model learns from: manifests of image files, and synthetic scenes."""

from __future__ import annotations

from gigaxt.datasets.check import check_manifest, write_config
from gigaxt.datasets.legend import LegendConfig, make_dataset
from gigaxt.datasets.manifest import Manifest
from gigaxt.datasets.report import CheckReport
from gigaxt.datasets.row import Row

__all__ = ["CheckReport", "LegendConfig", "Manifest", "Row", "check_manifest", "make_dataset", "write_config"]
