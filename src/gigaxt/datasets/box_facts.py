"""What the boxes of a manifest hold, for `gigaxt check`."""

from __future__ import annotations

from collections import Counter

import numpy as np

from gigaxt.datasets.boxes import BoxClasses, learnt_boxes, row_boxes
from gigaxt.datasets.row import Row
from gigaxt.draw import Picture, with_boxes
from gigaxt.image.base import Image

CROWDS, EMPTY = "(crowds: nothing is learnt there)", "(without an area in the image: left out)"
"""What boxes that are no objects are counted as."""


def count_boxes(row: Row, image: Image, classes: BoxClasses) -> Counter[str]:
    """Boxes of a row's image by class, and `CROWDS` and `EMPTY`; raises as `row_boxes`."""
    found = row_boxes(row, image, classes)
    learnt = learnt_boxes(found, image)
    names = np.asarray(classes.names)[learnt.classes[~learnt.crowd]]
    others = {CROWDS: int(learnt.crowd.sum()), EMPTY: len(found.crowd) - len(learnt.crowd)}
    return Counter(names.tolist()) + Counter(others)


def draw_boxes(picture: Picture, row: Row, image: Image, classes: BoxClasses) -> Picture:
    """The picture of a row's whole image with its boxes; raises as `row_boxes`."""
    boxes = learnt_boxes(row_boxes(row, image, classes), image)
    scale = np.tile([picture.shape[1] / image.width, picture.shape[0] / image.height], 2)
    return with_boxes(picture, boxes.boxes_xyxy * scale, boxes.classes, classes.names)
