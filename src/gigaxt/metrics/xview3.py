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
CLASS_COUNTS = ("tp", "fp", "fn", "tn")

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
    sums = scene_sums(
        predictions,
        truth,
        shorelines,
        distance_tolerance_m=distance_tolerance_m,
        shore_tolerance_km=shore_tolerance_km,
        drop_low_detect=drop_low_detect,
        costly_dist=costly_dist,
        score_all=score_all,
        scenes=scenes,
    )
    total = {name: float(column.sum()) for name, column in sums.columns.items()}

    def counts(what: str, *kinds: str) -> Counts:
        return {kind: int(total[f"{what}_{kind}"]) for kind in kinds}

    return {
        "scores": {name: float(value) for name, value in scores_of(total).items()},
        "counts": {
            "n_pred_in": sums.predictions,
            "n_pred_scored": int(total["found"]),
            "n_gt_scored": int(total["objects"]),
            "loc": counts("loc", "tp", "fp", "fn"),
            "shore": counts("shore", "tp", "fp", "fn") if sums.with_shore else None,
            "vessel": counts("vessel", *CLASS_COUNTS),
            "fishing": counts("fishing", *CLASS_COUNTS),
            "n_length_pairs": int(total["length_pairs"]),
            "sum_match_distance_m": round(total["distance_m"], 4),
        },
    }


@dataclass(frozen=True)
class SceneSums:
    """What the score is made of, scene by scene: the score of any scenes is that of the sums over them."""

    scenes: list[str]
    """All that occur in predictions or truth; those that are not scored have zeros."""
    columns: dict[str, NDArray[np.float64]]
    """Name -> (scenes,): `loc_tp`, `loc_fp`, `loc_fn`, and so of `shore`; of `vessel` and `fishing` `_tn` too;
    `length_error`, the sum of the relative errors, of `length_pairs`; `found`, `objects`, `distance_m`."""
    predictions: int
    """As given."""
    with_shore: bool
    """Whether the score close to shore was asked for."""


def scene_sums(
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
) -> SceneSums:
    """What `xview3_score`, whose arguments and errors are the same, is made of."""
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
    known_length = ~np.isnan(matched_objects.length_m)

    def per_scene(of: NDArray[np.intp], weights: NDArray[np.float64] | None = None) -> NDArray[np.float64]:
        return np.bincount(of, weights, minlength=len(names)).astype(np.float64)

    there = found.scene[np.isin(found.scene, objects.scene)]
    columns = _localisation("loc", per_scene(matched.scene), per_scene(there), per_scene(objects.scene))
    near = _close_to_shore(found, objects, matching, shore, names, shore_tolerance_km)
    columns |= _localisation("shore", *near)
    for what, which in (("vessel", np.ones_like(is_vessel)), ("fishing", is_vessel)):
        answers, truths = (getattr(part, f"is_{what}")[which] for part in (matched, matched_objects))
        for kind, chosen in _classification(answers, truths).items():
            columns[f"{what}_{kind}"] = per_scene(matched.scene[which][chosen])
    errors = _length_errors(matched.length_m[known_length], matched_objects.length_m[known_length])
    columns |= {
        "length_error": per_scene(matched.scene[known_length], errors),
        "length_pairs": per_scene(matched.scene[known_length]),
        "found": per_scene(found.scene),
        "objects": per_scene(objects.scene),
        "distance_m": per_scene(matched.scene, pairs.distance_m),
    }
    return SceneSums(names.tolist(), columns, len(tables[0]), shore is not None)


def scores_of(sums: Mapping[str, Any]) -> dict[str, NDArray[np.float64]]:
    """The scores from the sums of `SceneSums.columns` over scenes, numbers or arrays of one shape."""
    loc, shore, vessel, fishing = (
        _f1(*(np.asarray(sums[f"{what}_{kind}"], np.float64) for kind in ("tp", "fp", "fn")))
        for what in ("loc", "shore", "vessel", "fishing")
    )
    pairs = np.asarray(sums["length_pairs"], np.float64)
    error = np.asarray(sums["length_error"], np.float64) / np.maximum(pairs, 1)
    length = np.where(pairs > 0, 1 - np.minimum(error, 1), 0.0)  # NaN stays NaN
    return {
        "loc_fscore": loc,
        "loc_fscore_shore": shore,
        "vessel_fscore": vessel,
        "fishing_fscore": fishing,
        "length_acc": length,
        "aggregate": loc * (1 + length + vessel + fishing + shore) / 5,
    }


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
    shorelines: Shorelines | None,
    names: NDArray[np.str_],
    tolerance_km: float,
) -> NDArray[np.float64]:
    """Matches, detections and objects there, of each scene: (3, scenes)."""
    counts = np.zeros((3, len(names)))
    if shorelines is None:
        return counts
    radius_px = (tolerance_km + matching.tolerance_m / 1000) * 1000 / PIXEL_M
    close = objects.take(objects.shore_km <= tolerance_km)
    for scene, i, j in _by_scene(found, close):
        places = found.places[i]
        near = places[_is_near(places, shorelines.points(str(names[scene])), radius_px)]
        if len(near):
            counts[:, scene] = len(matching.of(near, close.places[j]).found), len(near), len(j)
    return counts


def _is_near(places: Places, shore: Points, radius_px: float) -> NDArray[np.bool_]:
    """Which places have a point of the shore within the radius, where a point at distance 0 does not count."""
    if not len(shore):
        return np.zeros(len(places), bool)
    distinct = np.unique(shore, axis=0)
    _, nearest = KDTree(distinct).query(places, k=[1, 2][: len(distinct)])  # (places, 1 or 2)
    square: NDArray[np.float64] = ((places[:, None] - distinct[nearest]) ** 2).sum(axis=-1)
    return np.asarray(((square > 0) & (square <= radius_px**2)).any(axis=1))


def _localisation(
    what: str, matched: NDArray[np.float64], found: NDArray[np.float64], objects: NDArray[np.float64]
) -> dict[str, NDArray[np.float64]]:
    return {f"{what}_tp": matched, f"{what}_fp": found - matched, f"{what}_fn": objects - matched}


def _classification(found: NDArray[np.int8], truth: NDArray[np.int8]) -> dict[str, NDArray[np.bool_]]:
    """Which pairs, of those whose truth is known, are of each of `CLASS_COUNTS`; 1 is the class looked for."""
    right, positive, negative = found == truth, truth == 1, truth == 0
    return {"tp": right & positive, "fp": ~right & negative, "fn": ~right & positive, "tn": right & negative}


def _length_errors(found: NDArray[np.float64], truth: NDArray[np.float64]) -> NDArray[np.float64]:
    """Relative errors."""
    found, truth = (np.minimum(length, MAX_LENGTH_M) for length in (found, truth))
    return np.abs(found - truth) / truth


def _f1(tp: NDArray[np.float64], fp: NDArray[np.float64], fn: NDArray[np.float64]) -> NDArray[np.float64]:
    return 2 * tp / np.maximum(2 * tp + fp + fn, 1)


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
