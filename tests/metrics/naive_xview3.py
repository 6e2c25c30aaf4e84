"""xView3's score from its description, in plain loops over lists of rows; the assignment tries every permutation."""

from __future__ import annotations

import math
from itertools import permutations
from typing import Any

Row = dict[str, Any]
Contours = dict[str, list[list[tuple[float, float]]]]


def assign(found: list[Row], objects: list[Row], tolerance_m: float, costly: bool) -> list[tuple[Row, Row]]:
    """The matches of the cheapest assignment of two small lists."""

    def cost(a: Row, b: Row) -> float:
        distance = 10 * math.dist(a["place"], b["place"])
        return 99_999_990 if costly and distance > tolerance_m else distance

    fewer, more = sorted((found, objects), key=len)
    best = min(permutations(more, len(fewer)), key=lambda p: sum(cost(a, b) for a, b in zip(fewer, p, strict=True)))
    pairs = [(a, b) if fewer is found else (b, a) for a, b in zip(fewer, best, strict=True)]
    return [(a, b) for a, b in pairs if cost(a, b) < tolerance_m]


def naive_score(
    found: list[Row],
    objects: list[Row],
    shore: Contours,
    *,
    tolerance_m: float = 200,
    shore_km: float = 2,
    drop_low: bool = True,
    costly: bool = True,
    score_all: bool = False,
) -> dict[str, Any]:
    """`scores` and `counts` of predictions and objects: rows with scene, place, is_vessel, is_fishing, length.

    Objects also have confidence and shore_km. Unknown is None.
    """
    scenes = {row["scene"] for row in found}
    n_in = len(found)
    objects = [o for o in objects if o["scene"] in scenes]
    if not score_all:
        if drop_low:
            dropped = []
            for scene in scenes:
                pairs = assign(of(scene, found), of(scene, objects), tolerance_m, costly)
                dropped += [id(p) for p, o in pairs if o["confidence"] == "LOW"]
            found = [p for p in found if id(p) not in dropped]
        objects = [o for o in objects if o["confidence"] != "LOW"]

    matches, loc, near = [], [0, 0, 0], [0, 0, 0]
    for scene in {o["scene"] for o in objects}:
        p, o = of(scene, found), of(scene, objects)
        pairs = assign(p, o, tolerance_m, costly)
        matches += pairs
        loc = add(loc, len(pairs), p, o)
        points = [point for contour in shore[scene] for point in contour]
        reach = (shore_km + tolerance_m / 1000) * 100
        p = [row for row in p if any(0 < math.dist(row["place"], point) <= reach for point in points)]
        o = [row for row in o if row["shore_km"] <= shore_km]
        if p and o:
            near = add(near, len(assign(p, o, tolerance_m, costly)), p, o)

    vessel = classify(matches, "is_vessel")
    fishing = classify([(p, o) for p, o in matches if o["is_vessel"]], "is_fishing")
    lengths = [(min(p["length"], 500), min(o["length"], 500)) for p, o in matches if o["length"] is not None]
    error = sum(abs(a - b) / b for a, b in lengths) / len(lengths) if lengths else 1
    scores = {
        "loc_fscore": f1(*loc),
        "loc_fscore_shore": f1(*near),
        "vessel_fscore": f1(vessel["tp"], vessel["fp"], vessel["fn"]),
        "fishing_fscore": f1(fishing["tp"], fishing["fp"], fishing["fn"]),
        "length_acc": 1 - min(1, error),
    }
    scores["aggregate"] = scores["loc_fscore"] * (1 + sum(scores.values()) - scores["loc_fscore"]) / 5
    counts = {
        "n_pred_in": n_in,
        "n_pred_scored": len(found),
        "n_gt_scored": len(objects),
        "loc": dict(zip(("tp", "fp", "fn"), loc, strict=True)),
        "shore": dict(zip(("tp", "fp", "fn"), near, strict=True)),
        "vessel": vessel,
        "fishing": fishing,
        "n_length_pairs": len(lengths),
        "sum_match_distance_m": round(sum(10 * math.dist(p["place"], o["place"]) for p, o in matches), 4),
    }
    return {"scores": scores, "counts": counts}


def of(scene: str, rows: list[Row]) -> list[Row]:
    return [row for row in rows if row["scene"] == scene]


def add(counts: list[int], matched: int, found: list[Row], objects: list[Row]) -> list[int]:
    return [counts[0] + matched, counts[1] + len(found) - matched, counts[2] + len(objects) - matched]


def classify(matches: list[tuple[Row, Row]], key: str) -> dict[str, int]:
    names = {(True, True): "tp", (False, True): "fp", (True, False): "fn", (False, False): "tn"}
    counts = dict.fromkeys(("tp", "fp", "fn", "tn"), 0)
    for p, o in matches:
        if o[key] is not None:
            # A blank answer is the wrong one.
            counts[names[o[key], (not o[key]) if p[key] is None else p[key]]] += 1
    return counts


def f1(tp: int, fp: int, fn: int) -> float:
    return 2 * tp / (2 * tp + fp + fn) if tp else 0
