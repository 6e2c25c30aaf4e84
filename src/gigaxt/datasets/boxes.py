"""The boxes of a manifest's rows, whatever format they are in, and the classes that they have."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gigaxt.config import nearest
from gigaxt.datasets.coco import coco_boxes, read_coco
from gigaxt.datasets.geo_boxes import geojson_classes, is_geojson, read_geojson_boxes
from gigaxt.datasets.manifest import Manifest
from gigaxt.datasets.row import Row
from gigaxt.errors import DataError
from gigaxt.image.base import Image


class BoxClasses(NamedTuple):
    """The classes of boxes, in the order of a model's outputs."""

    names: tuple[str, ...]
    ids: tuple[int, ...] | None = None
    """`category_id` of each in COCO JSON; None: by name."""

    def find(self, path: Path, id_: object, name: str | None) -> int:
        """The class of a box.

        Raises:
            DataError: it is none of them.
        """
        if self.ids is not None and id_ is not None:
            if id_ in self.ids:
                return self.ids.index(id_)
            raise DataError(f"{path}: category {id_!r} ({name}) is none of the model's {list(self.ids)[:8]}")
        if name in self.names:
            return self.names.index(name)
        if name is None and len(self.names) == 1:
            return 0
        if name is None:
            raise DataError(f"{path}: a feature has no class; name it in the property `class`")
        raise DataError(f"{path}: class {name!r} is none of the model's{nearest(name, self.names)}")


class RowBoxes(NamedTuple):
    """n boxes of one image, as its file gives them."""

    boxes_xyxy: NDArray[np.float64]
    """(n, 4) left, top, right, bottom in px; may reach beyond the image, or have no area."""
    classes: NDArray[np.int64]
    """(n,) from 0."""
    crowd: NDArray[np.bool_]
    """(n,)"""
    areas: NDArray[np.float64]
    """(n,) px."""


def row_boxes(row: Row, image: Image, classes: BoxClasses) -> RowBoxes:
    """The boxes of a row's image.

    Raises:
        DataError: a file that does not fit, an unknown class, a box outside of the image.
    """
    assert row.target_path is not None
    path = row.target_path
    if is_geojson(path):
        boxes, names = read_geojson_boxes(path, image)
        index = [classes.find(path, None, name) for name in names]
        areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
        return RowBoxes(boxes, np.array(index, dtype=np.int64), np.zeros(len(boxes), np.bool_), areas)
    file, found = coco_boxes(path, image, row.image, row.cells.get("image_id"))
    index_of = {
        category: classes.find(path, file.category_ids[category], file.category_names[category])
        for category in np.unique(found.categories).tolist()
    }
    index = [index_of[category] for category in found.categories.tolist()]
    xyxy = found.boxes_xywh + np.pad(found.boxes_xywh[:, :2], ((0, 0), (2, 0)))
    return RowBoxes(xyxy, np.array(index, dtype=np.int64), found.crowd, found.areas)


def learnt_boxes(found: RowBoxes, image: Image) -> RowBoxes:
    """Those that can be learnt: cut at the image's border, without those that have no area there."""
    kept = have_area(found, image)
    cut = np.clip(found.boxes_xyxy, 0, [image.width, image.height] * 2)
    return RowBoxes(cut[kept], found.classes[kept], found.crowd[kept], found.areas[kept])


def have_area(found: RowBoxes, image: Image) -> NDArray[np.bool_]:
    """Which boxes have an area in the image: (n,)."""
    cut = np.clip(found.boxes_xyxy, 0, [image.width, image.height] * 2)
    return np.asarray((cut[:, 2:] > cut[:, :2]).all(axis=1))


def box_classes(manifest: Manifest) -> BoxClasses:
    """The classes that the files of a manifest know: COCO's categories by id, or GeoJSON's classes by name.

    Raises:
        DataError: a file cannot be read, or COCO files differ in their categories.
    """
    paths = dict.fromkeys(row.target_path for row in manifest.rows if row.target_path is not None)
    coco = [read_coco(path) for path in paths if not is_geojson(path)]
    for file in coco[1:]:
        if (file.category_ids, file.category_names) != (coco[0].category_ids, coco[0].category_names):
            raise DataError(f"{file.path}: expected the categories of {coco[0].path}, got others")
    if coco:
        ids = coco[0].category_ids
        numbers = all(isinstance(id_, int) for id_ in ids)
        return BoxClasses(coco[0].category_names, tuple(ids) if numbers else None)
    names = {name or "object" for path in paths for name in geojson_classes(path)}
    return BoxClasses(tuple(sorted(names)) or ("object",))
