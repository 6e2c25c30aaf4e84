"""Objects of a scene with their boxes and masks, as a head learns them that sees the whole scene at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gigaxt.errors import DataError
from gigaxt.shapes.crops import Crop
from gigaxt.targets.base import Grid, SceneTarget
from gigaxt.targets.boxes import BoxTarget, as_array, as_boxes


class InstanceTarget(SceneTarget):
    """Boxes of one scene with classes and masks.

    Args:
        boxes: with the classes, and which of them are areas where nothing is learnt.
        crops: the mask of each box, in px of the image.

    Raises:
        DataError: another number of masks than of boxes.
    """

    def __init__(self, boxes: BoxTarget, crops: Sequence[Crop]) -> None:
        if len(crops) != len(boxes.classes):
            raise DataError(
                f"{boxes.name}: expected a mask for each of {len(boxes.classes)} boxes, got {len(crops)} masks"
            )
        self.boxes, self.crops, self.name = boxes, list(crops), boxes.name

    def check(self, image: Grid) -> None:
        """Boxes lie in their image."""
        self.boxes.check(image)

    def draw(self, x: int, y: int, w: int, h: int) -> dict[str, NDArray[Any]]:
        """Nothing: it is learnt as a whole."""
        return {}

    def objects_at(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """The centres of boxes that are learnt, each as likely."""
        return self.boxes.objects_at()

    def turned(self, k: int) -> InstanceTarget:
        """See `SceneTarget.turned`."""
        height, width = self.boxes.size
        if k & 4:
            height, width = width, height
        crops = []
        for crop in self.crops:
            crop = crop.transposed() if k & 4 else crop
            crop = crop.transposed().mirrored(height).transposed() if k & 2 else crop
            crops.append(crop.mirrored(width) if k & 1 else crop)
        return InstanceTarget(self.boxes.turned(k), crops)

    def cropped(self, x: int, y: int, width: int, height: int) -> InstanceTarget:
        """See `SceneTarget.cropped`; what is left too little of is ignored, as of boxes."""
        seen = self.boxes.share_in(x, y, width, height) > 0
        crops = [crop.cut(x, y, width, height) for crop, kept in zip(self.crops, seen, strict=True) if kept]
        return InstanceTarget(self.boxes.cropped(x, y, width, height), crops)

    def resampled(self, scale_x: float, scale_y: float) -> InstanceTarget:
        """See `SceneTarget.resampled`."""
        crops = [crop.scaled(scale_x, scale_y) for crop in self.crops]
        return InstanceTarget(self.boxes.resampled(scale_x, scale_y), crops)

    def resized(self, width: int, height: int) -> InstanceTarget:
        """See `SceneTarget.resized`."""
        scale_y, scale_x = self.boxes.size[0] / height, self.boxes.size[1] / width
        return InstanceTarget(self.boxes.resized(width, height), [crop.scaled(scale_x, scale_y) for crop in self.crops])


def as_instances(target: Any, classes: int) -> InstanceTarget:
    """Objects from an InstanceTarget, or from a mapping as torchvision's Mask R-CNN takes it.

    Args:
        target: `boxes` (n, 4) left, top, right, bottom in px, `labels` (n,) from 0, `masks` (n, height, width), and
            `ignored` (n,) if wanted.
        classes: how many there are.

    Raises:
        DataError: something else, or a class out of range.
    """
    if isinstance(target, Mapping) and {"boxes", "labels", "masks"} <= target.keys():
        boxes = as_boxes({key: part for key, part in target.items() if key != "masks"}, classes)
        masks = np.asarray(as_array(target["masks"]))
        if masks.ndim != 3 or masks.dtype.kind not in "bui":
            raise DataError(f"expected masks (n, height, width) of whole numbers, got {masks.dtype} {masks.shape}")
        boxes.size_px = masks.shape[1:]
        return InstanceTarget(boxes, [Crop(0, 0, mask != 0) for mask in masks])
    if not isinstance(target, InstanceTarget):
        raise DataError(
            "expected an InstanceTarget, or a mapping with `boxes`, `labels` and `masks`, got "
            f"{type(target).__name__}; the head learns whole scenes, not windows of them"
        )
    as_boxes(target.boxes, classes)
    return target
