"""The masks of a manifest's objects: polygons and run lengths of COCO JSON, polygons of GeoJSON."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from gigaxt.datasets.boxes import RowBoxes
from gigaxt.datasets.coco import FILES_KEPT, read_coco
from gigaxt.datasets.geo_boxes import is_geojson, read_geojson_polygons
from gigaxt.datasets.row import Row
from gigaxt.errors import DataError
from gigaxt.image.base import Image
from gigaxt.metrics.coco_json import load_json
from gigaxt.shapes.coco_masks import area_and_box, to_rle
from gigaxt.shapes.crops import Crop
from gigaxt.shapes.polygons import Polygon
from gigaxt.shapes.run_lengths import run_lengths
from gigaxt.targets.vector_mask import Painter

OUTSIDE_PX = 2.0
"""That a mask may reach beyond its box."""
FITS, NO_MASK, OTHER_SIZE = "with a mask that fits", "without a mask", "with a mask of another size than the image"
BROKEN, EMPTY = "with a broken mask", "with an empty mask"
OUTSIDE = f"with a mask that reaches more than {OUTSIDE_PX:g} px beyond its box"
Rle = dict[str, Any]
"""COCO's compressed run lengths of a mask in its image."""


def row_masks(row: Row, image: Image, boxes: RowBoxes) -> list[Rle]:
    """A mask for each of the boxes that `row_boxes` found.

    Raises:
        DataError: an object without one, or a broken one, named with the annotation.
    """
    assert row.target_path is not None
    path, size = row.target_path, (image.height, image.width)
    if is_geojson(path):
        return [run_lengths(_drawn(polygons, *size), *size) for polygons in read_geojson_polygons(path, image)]
    entry = read_coco(path).find(row.image, row.cells.get("image_id"))
    found = []
    for (name, segmentation), crowd, box in zip(
        _segmentations(path).get(entry.id, []), boxes.crowd, boxes.boxes_xyxy.tolist(), strict=True
    ):
        if not segmentation and crowd:  # an area where nothing is learnt may be a box
            left, top, right, bottom = box
            segmentation = [[left, top, right, top, right, bottom, left, bottom]]
        try:
            rle = to_rle(segmentation, *size)
        except ValueError as error:
            hint = "" if segmentation else "; without masks learn boxes, with head.kind detect"
            raise DataError(f"{path}: annotation {name}: {error}{hint}") from error
        found.append(rle)
    return found


def count_masks(row: Row, image: Image) -> Counter[str]:
    """Objects of a row's image, without crowds, by what is to be said of their masks; of COCO JSON alone.

    In GeoJSON a polygon is mask and box at once, so that there is nothing to compare.

    Raises:
        DataError: the file does not fit.
    """
    assert row.target_path is not None
    if is_geojson(row.target_path):
        return Counter()
    file = read_coco(row.target_path)
    entry = file.find(row.image, row.cells.get("image_id"))
    boxes, segmentations = file.boxes_of(entry.id), _segmentations(row.target_path).get(entry.id, [])
    objects = zip(segmentations, boxes.boxes_xywh.tolist(), boxes.crowd.tolist(), strict=True)
    return Counter(_state(shape, box, image.height, image.width) for (_, shape), box, crowd in objects if not crowd)


def _state(segmentation: Any, box_xywh: Sequence[float], height: int, width: int) -> str:
    if not segmentation:
        return NO_MASK
    if isinstance(segmentation, Mapping) and list(segmentation.get("size") or ()) != [height, width]:
        return OTHER_SIZE
    try:
        area, (x, y, w, h) = area_and_box(to_rle(segmentation, height, width))
    except ValueError:
        return BROKEN
    if not area:
        return EMPTY
    left, top, box_w, box_h = box_xywh
    beyond = max(left - x, top - y, x + w - left - box_w, y + h - top - box_h)
    return OUTSIDE if beyond > OUTSIDE_PX else FITS


def _segmentations(path: Path) -> dict[Any, list[tuple[str, Any]]]:
    stat = path.stat()
    return _read(path, stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=FILES_KEPT)
def _read(path: Path, time: int, size: int) -> dict[Any, list[tuple[str, Any]]]:
    """Image id -> name and segmentation of its annotations, in the order of the file."""
    found = defaultdict(list)
    for place, item in enumerate(load_json(path, "")[1]["annotations"]):
        name = f"id {item['id']}" if "id" in item else f"{place} (from 0)"
        found[item["image_id"]].append((name, _compact(item.get("segmentation"))))
    return dict(found)


def _compact(segmentation: Any) -> Any:
    """Polygons as arrays, which take a quarter of lists; anything else, as it may be wrong, as it is."""
    if not isinstance(segmentation, list):
        return segmentation
    try:
        return [np.array(polygon, dtype=np.float64) for polygon in segmentation]
    except (TypeError, ValueError):
        return segmentation


def _drawn(polygons: list[Polygon], height: int, width: int) -> Crop:
    """The pixels whose centres lie in polygons, in px of an image."""
    corners = np.concatenate([ring for polygon in polygons for ring in polygon])
    x0, y0 = np.clip(np.floor(corners.min(axis=0)), 0, (width, height)).astype(int).tolist()
    x1, y1 = np.clip(np.ceil(corners.max(axis=0)), 0, (width, height)).astype(int).tolist()
    canvas = np.zeros((y1 - y0, x1 - x0), dtype=np.uint8)
    if canvas.size:
        Painter(polygons, height).paint(canvas, np.ones(len(polygons), dtype=np.uint8), x0, y0)
    return Crop(x0, y0, canvas > 0)
