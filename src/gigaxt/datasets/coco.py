"""Boxes of COCO JSON for training: what a file says of each of its images, checked once and kept as arrays.

Crowds become areas where nothing is learnt; an image without annotations is one without objects; ids may be any numbers
or texts, with gaps. Boxes that reach beyond their image are cut, those without an area are left out.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gigaxt.errors import DataError
from gigaxt.image.base import Image
from gigaxt.image.part_file import PartFile
from gigaxt.metrics.coco_json import load_json, read_truth

FILES_KEPT = 4
"""JSON files that stay read; each holds the boxes of many images."""


class LabelledBoxes(NamedTuple):
    """n boxes of one image as its file gives them."""

    boxes_xywh: NDArray[np.float64]
    """(n, 4) px."""
    categories: NDArray[np.int64]
    """(n,) indices into the file's category names."""
    crowd: NDArray[np.bool_]
    """(n,)"""
    areas: NDArray[np.float64]
    """(n,) px, of the mask where there is one: by it COCO tells small from large."""

    def take(self, part: slice) -> LabelledBoxes:
        """Some of them."""
        return LabelledBoxes(self.boxes_xywh[part], self.categories[part], self.crowd[part], self.areas[part])


class ImageEntry(NamedTuple):
    """What a file says of an image."""

    id: Any
    file_name: str
    width: int | None
    height: int | None


@dataclass(frozen=True, kw_only=True)
class CocoFile:
    """A read COCO JSON."""

    path: Path
    category_ids: tuple[Any, ...]
    """In their order, which is that of the classes."""
    category_names: tuple[str, ...]
    images: dict[Any, ImageEntry]
    boxes: LabelledBoxes
    """Of all images, those of one image together."""
    slices: dict[Any, slice]
    """Image id -> its boxes."""

    def boxes_of(self, image_id: Any) -> LabelledBoxes:
        """The boxes of an image, in the order of the file."""
        return self.boxes.take(self.slices.get(image_id, slice(0, 0)))

    def find(self, image: Path, image_id: str | None = None) -> ImageEntry:
        """The entry of an image file: that of `image_id`, or the one whose `file_name` the path ends with.

        Raises:
            DataError: there is none, or there are several.
        """
        if image_id:
            found = [entry for id_, entry in self.images.items() if str(id_) == image_id]
            where = f"the id {image_id!r}"
        else:
            same_name = self._by_name.get(image.name, [])
            ends = [e for e in same_name if image.parts[-len(Path(e.file_name).parts) :] == Path(e.file_name).parts]
            found, where = ends or same_name, f"the file_name of {image}"
        if len(found) != 1:
            raise DataError(
                f"{self.path}: expected one of `images` with {where}, got {len(found)}; "
                "a column `image_id` in the CSV says which is meant"
            )
        return found[0]

    @cached_property
    def _by_name(self) -> dict[str, list[ImageEntry]]:
        found: dict[str, list[ImageEntry]] = {}
        for entry in self.images.values():
            found.setdefault(Path(entry.file_name).name, []).append(entry)
        return found


_READ: dict[tuple[Path, int, int], CocoFile] = {}


def read_coco(path: Path) -> CocoFile:
    """Read and check a COCO JSON; files read last stay in memory.

    Raises:
        DataError: no such file or JSON, no `images`, an unknown category or image, a box that is not finite, or a mask
            that is broken where it stands for a missing box; named with the annotation.
    """
    try:
        stat = path.stat()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}; expected a JSON file") from error
    key = (path.resolve(), stat.st_mtime_ns, stat.st_size)
    if key not in _READ:
        found = _read(path)
        while len(_READ) >= FILES_KEPT:
            _READ.pop(next(iter(_READ)))
        _READ[key] = found
    return _READ[key]


def _read(path: Path) -> CocoFile:
    _, data = load_json(path, "")
    numbering, objects = read_truth(data, "bbox", name=str(path))
    names = {entry["id"]: str(entry.get("name", entry["id"])) for entry in data["categories"]}
    images = {entry["id"]: _entry(path, entry) for entry in data["images"]}
    ids = list(numbering.images)  # number - 1 -> id
    number = np.array([item["image_id"] for item in objects], dtype=np.int64) - 1
    order = np.argsort(number, kind="stable")
    starts = np.searchsorted(number[order], np.arange(len(ids) + 1))
    boxes = LabelledBoxes(
        np.array([item["bbox"] for item in objects], dtype=np.float64).reshape(-1, 4)[order],
        (np.array([item["category_id"] for item in objects], dtype=np.int64) - 1)[order],
        np.array([item["iscrowd"] for item in objects], dtype=np.bool_)[order],
        np.array([item["area"] for item in objects], dtype=np.float64)[order],
    )
    return CocoFile(
        path=path,
        category_ids=tuple(numbering.categories),
        category_names=tuple(names[id_] for id_ in numbering.categories),
        images=images,
        boxes=boxes,
        slices={id_: slice(int(a), int(b)) for id_, a, b in zip(ids, starts[:-1], starts[1:], strict=True)},
    )


