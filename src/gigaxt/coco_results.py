"""Objects as COCO results JSON, which COCO's evaluations read."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from gigaxt.image.part_file import PartFile
from gigaxt.objects import Objects

DECIMALS_PX = 3


def write_coco_results(
    path: str | Path, found: Iterable[tuple[int | str, Objects]], category_ids: Sequence[int] | None
) -> int:
    """Write boxes of any number of images as a list of `image_id`, `category_id`, `bbox` (x, y, w, h) and `score`.

    Args:
        path: of the JSON, which has another name until it is complete.
        found: image id and objects of each image.
        category_ids: of each class; None: 1, 2, ...

    Returns:
        How many objects were written.

    Raises:
        ImageError: the file cannot be written; an older one stays.
    """
    file, count = PartFile(Path(path)), 0
    try:
        file.append(b"[")
        for image_id, objects in found:
            assert objects.boxes_xyxy is not None
            lines: list[str] = []
            columns = objects.boxes_xyxy.tolist(), objects.classes.tolist(), objects.scores.tolist()
            for (left, top, right, bottom), class_, score in zip(*columns, strict=True):
                entry = {
                    "image_id": image_id,
                    "category_id": class_ + 1 if category_ids is None else category_ids[class_],
                    "bbox": [round(side, DECIMALS_PX) for side in (left, top, right - left, bottom - top)],
                    "score": round(score, 6),
                }
                lines.append(f"{',' if count else ''}\n{json.dumps(entry, allow_nan=False)}")
                count += 1
            file.append("".join(lines).encode())
        file.append(b"\n]\n")
        file.commit()
    finally:
        file.discard()
    return count
