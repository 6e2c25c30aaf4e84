"""What the points of a manifest hold, for `gigaxt check`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from gigaxt.datasets.manifest import Manifest
from gigaxt.datasets.points import Spec, class_words, columns_of, row_points
from gigaxt.datasets.row import Row
from gigaxt.draw import Picture, with_boxes
from gigaxt.errors import DataError
from gigaxt.image.base import Image
from gigaxt.nn.heads.points import XVIEW3_FLAGS, XVIEW3_NUMBERS, PointsConfig
from gigaxt.targets.points import UNKNOWN

IGNORED_NAME, UNKNOWN_NAME = "(ignored: nothing is learnt there)", "(of unknown class)"
"""What points that are of no class are counted as."""
MARK_PX = 4
"""Half the side of the square that marks a point in a picture."""


def suggested_head(rows: Sequence[Row]) -> PointsConfig:
    """The head that the columns of the points suggest: that of xView3-SAR, or classes of a column `class`."""
    paths = list(dict.fromkeys(row.target_path for row in rows if row.target_path is not None))
    columns = _columns(paths)
    if set(XVIEW3_FLAGS + XVIEW3_NUMBERS) <= columns:
        flags, numbers = list(XVIEW3_FLAGS), list(XVIEW3_NUMBERS)
        return PointsConfig(scoring="xview3", flags=flags, numbers=numbers, logarithmic=numbers)
    if "class" not in columns:
        return PointsConfig()
    names: set[str] = set()
    for path in paths:
        try:
            names |= class_words(path, Spec.of(PointsConfig(classes=2, class_names=["", " "])))
        except DataError:
            continue  # told where the points are counted
    return PointsConfig(classes=len(names), class_names=sorted(names)) if len(names) > 1 else PointsConfig()


def count_points(manifest: Manifest, row: Row, image: Image, head: PointsConfig) -> Counter[str]:
    """Points of a row's image by class; raises as `row_points`."""
    target = row_points(manifest, row, image, Spec.of(head))
    names = head.class_names or ["object"]
    counts = Counter({IGNORED_NAME: int(target.ignored.sum())})
    for number in target.classes[~target.ignored].tolist():
        counts[UNKNOWN_NAME if number == UNKNOWN else names[number]] += 1
    return +counts


def draw_points(picture: Picture, manifest: Manifest, row: Row, image: Image, head: PointsConfig) -> Picture:
    """The picture of a row's whole image with its points; raises as `row_points`."""
    target = row_points(manifest, row, image, Spec.of(head))
    shown = ~target.ignored & (target.classes != UNKNOWN)
    at = (target.places * (picture.shape[0] / image.height, picture.shape[1] / image.width))[shown, ::-1]
    boxes = np.concatenate([at - MARK_PX, at + MARK_PX], axis=1)
    return with_boxes(picture, boxes, target.classes[shown], head.class_names or ["object"])


def _columns(paths: Sequence[Path]) -> set[str]:
    for path in paths:
        try:
            return set(columns_of(path))
        except DataError:
            continue
    return set()
