"""What the points of a manifest hold, for `gigaxt check`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from gigaxt.datasets.points import Spec, class_words, columns_of, read_points
from gigaxt.datasets.row import Row
from gigaxt.draw import Picture, with_boxes
from gigaxt.errors import DataError
from gigaxt.image.base import Image
from gigaxt.nn.heads.points import XVIEW3_FLAGS, XVIEW3_NUMBERS, PointsConfig
from gigaxt.targets.points import UNKNOWN, PointTarget

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


def count_points(row: Row, image: Image, head: PointsConfig) -> Counter[str]:
    """Points of a row's image by class; raises as `read_points`."""
    target = _read(row, image, head)
    names = head.class_names or ["object"]
    counts = Counter({IGNORED_NAME: int(target.ignored.sum())})
    for number in target.classes[~target.ignored].tolist():
        counts[UNKNOWN_NAME if number == UNKNOWN else names[number]] += 1
    return +counts


def draw_points(picture: Picture, row: Row, image: Image, head: PointsConfig) -> Picture:
    """The picture of a row's whole image with its points; raises as `read_points`."""
    target = _read(row, image, head)
    shown = ~target.ignored & (target.classes != UNKNOWN)
    at = (target.places * (picture.shape[0] / image.height, picture.shape[1] / image.width))[shown, ::-1]
    boxes = np.concatenate([at - MARK_PX, at + MARK_PX], axis=1)
    return with_boxes(picture, boxes, target.classes[shown], head.class_names or ["object"])


def _read(row: Row, image: Image, head: PointsConfig) -> PointTarget:
    assert row.target_path is not None
    return read_points(row.target_path, Spec.of(head), image, row.cells.get("scene_id") or None)


def _columns(paths: Sequence[object]) -> set[str]:
    for path in paths:
        try:
            return set(columns_of(path))  # type: ignore[arg-type]  # a Path
        except DataError:
            continue
    return set()
