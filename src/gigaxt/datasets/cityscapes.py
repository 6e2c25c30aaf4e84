"""Cityscapes' gtFine as COCO JSON: boxes and masks of its eight classes with instances."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import find_objects

from gigaxt.errors import DataError
from gigaxt.image.open import open_image
from gigaxt.image.part_file import PartFile
from gigaxt.shapes.crops import Crop
from gigaxt.shapes.run_lengths import run_lengths

CATEGORIES = {
    24: "person",
    25: "rider",
    26: "car",
    27: "truck",
    28: "bus",
    31: "train",
    32: "motorcycle",
    33: "bicycle",
}
"""Cityscapes' label ids, which stay the category ids."""
SUFFIX = "_gtFine_instanceIds.png"
INSTANCES = 1000
"""An instance's pixels hold label id * 1000 + number; those of a group that was not told apart the label id alone."""


def cityscapes_to_coco(folder: Path, out: Path) -> Path:
    """Write a COCO JSON of `gtFine/train`, `val` or `test`. Groups become crowds.

    Args:
        folder: holds cities/NAME_gtFine_instanceIds.png.
        out: the JSON; its file names, city/NAME_leftImg8bit.png, count from `leftImg8bit/train`, `val` or `test`.

    Raises:
        DataError: no such files. ImageError: one cannot be read.
    """
    paths = sorted(folder.glob(f"*/*{SUFFIX}"))
    if not paths:
        raise DataError(f"{folder}: expected the files of gtFine/train or val, CITY/NAME{SUFFIX}, got none")
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, path in enumerate(paths, start=1):
        mask = open_image(path)
        name = path.name.replace(SUFFIX, "_leftImg8bit.png")
        images.append({"id": number, "file_name": f"{path.parent.name}/{name}"})
        images[-1] |= {"width": mask.width, "height": mask.height}
        for entry in _instances(mask.read(0, 0, mask.width, mask.height)[..., 0].astype(np.int64)):
            annotations.append({"id": len(annotations) + 1, "image_id": number, **entry})
    categories = [{"id": id_, "name": name} for id_, name in CATEGORIES.items()]
    data = {"images": images, "categories": categories, "annotations": annotations}
    file = PartFile(out)
    try:
        file.append(json.dumps(data).encode())
        file.commit()
    finally:
        file.discard()
    return out


def _instances(values: NDArray[np.int64]) -> list[dict[str, Any]]:
    """Boxes, areas and run lengths of the instances in a raster (h, w) of Cityscapes' instance ids."""
    ids, compact = np.unique(values, return_inverse=True)
    areas = np.bincount(compact.ravel())
    found = []
    compact = compact.reshape(values.shape)
    for i, (id_, place) in enumerate(zip(ids.tolist(), find_objects(compact + 1), strict=True)):
        label = id_ // INSTANCES if id_ >= INSTANCES else id_
        if label not in CATEGORIES or place is None:
            continue
        rows, cols = place
        box = [cols.start, rows.start, cols.stop - cols.start, rows.stop - rows.start]
        mask = run_lengths(Crop(cols.start, rows.start, compact[place] == i), *values.shape)
        entry = {"category_id": label, "bbox": box, "area": int(areas[i]), "iscrowd": int(id_ < INSTANCES)}
        found.append({**entry, "segmentation": mask})
    return found
