"""The score of the xView3-SAR challenge, equal to its official program.

The program's rules, quirks included, since published numbers follow them:

* A scene without a prediction, or without an object to find, is not scored: neither misses nor false alarms. A
  submission that leaves a scene out is better off than one that fails there; `scenes` says which are scored instead.
* Detections and objects of a scene are assigned to each other by least total distance (`matching`). A pair is a match
  if it is nearer than the tolerance; just as far is too far.
* Objects of LOW confidence are not to be found. First all objects are assigned, and detections that match a LOW one are
  dropped, even where another object was in reach; then the rest is assigned anew.
* Close to shore are objects by a column of the labels, and detections by their distance to a point of the shoreline,
  the tolerance added. They are assigned apart from all others, and a scene that lacks either adds nothing. A point of
  the shoreline exactly where the detection is does not count.
* Classes are scored over matches whose truth is known; a blank prediction is wrong both ways. Fishing is asked of
  vessels only, length of all. One blank length makes length and aggregate NaN.

Where the program stops with an error, because a scene has no detection left, the scene's objects are misses.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import KDTree

from gigaxt.errors import ConfigError, DataError
from gigaxt.metrics.matching import PIXEL_M, Indices, Pairs, Places, join, match
from gigaxt.metrics.shorelines import Contours, Points, Shorelines
from gigaxt.metrics.tables import Table

MAX_LENGTH_M = 500
"""Longer lengths count as this."""
CONFIDENCES = ("HIGH", "MEDIUM", "LOW")
SCORED_CONFIDENCES = ("HIGH", "MEDIUM")

Counts = dict[str, int]


def xview3_score(
    predictions: object,
    truth: object,
    shorelines: str | Path | Mapping[str, Contours] | None = None,
    *,
    distance_tolerance_m: float = 200,
    shore_tolerance_km: float = 2,
    drop_low_detect: bool = True,
    costly_dist: bool = True,
    score_all: bool = False,
    scenes: Iterable[str] | None = None,
) -> dict[str, dict[str, Any]]:
    """Score maritime detections as the xView3-SAR challenge does.

    Args:
        predictions: CSV, or table in memory (see `gigaxt.metrics.tables.Table`), with the columns `scene_id`,
            `detect_scene_row`, `detect_scene_column`, `is_vessel`, `is_fishing`, `vessel_length_m`; others are ignored.
        truth: the labels, likewise, with `confidence` too and, for the score close to shore, `distance_from_shore_km`.
        shorelines: folder with `<scene_id>_shoreline.npy`, JSON file, or mapping of scene ids to lists of contours.
            None: the score close to shore is 0, and the aggregate at most 0.8.
        distance_tolerance_m: a match is nearer than this.
        shore_tolerance_km: an object as far or nearer is close to shore; 0: as without `shorelines`.
        drop_low_detect: leave out detections that match an object of LOW confidence.
        costly_dist: in the assignment all pairs beyond the tolerance cost the same, 99,999,990 m; False: their
            distance.
        score_all: objects of LOW confidence are to be found too, and nothing is dropped.
        scenes: ids of the scenes to score, whether they have predictions or not; where they have none, all is missed.
            None: those with predictions.

    Returns:
        `scores`: `loc_fscore`, `loc_fscore_shore`, `vessel_fscore`, `fishing_fscore`, `length_acc`, `aggregate`; 0 to
        1. `counts`: `n_pred_in`; `n_pred_scored`, those not dropped; `n_gt_scored`, the objects to find; `loc`, `shore`
        (None without shorelines), `vessel` and `fishing` with `tp`, `fp`, `fn` and, of classes, `tn`; `n_length_pairs`;
        `sum_match_distance_m`, to a tenth of a millimetre.

    Raises:
        DataError: a file, column or cell that does not fit, named with its line; a scene without its shoreline.
        ConfigError: a tolerance out of range.
    """
    _check_tolerances(distance_tolerance_m, shore_tolerance_km)
    matching = _Matching(distance_tolerance_m, costly_dist)
    shore = Shorelines(shorelines) if shorelines is not None and shore_tolerance_km else None
    tables = Table(predictions, "predictions"), Table(truth, "truth")
    names, found, objects = _read(*tables, score_all, shore is not None)
    scored = found.scene if scenes is None else _asked_for(scenes, names, objects)
    objects = objects.take(np.isin(objects.scene, scored))
    if not score_all:
        if drop_low_detect:
            pairs = matching.of_scenes(found, objects)
            low = pairs.found[objects.confidence[pairs.truth] == "LOW"]
            found = found.take(np.delete(np.arange(len(found)), low))
        objects = objects.take(np.isin(objects.confidence, SCORED_CONFIDENCES))

    pairs = matching.of_scenes(found, objects)
    matched, matched_objects = found.take(pairs.found), objects.take(pairs.truth)
    is_vessel = matched_objects.is_vessel == 1
    length_errors = _length_errors(matched.length_m, matched_objects.length_m)
    counts = {
        "n_pred_in": len(tables[0]),
        "n_pred_scored": len(found),
        "n_gt_scored": len(objects),
        "loc": _localisation(len(matched), np.isin(found.scene, objects.scene).sum(), len(objects)),
        "shore": shore and _close_to_shore(found, objects, matching, shore, names, shore_tolerance_km),
        "vessel": _classification(matched.is_vessel, matched_objects.is_vessel),
        "fishing": _classification(matched.is_fishing[is_vessel], matched_objects.is_fishing[is_vessel]),
        "n_length_pairs": len(length_errors),
        "sum_match_distance_m": round(float(pairs.distance_m.sum()), 4),
    }
    return {"scores": _scores(counts, length_errors), "counts": counts}


@dataclass(frozen=True)
class _Detections:
    """What was found, one row each."""

    scene: NDArray[np.intp]
    """Number of the scene."""
    places: Places
    is_vessel: NDArray[np.int8]
    """1, 0 or `UNKNOWN`, as `is_fishing`."""
    is_fishing: NDArray[np.int8]
    length_m: NDArray[np.float64]
    """NaN where not known."""

    def __len__(self) -> int:
        return len(self.scene)

    def take(self, rows: NDArray[Any]) -> Self:
        """The given rows: a mask or indices."""
        return type(self)(*(getattr(self, field.name)[rows] for field in fields(self)))


@dataclass(frozen=True)
class _Objects(_Detections):
    """What is there."""

    confidence: NDArray[np.str_]
    shore_km: NDArray[np.float64]


@dataclass(frozen=True)
class _Matching:
    """How detections become matches."""

    tolerance_m: float
    costly: bool

    def of(self, found: Places, truth: Places) -> Pairs:
        """The matches within a scene."""
        return match(found, truth, self.tolerance_m, costly=self.costly)

    def of_scenes(self, found: _Detections, objects: _Detections) -> Pairs:
        """The matches of all scenes."""
        parts = []
        for _, i, j in _by_scene(found, objects):
            pairs = self.of(found.places[i], objects.places[j])
            parts.append(pairs._replace(found=i[pairs.found], truth=j[pairs.truth]))
        return join(parts)


def _by_scene(found: _Detections, objects: _Detections) -> Iterator[tuple[int, Indices, Indices]]:
    """Every scene that has both, with the rows of each in the order of the files."""
    rows: tuple[dict[int, list[int]], ...] = (defaultdict(list), defaultdict(list))
    for of_scene, detections in zip(rows, (found, objects), strict=True):
        for row, scene in enumerate(detections.scene.tolist()):
            of_scene[scene].append(row)
    for scene in rows[0].keys() & rows[1].keys():
        yield scene, np.array(rows[0][scene]), np.array(rows[1][scene])


def _close_to_shore(
    found: _Detections,
    objects: _Objects,
    matching: _Matching,
    shorelines: Shorelines,
    names: NDArray[np.str_],
    tolerance_km: float,
) -> Counts:
    """Matches, false alarms and misses there."""
    radius_px = (tolerance_km + matching.tolerance_m / 1000) * 1000 / PIXEL_M
    close = objects.take(objects.shore_km <= tolerance_km)
    tp = there = to_find = 0
    for scene, i, j in _by_scene(found, close):
        places = found.places[i]
        near = places[_is_near(places, shorelines.points(str(names[scene])), radius_px)]
        if len(near):
            tp += len(matching.of(near, close.places[j]).found)
            there, to_find = there + len(near), to_find + len(j)
    return _localisation(tp, there, to_find)


def _is_near(places: Places, shore: Points, radius_px: float) -> NDArray[np.bool_]:
    """Which places have a point of the shore within the radius, where a point at distance 0 does not count."""
    if not len(shore):
        return np.zeros(len(places), bool)
    distinct = np.unique(shore, axis=0)
    _, nearest = KDTree(distinct).query(places, k=[1, 2][: len(distinct)])  # (places, 1 or 2)
    square: NDArray[np.float64] = ((places[:, None] - distinct[nearest]) ** 2).sum(axis=-1)
    return np.asarray(((square > 0) & (square <= radius_px**2)).any(axis=1))


def _localisation(matched: int, found: int, objects: int) -> Counts:
    return {"tp": matched, "fp": int(found) - matched, "fn": objects - matched}


def _classification(found: NDArray[np.int8], truth: NDArray[np.int8]) -> Counts:
    """Of the pairs whose truth is known; 1 is the class that is looked for."""
    right, positive, negative = found == truth, truth == 1, truth == 0
    kinds = {"tp": right & positive, "fp": ~right & negative, "fn": ~right & positive, "tn": right & negative}
    return {kind: int(which.sum()) for kind, which in kinds.items()}


def _length_errors(found: NDArray[np.float64], truth: NDArray[np.float64]) -> NDArray[np.float64]:
    """Relative errors where the truth is known."""
    found, truth = (np.minimum(length[~np.isnan(truth)], MAX_LENGTH_M) for length in (found, truth))
    return np.abs(found - truth) / truth


def _scores(counts: dict[str, Any], length_errors: NDArray[np.float64]) -> dict[str, float]:
    loc, vessel, fishing = (_f1(counts[kind]) for kind in ("loc", "vessel", "fishing"))
    shore = 0.0 if counts["shore"] is None else _f1(counts["shore"])
    length = 1 - float(np.minimum(length_errors.mean(), 1)) if len(length_errors) else 0.0  # NaN stays NaN
    return {
        "loc_fscore": loc,
        "loc_fscore_shore": shore,
        "vessel_fscore": vessel,
        "fishing_fscore": fishing,
        "length_acc": length,
        "aggregate": loc * (1 + length + vessel + fishing + shore) / 5,
    }


def _f1(counts: Counts) -> float:
    if not counts["tp"]:
        return 0.0
    precision, recall = (counts["tp"] / (counts["tp"] + counts[wrong]) for wrong in ("fp", "fn"))
    return 2 * precision * recall / (precision + recall)


def _check_tolerances(distance_m: float, shore_km: float) -> None:
    if not (distance_m > 0 and math.isfinite(distance_m)):
        raise ConfigError(f"distance_tolerance_m: expected metres above 0, got {distance_m}")
    if not (shore_km >= 0 and math.isfinite(shore_km)):
        raise ConfigError(f"shore_tolerance_km: expected at least 0 km, got {shore_km}")


def _read(
    found: Table, truth: Table, score_all: bool, use_shore: bool
) -> tuple[NDArray[np.str_], _Detections, _Objects]:
    """The names of all scenes, and what both tables hold; columns that are not asked for need not be there."""
    words = [_scene_ids(table) for table in (found, truth)]
    names, codes = np.unique(np.array(words[0] + words[1], np.str_), return_inverse=True)
    detections = _Detections(codes[: len(found)], *_read_detections(found))
    objects = _Objects(
        codes[len(found) :],
        *_read_detections(truth),
        np.full(len(truth), SCORED_CONFIDENCES[0]) if score_all else _confidences(truth),
        truth.numbers("distance_from_shore_km") if use_shore else np.full(len(truth), np.nan),
    )
    broken = np.flatnonzero(objects.length_m <= 0)
    if len(broken):
        raise DataError(
            f"{truth.row(broken[0])}: expected a length above 0 in column `vessel_length_m`, got"
            f" {objects.length_m[broken[0]]:g}; leave it empty where it is not known"
        )
    return names, detections, objects


def _scene_ids(table: Table) -> list[str]:
    words = table.words("scene_id")
    if "" in words:
        raise DataError(f"{table.row(words.index(''))}: expected a scene in column `scene_id`, got nothing")
    return words


def _read_detections(table: Table) -> tuple[Places, NDArray[np.int8], NDArray[np.int8], NDArray[np.float64]]:
    """Places, is_vessel, is_fishing and length."""
    places = np.stack([table.numbers(column) for column in ("detect_scene_row", "detect_scene_column")], axis=1)
    broken = np.flatnonzero(~np.isfinite(places).all(axis=1))
    if len(broken):
        row, column = places[broken[0]]
        raise DataError(f"{table.row(broken[0])}: expected a place in pixels, got row {row} and column {column}")
    return places, table.flags("is_vessel"), table.flags("is_fishing"), table.numbers("vessel_length_m")


def _confidences(table: Table) -> NDArray[np.str_]:
    """A blank confidence is not scored, and no reason to drop a detection."""
    words = table.words("confidence")
    for i, word in enumerate(words):
        if word and word not in CONFIDENCES:
            raise DataError(f"{table.row(i)}: expected one of {CONFIDENCES} in column `confidence`, got {word!r}")
    return np.array(words, np.str_)


def _asked_for(scenes: Iterable[str], names: NDArray[np.str_], objects: _Detections) -> Indices:
    """The numbers of the scenes with the given names."""
    asked = [scenes] if isinstance(scenes, str) else list(scenes)
    wanted = np.flatnonzero(np.isin(names, np.array(asked, np.str_)))
    if not np.isin(objects.scene, wanted).any():
        raise DataError(f"scenes: expected ids of scenes in the truth, got none of them in {asked[:3]}")
    return wanted
