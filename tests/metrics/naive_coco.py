"""COCO's average precision of boxes from its description, in plain loops."""

from __future__ import annotations

from typing import Any

Item = dict[str, Any]

AREAS = {"": (0, 1e10), "_small": (0, 32**2), "_medium": (32**2, 96**2), "_large": (96**2, 1e10)}


def naive_stats(truth: Item, predictions: list[Item], limits: tuple[int, ...] = (1, 10, 100)) -> dict[str, float]:
    """AP, AP50, AP75 and AP by size and AR."""
    thresholds = [0.5 + 0.05 * i for i in range(10)]
    categories = [c["id"] for c in truth["categories"]]

    def curves(area: tuple[float, float], limit: int, ious: list[float]) -> list[tuple[float, float]]:
        return [c for k in categories for iou in ious if (c := _curve(truth, predictions, k, area, limit, iou))]

    def mean(values: list[float]) -> float:
        return sum(values) / len(values) if values else -1

    stats = {f"AP{name}": mean([p for p, _ in curves(area, limits[-1], thresholds)]) for name, area in AREAS.items()}
    stats |= {f"AR{name}": mean([r for _, r in curves(area, limits[-1], thresholds)]) for name, area in AREAS.items()}
    del stats["AR"]
    stats |= {f"AR_{limit}": mean([r for _, r in curves(AREAS[""], limit, thresholds)]) for limit in limits}
    for name, iou in (("AP50", 0.5), ("AP75", 0.75)):
        stats[name] = mean([p for p, _ in curves(AREAS[""], limits[-1], [iou])])
    return stats


def _curve(
    truth: Item, predictions: list[Item], category: int, area: tuple[float, float], limit: int, threshold: float
) -> tuple[float, float] | None:
    """Average precision and recall of a category; None without objects."""
    outcomes, objects = [], 0  # (score, is right)
    for image in sorted(i["id"] for i in truth["images"]):
        there = [a for a in truth["annotations"] if (a["image_id"], a["category_id"]) == (image, category)]
        found = [p for p in predictions if (p["image_id"], p["category_id"]) == (image, category)]
        found = sorted(found, key=lambda p: -p["score"])[:limit]
        ignored = [bool(a["iscrowd"]) or not area[0] <= a["area"] <= area[1] for a in there]
        objects += ignored.count(False)
        taken: set[int] = set()
        for p in found:
            free = [i for i, a in enumerate(there) if i not in taken or a["iscrowd"]]
            hits = [i for i in free if _overlap(p["bbox"], there[i]) >= min(threshold, 1 - 1e-10)]
            # Objects that count come first, then the largest overlap; of equal ones the last.
            best = max(hits, key=lambda i: (not ignored[i], _overlap(p["bbox"], there[i]), i), default=None)
            size = p["bbox"][2] * p["bbox"][3]
            if best is not None:
                taken.add(best)
                if not ignored[best]:
                    outcomes.append((p["score"], True))
            elif area[0] <= size <= area[1]:
                outcomes.append((p["score"], False))
    if not objects:
        return None
    outcomes.sort(key=lambda outcome: -outcome[0])
    right, points = 0, []  # (recall, precision)
    for i, (_, is_right) in enumerate(outcomes, start=1):
        right += is_right
        points.append((right / objects, right / i))
    # Written as the official thresholds are computed: 0.01 * 7 is more than 0.07.
    precisions = [max((p for r, p in points if r >= 0.01 * step), default=0.0) for step in range(101)]
    return sum(precisions) / 101, right / objects


def _overlap(box: list[float], annotation: Item) -> float:
    """Intersection over union, or with a crowd over the box."""
    (x, y, w, h), (u, v, s, t) = box, annotation["bbox"]
    width, height = min(x + w, u + s) - max(x, u), min(y + h, v + t) - max(y, v)
    if width <= 0 or height <= 0:
        return 0.0
    return width * height / (w * h if annotation["iscrowd"] else w * h + s * t - width * height)
