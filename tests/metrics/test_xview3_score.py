from __future__ import annotations

import csv
import json
import math
import random
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from naive_xview3 import Contours, Row, naive_score

from gigaxt.errors import ConfigError, DataError
from gigaxt.metrics import xview3_score
from gigaxt.metrics.xview3 import scene_sums, scores_of

Table = dict[str, list[Any]]

CASES = (
    "edge_01_exact_200m",
    "edge_02_assignment",
    "edge_03_scene_without_preds",
    "edge_04_low_confidence",
    "edge_05_all_preds_dropped",
    "edge_06_lengths",
    "edge_07_shore",
    "random_01",
    "random_02",
    "random_03",
)


@pytest.mark.parametrize("case", CASES)
def test_equals_the_official_program(case: str, fixtures: Path) -> None:
    folder = fixtures / "xview3_metric_cases" / case
    runs = json.loads((folder / "expected.json").read_text())["runs"]
    for run in runs.values():
        flags = run["flags"]
        got = xview3_score(
            folder / "pred.csv",
            folder / "gt.csv",
            folder / "shoreline.json" if flags.pop("shore") else None,
            **flags,
        )
        if "reference_raises" in run:
            assert got["counts"]["loc"] == {"tp": 1, "fp": 0, "fn": 1}  # edge_05: the object is missed
        else:
            assert got["scores"] == pytest.approx(run["scores"], abs=1e-12)
            assert got["counts"] == run["counts"]


def _table(rows: list[Row]) -> Table:
    """Rows as `naive_score` takes them, as columns of the CSV."""
    names = {"scene_id": "scene", "vessel_length_m": "length", "distance_from_shore_km": "shore_km"}
    names |= {name: name for name in ("is_vessel", "is_fishing", "confidence")}
    table = {column: [row.get(name) for row in rows] for column, name in names.items()}
    for i, column in enumerate(("detect_scene_row", "detect_scene_column")):
        table[column] = [row["place"][i] for row in rows]
    return table


def _random_case(seed: int) -> tuple[list[Row], list[Row], Contours]:
    draw = random.Random(seed)
    found, objects = [], []
    for scene in "ab":
        for rows in (found, objects):
            for _ in range(draw.randint(0, 5)):
                row = {
                    "scene": scene,
                    "place": (draw.uniform(0, 60), draw.uniform(0, 60)),
                    "is_vessel": draw.choice([True, True, False, None]),
                    "is_fishing": draw.choice([True, False, None]),
                    "length": draw.uniform(5, 700),
                }
                if rows is objects:
                    row["confidence"] = draw.choice(["HIGH", "MEDIUM", "LOW"])
                    row["shore_km"] = draw.choice([0.5, 2, 2.1])
                    row["length"] = draw.choice([row["length"], None])
                rows.append(row)
    shore = {s: [[(draw.uniform(-250, 60), 0.0) for _ in range(draw.randint(0, 2))]] for s in "ab"}
    return found, objects, shore


