"""COCO JSON as faster-coco-eval takes it: checked, and numbered anew.

So broken input is an error with a name instead of another score, and ids may be any numbers or texts. (pycocotools
takes an object with id 0 for one that nobody found.) As in pycocotools `iscrowd` decides what is ignored, and `ignore`
is not read; other than there, `iscrowd` and `area` may be missing.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal

import numpy as np

from gigaxt.errors import DataError
from gigaxt.shapes.coco_masks import area_and_box, to_rle

Iou = Literal["bbox", "segm"]
Json = dict[str, Any]
Item = Mapping[str, Any]


@dataclass(frozen=True)
class Numbering:
    """The images and categories of the truth, numbered from 1 in the order of their ids."""

    source: str
    """What errors call the truth."""
    images: dict[Any, int]
    """Number by id."""
    categories: dict[Any, int]
    sizes: dict[int, tuple[Any, Any]]
    """Height and width by image number, as the JSON gives them."""

    def place(self, item: Item) -> Json:
        """`image_id` and `category_id` of an annotation as numbers."""
        numbers = {}
        for key, known in (("image_id", self.images), ("category_id", self.categories)):
            given = item.get(key)
            if not isinstance(given, (Real, str)) or given not in known:
                # File names stand in for ids that `gigaxt predict` was not told.
                named = "; `gigaxt predict` takes ids from the CSV's column image_id" if isinstance(given, str) else ""
                article = "an" if key == "image_id" else "a"
                raise ValueError(f"expected {article} {key} that {self.source} lists, got {given!r:.60}{named}")
            numbers[key] = known[given]
        return numbers

    def mask(self, segmentation: object, image: int) -> Json:
        """Run lengths of a mask in an image."""
        size = self.sizes[image]
        if not all(isinstance(side, (int, np.integer)) and side > 0 for side in size):
            raise ValueError(f"expected {self.source} to give height and width of its image, got {size!r:.60}")
        return to_rle(segmentation, *size)


def read_truth(source: str | Path | Item, iou: Iou, name: str = "truth") -> tuple[Numbering, list[Json]]:
    """Read images, categories and objects. What has no box has that of its mask.

    Args:
        source: COCO JSON, the file or what it holds.
        iou: whether boxes or masks are read.
        name: what errors call it where it is no file.

    Raises:
        DataError: named with the file and the annotation.
    """
    name, data = load_json(source, name)
    if not isinstance(data, Mapping):
        raise DataError(f"{name}: expected COCO JSON, an object with `images`, got {type(data).__name__}")
    for key in ("images", "categories", "annotations"):
        if not isinstance(data.get(key), Sequence) or (key != "annotations" and not data[key]):
            raise DataError(f"{name}: expected a list `{key}`, got {data.get(key)!r:.60}")
    images = _number(name, "images", data["images"])
    numbering = Numbering(
        source=name,
        images=images,
        categories=_number(name, "categories", data["categories"]),
        sizes={images[image["id"]]: (image.get("height"), image.get("width")) for image in data["images"]},
    )
    return numbering, _read_all(
        data["annotations"], f"{name}: annotation", lambda item: _read_object(item, numbering, iou)
    )


def read_predictions(source: str | Path | Sequence[Item], numbering: Numbering, iou: Iou) -> list[Json]:
    """Read COCO results.

    Raises:
        DataError: named with the file and the prediction's place in the list.
    """
    name, data = load_json(source, "predictions")
    if not isinstance(data, Sequence) or isinstance(data, str):
        raise DataError(f"{name}: expected COCO results, a list of predictions, got {type(data).__name__}")
    return _read_all(data, f"{name}: prediction", lambda item: _read_prediction(item, numbering, iou))


def _read_all(items: Iterable[Any], kind: str, read: Callable[[Item], Json]) -> list[Json]:
    """Each of them, with ids from 1; a ValueError becomes a DataError that says where."""
    found = []
    for place, item in enumerate(items):
        if not isinstance(item, Mapping):
            raise DataError(f"{kind} {place} (from 0): expected an object, got {item!r:.60}")
        try:
            found.append({"id": place + 1, **read(item)})
        except ValueError as error:
            given = f"id {item['id']}" if "id" in item else f"{place} (from 0)"
            raise DataError(f"{kind} {given}: {error}") from None
    return found


def _read_object(item: Item, numbering: Numbering, iou: Iou) -> Json:
    crowd = item.get("iscrowd") or 0
    if crowd not in (0, 1):
        raise ValueError(f"expected 0 or 1 as iscrowd, got {crowd!r:.60}")
    result = numbering.place(item) | {"iscrowd": int(crowd)}
    if iou == "segm":
        result["segmentation"] = numbering.mask(item.get("segmentation"), result["image_id"])
        area, _ = area_and_box(result["segmentation"])
    else:
        box = item.get("bbox")
        if not _has(item, "bbox") and _has(item, "segmentation"):
            _, box = area_and_box(numbering.mask(item["segmentation"], result["image_id"]))
        _, _, width, height = result["bbox"] = _read_box(box)
        area = width * height
    given = item.get("area")
    return result | {"area": area if given is None else _read_number("area", given, at_least=0)}


def _read_prediction(item: Item, numbering: Numbering, iou: Iou) -> Json:
    """As in pycocotools, a given box decides how large the object is, also where masks are compared."""
    result = numbering.place(item) | {"iscrowd": 0, "score": _read_number("score", item.get("score"))}
    has_box, has_mask = _has(item, "bbox"), _has(item, "segmentation")
    if not has_box and not has_mask:
        raise ValueError("expected `bbox` or `segmentation`, got neither")
    if has_box:
        x, y, width, height = result["bbox"] = _read_box(item["bbox"])
        result["area"] = width * height
    if iou == "segm" or not has_box:
        corners = item["segmentation"] if has_mask else [[x, y, x, y + height, x + width, y + height, x + width, y]]
        result["segmentation"] = numbering.mask(corners, result["image_id"])
    if not has_box:
        result["area"], result["bbox"] = area_and_box(result["segmentation"])
    return result


def _has(item: Item, key: str) -> bool:
    value = item.get(key)
    return value is not None and not (isinstance(value, Sized) and not len(value))


def _read_box(value: Any) -> list[float]:
    """Zero width or height is let through, as some objects of COCO have it: nothing overlaps with it."""
    try:
        box = [float(number) for number in value]
    except (TypeError, ValueError):
        box = []
    if len(box) != 4 or not all(map(math.isfinite, box)) or min(box[2:]) < 0:
        raise ValueError(f"expected finite x, y, width and height (at least 0) as bbox, got {value!r:.80}")
    return box


def _read_number(key: str, value: Any, at_least: float = -math.inf) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not (math.isfinite(number) and number >= at_least):
        bound = f" of at least {at_least}" if math.isfinite(at_least) else ""
        raise ValueError(f"expected a finite number{bound} as {key}, got {value!r:.60}")
    return number


def _number(name: str, key: str, items: Sequence[Any]) -> dict[Any, int]:
    """Numbers from 1 for the ids, in their order, which decides between equal scores."""
    ids: list[Any] = [item.get("id") if isinstance(item, Mapping) else None for item in items]
    if not any(all(isinstance(given, kind) for given in ids) for kind in (Integral, str)):
        raise DataError(f"{name}: expected an `id` for each of `{key}`, all whole numbers or all text, got {ids!r:.80}")
    given, count = Counter(ids).most_common(1)[0]
    if count > 1:
        raise DataError(f"{name}: expected every id once in `{key}`, got {given!r} {count} times")
    return {given: number for number, given in enumerate(sorted(ids), start=1)}


def load_json(source: Any, name: str) -> tuple[str, Any]:
    """What errors call it, and what the JSON holds."""
    if not isinstance(source, (str, Path)):
        return name, source
    try:
        return str(source), json.loads(Path(source).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise DataError(f"{source}: {error.strerror or error}; expected a JSON file") from error
    except ValueError as error:
        raise DataError(f"{source}: not readable as JSON: {error}") from error