def _entry(path: Path, entry: Mapping[str, Any]) -> ImageEntry:
    sides = []
    for key in ("width", "height"):
        side = entry.get(key)
        if side is not None and (not isinstance(side, int) or side < 1):
            raise DataError(
                f"{path}: image {entry['id']!r}: expected a whole number above 0 as {key}, got {side!r:.60}"
            )
        sides.append(side)
    return ImageEntry(entry["id"], str(entry.get("file_name", "")), *sides)


def coco_boxes(path: Path, image: Image, image_path: Path, image_id: str | None) -> tuple[CocoFile, LabelledBoxes]:
    """What a COCO JSON says of an opened image.

    Raises:
        DataError: the image is not in it, is of another size, or a box lies outside of it.
    """
    file = read_coco(path)
    entry = file.find(image_path, image_id)
    size = (entry.width or image.width, entry.height or image.height)
    if size != (image.width, image.height):
        raise DataError(
            f"{path}: image {entry.id!r} has {size[0]} x {size[1]} px there, but {image.name} has "
            f"{image.width} x {image.height}"
        )
    boxes = file.boxes_of(entry.id)
    x, y, w, h = boxes.boxes_xywh.T
    outside = (x >= image.width) | (y >= image.height) | (x + w <= 0) | (y + h <= 0)
    outside &= (w > 0) & (h > 0)
    if outside.any():
        raise DataError(
            f"{path}: image {entry.id!r}: box {boxes.boxes_xywh[outside][0].tolist()} (x, y, width, height) lies "
            f"outside of {image.name}, {image.width} x {image.height} px; correct or remove it"
        )
    return file, boxes


def import_coco(
    json: Path, images: Path, out: Path, *, split: str | None = None, append: bool = False
) -> dict[str, int]:
    """Write a manifest of the images of a COCO JSON, which stays where it is and is what is learnt and scored.

    Args:
        json: the file.
        images: the folder that its `file_name`s count from.
        out: the CSV to make: image, boxes, image_id and, if given, split.
        split: of all of these images: train, val or test.
        append: keep the lines that `out` has, which must be of the same columns.

    Returns:
        How many images, `without` objects, boxes, crowds, categories, and boxes without an area (`empty`).

    Raises:
        DataError: the JSON does not fit, or images are missing. ImageError: the CSV cannot be written.
    """
    file = read_coco(json)
    missing = [entry.file_name for entry in file.images.values() if not (images / entry.file_name).is_file()]
    if missing:
        raise DataError(
            f"{json}: {len(missing)} of {len(file.images)} images are not in {images}, such as {missing[0]!r}"
        )
    header = ["image", "boxes", "image_id", *(["split"] if split else [])]
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    if append and out.exists():
        text.write(_lines_of(out, header))
    else:
        table.writerow(header)
    for entry in file.images.values():
        cells = [str((images / entry.file_name).resolve()), str(json.resolve()), entry.id]
        table.writerow([*cells, *([split] if split else [])])
    part = PartFile(out)
    try:
        part.append(text.getvalue().encode())
        part.commit()
    finally:
        part.discard()
    with_boxes = sum(part.stop > part.start for part in file.slices.values())
    return {
        "images": len(file.images),
        "without": len(file.images) - with_boxes,
        "boxes": len(file.boxes.crowd),
        "crowds": int(file.boxes.crowd.sum()),
        "empty": int((file.boxes.boxes_xywh[:, 2:] <= 0).any(axis=1).sum()),
        "categories": len(file.category_ids),
    }


def _lines_of(path: Path, header: list[str]) -> str:
    """The text of a CSV that has this header."""
    text = path.read_text(encoding="utf-8")
    if text.partition("\n")[0].strip() != ",".join(header):
        raise DataError(f"{path}: expected the columns {','.join(header)}, got {text.partition(chr(10))[0]!r:.80}")
    return text if text.endswith("\n") else f"{text}\n"
