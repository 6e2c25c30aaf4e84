"""Scores of the fields' official programs, on CPU: xView3-SAR's and COCO's.

Both take paths or loaded data and return plain numbers under the official names. The tests compare them with recorded
results of the official programs.
"""

from __future__ import annotations

from gigaxt.metrics.coco import coco_score
from gigaxt.metrics.xview3 import xview3_score

__all__ = ["coco_score", "xview3_score"]