OPTIONS: list[dict[str, Any]] = [{}, {"drop_low": False}, {"costly": False}, {"score_all": True}, {"tolerance_m": 77}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_equals_plain_loops(options: dict[str, Any]) -> None:
    names = {"drop_low": "drop_low_detect", "costly": "costly_dist", "tolerance_m": "distance_tolerance_m"}
    given = {names.get(name, name): value for name, value in options.items()}
    matched = 0
    for seed in range(60):
        found, objects, shore = _random_case(seed)
        got = xview3_score(_table(found), _table(objects), shore, **given)
        expected = naive_score(found, objects, shore, **options)
        assert got["counts"] == expected["counts"], seed
        assert got["scores"] == pytest.approx(expected["scores"], abs=1e-12), seed
        matched += got["counts"]["loc"]["tp"]
    assert matched > 20


def test_the_score_of_some_scenes_is_made_of_their_sums() -> None:
    """Scenes a and b of random cases, together and alone."""
    for seed in range(40):
        found, objects, shore = _random_case(seed)
        sums = scene_sums(_table(found), _table(objects), shore)
        for part in ("a", "b", "ab"):
            chosen = [[row for row in rows if row["scene"] in part] for rows in (found, objects)]
            if not all(chosen):
                continue
            expected = naive_score(*chosen, shore)["scores"]
            rows = [i for i, scene in enumerate(sums.scenes) if scene in part]
            got = scores_of({name: column[rows].sum() for name, column in sums.columns.items()})
            assert {name: float(value) for name, value in got.items()} == pytest.approx(expected, abs=1e-12), seed


def _objects(places: list[tuple[float, float]], scene: str = "a", **columns: Any) -> Table:
    table = {
        "scene_id": scene,
        "is_vessel": True,
        "is_fishing": True,
        "vessel_length_m": 50.0,
        "confidence": "HIGH",
        "distance_from_shore_km": 1.0,
    }
    table |= columns
    result = {name: value if isinstance(value, list) else [value] * len(places) for name, value in table.items()}
    return result | {"detect_scene_row": [p[0] for p in places], "detect_scene_column": [p[1] for p in places]}


def _join(*tables: Table) -> Table:
    return {name: list(chain(*(table[name] for table in tables))) for name in tables[0]}


def test_perfect_scores_one() -> None:
    truth = _objects([(10, 10), (90, 10)])
    got = xview3_score(truth, truth, {"a": [[(0, 0), (0, 5)]]})
    assert got["scores"] == dict.fromkeys(got["scores"], 1.0)
    assert xview3_score(truth, truth)["scores"]["aggregate"] == pytest.approx(0.8)


def test_scenes_without_predictions_are_misses_where_asked_for() -> None:
    truth = _join(_objects([(10, 10)], "a"), _objects([(10, 10), (50, 50)], "b"), _objects([(1, 1)], "c"))
    found = _join(_objects([(10, 10)], "a"), _objects([(5, 5), (6, 6)], "empty"))
    assert xview3_score(found, truth)["counts"]["loc"] == {"tp": 1, "fp": 0, "fn": 0}
    got = xview3_score(found, truth, scenes=["a", "b", "empty"])
    assert got["counts"]["loc"] == {"tp": 1, "fp": 0, "fn": 2}
    assert got["counts"]["n_gt_scored"] == 3
    assert got["scores"]["loc_fscore"] == pytest.approx(0.5)
    only_b = xview3_score(found, truth, scenes=np.array(["b"]))
    assert only_b["counts"]["loc"] == {"tp": 0, "fp": 0, "fn": 2}
    assert only_b["scores"]["aggregate"] == 0


@pytest.mark.parametrize("scenes", [None, ["a"]])
def test_no_predictions_at_all(scenes: list[str] | None) -> None:
    truth = _objects([(10, 10), (50, 50)])
    got = xview3_score(_objects([]), truth, {"a": [[(0, 0)]]}, scenes=scenes)
    assert set(got["scores"].values()) == {0.0}
    assert got["counts"]["loc"] == {"tp": 0, "fp": 0, "fn": 2 if scenes else 0}
    assert got["counts"]["n_pred_in"] == 0


def test_all_detections_dropped_leaves_misses() -> None:
    truth = _objects([(10, 10), (900, 900)], confidence=["LOW", "HIGH"])
    got = xview3_score(_objects([(10, 11)]), truth, {"a": [[(0, 0)]]})
    assert got["counts"]["n_pred_scored"] == 0
    assert got["counts"]["loc"] == {"tp": 0, "fp": 0, "fn": 1}


def test_one_blank_length_makes_the_aggregate_nan() -> None:
    truth = _objects([(10, 10), (90, 10)])
    scores = xview3_score(_objects([(10, 10), (90, 10)], vessel_length_m=[50.0, None]), truth)["scores"]
    assert math.isnan(scores["length_acc"])
    assert math.isnan(scores["aggregate"])
    assert scores["loc_fscore"] == 1
    # It is not asked for where the truth is not known.
    unknown = _objects([(10, 10), (90, 10)], vessel_length_m=[50.0, None])
    assert xview3_score(unknown, unknown)["scores"]["length_acc"] == 1


def test_a_blank_class_is_wrong_both_ways() -> None:
    truth = _objects([(10, 10), (90, 10), (200, 10)], is_vessel=[True, False, None])
    got = xview3_score(_objects([(10, 10), (90, 10), (200, 10)], is_vessel=None), truth)
    assert got["counts"]["vessel"] == {"tp": 0, "fp": 1, "fn": 1, "tn": 0}
    assert got["counts"]["fishing"] == {"tp": 1, "fp": 0, "fn": 0, "tn": 0}  # of the vessel only


def test_shore_point_at_the_detection_does_not_count() -> None:
    truth = _objects([(10, 10)])
    for contour, near in (([(10, 10)], 0), ([(10, 10), (10, 10)], 0), ([(10, 10), (10, 10), (10, 11)], 1)):
        got = xview3_score(truth, truth, {"a": [contour]})
        assert got["counts"]["shore"] == {"tp": near, "fp": 0, "fn": 0}


@pytest.mark.parametrize(("column", "near"), [(220.0, 1), (np.nextafter(220, 221), 0)])
def test_shore_distance_is_inclusive(column: float, near: int) -> None:
    got = xview3_score(_objects([(0, column)]), _objects([(0, 215)]), {"a": [[(0, 0)]]})
    assert got["counts"]["shore"]["tp"] == near


def test_shore_is_not_asked_for() -> None:
    truth = _objects([(10, 10)])
    del truth["distance_from_shore_km"]
    for given in ({}, {"shorelines": {"a": [[(0, 0)]]}, "shore_tolerance_km": 0}):
        got = xview3_score(truth, truth, **given)
        assert got["counts"]["shore"] is None
        assert got["scores"]["loc_fscore_shore"] == 0


def _write(path: Path, rows: list[list[object]]) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return path


HEADER = ["index", "scene_id", "detect_scene_row", "detect_scene_column", "is_vessel", "is_fishing", "vessel_length_m"]
ROW = [0, "1234567890123456", 10, 10.5, "True", "", 12]
"""A scene id of digits only, and a column that the official program stumbles over."""


def test_csv_and_tables_are_the_same(tmp_path: Path) -> None:
    path = _write(
        tmp_path / "p.csv", [[*HEADER, "confidence"], [*ROW, "HIGH"], [1, "b", 3, 4, "false", "1.0", "", "LOW"]]
    )
    with path.open() as file:
        rows = list(csv.DictReader(file))
    table = {name: np.array([row[name] for row in rows], dtype=object) for name in rows[0]}
    expected = xview3_score(path, str(path))
    assert xview3_score(table, table) == expected
    assert expected["counts"]["n_gt_scored"] == 1


class Frame:
    """As much of a DataFrame as is asked for; `keys` and `columns` are those of pandas."""

    def __init__(self, table: Table) -> None:
        self.table, self.columns = table, list(table)

    def __getitem__(self, name: str) -> list[Any]:
        return self.table[name]


def test_data_frames() -> None:
    truth = _objects([(10, 10), (30, 10)])
    nan = Frame(_objects([(10, 10), (30, 10)], is_fishing=[math.nan, True], vessel_length_m=[np.float32(50), 50]))
    got = xview3_score(nan, Frame(truth))
    assert got["counts"]["fishing"] == {"tp": 1, "fp": 0, "fn": 1, "tn": 0}
    assert got["scores"]["length_acc"] == 1


@pytest.mark.parametrize(
    ("column", "cell", "message"),
    [
        ("detect_scene_row", "", r"p\.csv line 2: expected a place in pixels, got row nan and column 10.5"),
        ("detect_scene_row", "inf", r"p\.csv line 2: expected a place"),
        ("detect_scene_column", "ten", r"p\.csv line 2: expected a number in column `detect_scene_column`, got 'ten'"),
        (
            "is_vessel",
            "0.7",
            r"p\.csv line 2: expected True, False or nothing in column `is_vessel`, got '0.7'; compare",
        ),
        ("scene_id", "", r"p\.csv line 2: expected a scene"),
        ("confidence", "high", r"p\.csv line 2: expected one of .* in column `confidence`, got 'high'"),
        ("vessel_length_m", "0", r"p\.csv line 2: expected a length above 0 .* got 0; leave it empty"),
    ],
)
def test_cells_that_do_not_fit(column: str, cell: str, message: str, tmp_path: Path) -> None:
    header = [*HEADER, "confidence"]
    row = dict(zip(header, [*ROW, "HIGH"], strict=True)) | {column: cell}
    path = _write(tmp_path / "p.csv", [header, [row[name] for name in header]])
    with pytest.raises(DataError, match=message):
        xview3_score(path, path)


def test_tables_that_do_not_fit(tmp_path: Path) -> None:
    truth = _objects([(10, 10)])
    with pytest.raises(DataError, match="truth: expected a column `confidence`, got scene_id, is_vessel"):
        xview3_score(truth, {name: column for name, column in truth.items() if name != "confidence"})
    with pytest.raises(DataError, match=r"predictions: expected columns of one length, got \{"):
        xview3_score(truth | {"is_vessel": []}, truth)
    with pytest.raises(DataError, match=r"predictions row 0: expected a number .* got 'x'"):
        xview3_score(truth | {"vessel_length_m": ["x"]}, truth)
    with pytest.raises(DataError, match="predictions: expected the path of a CSV or a table of named columns, got int"):
        xview3_score(3, truth)
    with pytest.raises(DataError, match=r"missing\.csv: No such file"):
        xview3_score(tmp_path / "missing.csv", truth)
    with pytest.raises(DataError, match=r"scenes: expected ids of scenes in the truth, got none of them in \['z'\]"):
        xview3_score(truth, truth, scenes="z")
    with pytest.raises(DataError, match="one cell a row in column `vessel_length_m`, got shape"):
        xview3_score(truth | {"vessel_length_m": [[1, 2]]}, truth)
    with pytest.raises(DataError, match="one cell a row in column `is_vessel`"):
        xview3_score(truth | {"is_vessel": True}, truth)


@pytest.mark.parametrize(
    "options", [{"distance_tolerance_m": 0}, {"distance_tolerance_m": math.nan}, {"shore_tolerance_km": -1}]
)
def test_tolerances_out_of_range(options: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(options))}: expected"):
        xview3_score({}, {}, **options)
