"""Objects as COCO results JSON, which COCO's evaluations read."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from gigaxt.found.objects import Objects
from gigaxt.image.base import Image
from gigaxt.image.part_file import PartFile
from gigaxt.shapes.crops import painted
from gigaxt.shapes.run_lengths import run_lengths

DECIMALS_PX = 3


def write_coco_results(
    path: str | Path, found: Iterable[tuple[int | str, Image, Objects]], category_ids: Sequence[int] | None
) -> int:
    """Write objects of any number of images as a list of `image_id`, `category_id`, `bbox` (x, y, w, h) and `score`.

    Those with masks also have their run lengths as `segmentation`.

    Args:
        path: of the JSON, which has another name until it is complete.
        found: of each image its id, the image, and the objects in px of it.
        category_ids: of each class; None: 1, 2, ...

    Returns:
        How many objects were written.

    Raises:
        ImageError: the file cannot be written; an older one stays.
    """
    file, count = PartFile(Path(path)), 0
    try:
        file.append(b"[")
        for image_id, image, objects in found:
            assert objects.boxes_xyxy is not None
            lines: list[str] = []
            columns = objects.boxes_xyxy.tolist(), objects.classes.tolist(), objects.scores.tolist()
            for i, ((left, top, right, bottom), class_, score) in enumerate(zip(*columns, strict=True)):
                entry = {
                    "image_id": image_id,
                    "category_id": class_ + 1 if category_ids is None else category_ids[class_],
                    "bbox": [round(side, DECIMALS_PX) for side in (left, top, right - left, bottom - top)],
                    "score": round(score, 6),
                }
                if objects.masks is not None:
                    crop = painted(objects.masks[i], (left, top, right, bottom), image.height, image.width)
                    entry["segmentation"] = run_lengths(crop, image.height, image.width)
                lines.append(f"{',' if count else ''}\n{json.dumps(entry, allow_nan=False)}")
                count += 1
            file.append("".join(lines).encode())
        file.append(b"\n]\n")
        file.commit()
    finally:
        file.discard()
    return count
