"""COCO's average precision, computed by faster-coco-eval and equal to pycocotools.

Other than there, AP is given for any `max_dets`, and `AP` is of the largest; pycocotools gives -1 where that is not
100.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from gigaxt.errors import ConfigError, GigaxtError
from gigaxt.metrics.coco_json import Iou, Json, Numbering, read_predictions, read_truth
from gigaxt.metrics.coco_split import is_large, split, take_best

SIZES = ("small", "medium", "large")
"""Objects of up to 32 x 32 px, up to 96 x 96 px, and larger ones; "all" comes before them in the arrays."""
_ALL_SIZES = 0
_IOU_50, _IOU_75 = 0, 5  # of the thresholds 0.50, 0.55, ..., 0.95


def coco_score(
    truth: str | Path | Mapping[str, Any],
    predictions: str | Path | Sequence[Mapping[str, Any]],
    *,
    iou: Iou = "bbox",
    max_dets: Sequence[int] = (1, 10, 100),
    use_categories: bool = True,
) -> dict[str, dict[str, float]]:
    """Score boxes or masks as COCO does.

    Args:
        truth: COCO JSON, the file or what it holds: `images`, `categories` and `annotations`.
        predictions: COCO results, the file or the list it holds: `image_id`, `category_id`, `score` and `bbox` (x, y,
            width, height) or `segmentation`. What has no box has that of its mask, what has no mask that of its box.
        iou: overlap of boxes or of masks.
        max_dets: numbers of predictions for each image and category, best first, at which recall is measured; the rest
            is at the largest. It must be raised where an image has more than 100 objects of a category.
        use_categories: False: all objects are of one category.

    Returns:
        `stats`: `AP` (mean of IoU 0.50 to 0.95), `AP50`, `AP75`, `AP_small`, `AP_medium`, `AP_large`, `AR_1`, `AR_10`,
        `AR_100` (one for each of `max_dets`), `AR_small`, `AR_medium`, `AR_large`. `per_category_AP`: `AP` by category
        id, as text; empty where categories are not used. All are 0 to 1, or -1 where there is no object to find.

    Raises:
        DataError: JSON that does not fit, named with the file and the annotation or prediction.
        ConfigError: an option out of range.
        GigaxtError: faster-coco-eval is not installed.
    """
    limits = _check_options(iou, max_dets)
    api = _faster_coco_eval()
    numbering, objects = read_truth(truth, iou)
    found = read_predictions(predictions, numbering, iou)
    evaluate = partial(_evaluate, api, numbering, iou=iou, use_categories=use_categories)
    best = [take_best(found, limit, by_category=use_categories) for limit in limits]
    if is_large(objects, best[-1]):
        each = [evaluate(*split(objects, items), limits=[len(items)]) for items in best]
        precision, recall = (np.concatenate(arrays, axis=-1) for arrays in zip(*each, strict=True))
    else:
        precision, recall = evaluate(objects, found, {image: image for image in numbering.sizes}, limits=limits)
    categories = list(numbering.categories) if use_categories else []
    by_category = {str(id_): _mean(precision[:, :, k, _ALL_SIZES, -1]) for k, id_ in enumerate(categories)}
    return {"stats": _summary(precision, recall, limits), "per_category_AP": by_category}


def _evaluate(
    api: tuple[Any, Any],
    numbering: Numbering,
    objects: list[Json],
    found: list[Json],
    images: Mapping[int, int],
    *,
    iou: Iou,
    use_categories: bool,
    limits: list[int],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Precision (IoU, recall, categories, sizes, limits) and recall (IoU, categories, sizes, limits).

    `images` are numbers of images and, for each, the one of the truth whose size it has.
    """
    coco, evaluator = api
    sizes = {image: numbering.sizes[old] for image, old in images.items()}
    frame = {
        "images": [{"id": image, "height": h, "width": w} for image, (h, w) in sizes.items()],
        "categories": [{"id": number} for number in numbering.categories.values()],
    }
    log = logging.getLogger(__name__).debug
    datasets = [coco(frame | {"annotations": items}, print_function=log) for items in (objects, found)]
    evaluation = evaluator(*datasets, iouType=iou, print_function=log)
    evaluation.params.maxDets = limits
    evaluation.params.useCats = int(use_categories)
    evaluation.evaluate()
    evaluation.accumulate()
    return np.asarray(evaluation.eval["precision"]), np.asarray(evaluation.eval["recall"])


def _summary(precision: NDArray[np.float64], recall: NDArray[np.float64], limits: list[int]) -> dict[str, float]:
    stats = {
        "AP": _mean(precision[..., _ALL_SIZES, -1]),
        "AP50": _mean(precision[_IOU_50, ..., _ALL_SIZES, -1]),
        "AP75": _mean(precision[_IOU_75, ..., _ALL_SIZES, -1]),
    }
    stats |= {f"AP_{size}": _mean(precision[..., i, -1]) for i, size in enumerate(SIZES, start=1)}
    stats |= {f"AR_{limit}": _mean(recall[..., _ALL_SIZES, i]) for i, limit in enumerate(limits)}
    return stats | {f"AR_{size}": _mean(recall[..., i, -1]) for i, size in enumerate(SIZES, start=1)}


def _mean(values: NDArray[np.float64]) -> float:
    """Of what is defined; -1 where nothing is."""
    defined = values[values > -1]
    return float(defined.mean()) if len(defined) else -1.0


def _check_options(iou: str, max_dets: Sequence[int]) -> list[int]:
    if iou not in get_args(Iou):
        raise ConfigError(f"iou: expected one of {', '.join(get_args(Iou))}, got {iou!r}")
    if not max_dets or not all(isinstance(limit, int) and limit > 0 for limit in max_dets):
        raise ConfigError(f"max_dets: expected one or more whole numbers above 0, got {max_dets!r}")
    return sorted(set(max_dets))


def _faster_coco_eval() -> tuple[Any, Any]:
    """Its dataset and its evaluation."""
    try:
        from faster_coco_eval import COCO, COCOeval_faster
    except ImportError as error:
        raise GigaxtError("coco_score needs faster-coco-eval: pip install 'faster-coco-eval>=1.8'") from error
    return COCO, COCOeval_faster
