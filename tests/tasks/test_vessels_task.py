"""xView3-SAR as a task: which objects its thresholds are chosen on, and its score."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gigaxt.datasets.manifest import Manifest
from gigaxt.found.objects import Objects
from gigaxt.found.points import decided
from gigaxt.image.memory import ArrayImage
from gigaxt.nn.heads import PointsConfig
from gigaxt.tasks.base import Evaluation
from gigaxt.tasks.vessels import Vessels, VesselsTally
from xview3_folder import HEADER

VESSELS = {"scoring": "xview3", "flags": ["is_vessel", "is_fishing"], "numbers": ["vessel_length_m"]}

Label = tuple[int, int, str, str, str]
"""Row, column, is_vessel, is_fishing, confidence."""


def vessels(folder: Path, scenes: dict[str, list[Label]], *, groups: bool = True, **head: Any) -> Vessels:
    """The task of some scenes of 400 x 400 px with these labels, each 50 m long and 1 km from the shore."""
    with (folder / "labels.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, HEADER)
        table.writeheader()
        for scene, labels in scenes.items():
            for row, col, vessel, fishing, confidence in labels:
                place = {"detect_scene_row": row, "detect_scene_column": col, "scene_id": scene}
                what = {"is_vessel": vessel, "is_fishing": fishing, "vessel_length_m": 50, "confidence": confidence}
                table.writerow(dict.fromkeys(HEADER, "") | place | what | {"distance_from_shore_km": 1.0})
    lines = ["image,points,scene_id,shoreline,group"]
    for i, scene in enumerate(scenes):
        np.save(folder / f"{scene}_shoreline.npy", np.array([[[0.0, col] for col in range(0, 400, 10)]]))
        (folder / scene).mkdir(exist_ok=True)
        lines.append(f"{scene},labels.csv,{scene},{scene}_shoreline.npy,{f'g{i}' if groups else 'g'}")
    (folder / "x.csv").write_text("\n".join(lines) + "\n")
    return Vessels(Manifest.read(folder / "x.csv", task="points"), PointsConfig(**{**VESSELS, **head}))


Detection = tuple[float, float, float, float, float]
"""Row, column, score, chance of is_vessel, chance of is_fishing."""


def tallied(task: Vessels, found: dict[str, list[Detection]]) -> VesselsTally:
    """What a model would have found, the best first; lengths of 40 m."""
    tally = task.tally()
    image = ArrayImage(np.zeros((400, 400, 1), np.uint8))
    for row in task.manifest.rows:
        columns = np.array(found.get(row.cells["scene_id"], []), float).reshape(-1, 5)
        objects = Objects(
            places=columns[:, :2] + 0.5,
            classes=np.zeros(len(columns), np.int64),
            scores=columns[:, 2],
            attributes={
                "is_vessel": columns[:, 3],
                "is_fishing": columns[:, 4],
                "vessel_length_m": np.full(len(columns), 40.0),
            },
        )
        sums = {"loss_sum": torch.tensor(1.0), "objects": torch.tensor(1.0)}
        tally.update([row], [task.target(row, image)], {"found": objects, **sums})
    return tally


def evaluated(task: Vessels, found: dict[str, list[Detection]]) -> Evaluation:
    return tallied(task, found).compute()


def test_fishing_is_asked_of_vessels_alone(tmp_path: Path) -> None:
    """A fixed platform that looks like a fishing vessel does not raise the threshold of fishing vessels."""
    task = vessels(
        tmp_path,
        {
            "a": [
                (50, 50, "True", "True", "HIGH"),
                (50, 150, "True", "False", "HIGH"),
                (50, 250, "False", "False", "HIGH"),
            ]
        },
    )
    found = {"a": [(50, 50, 0.9, 0.9, 0.6), (50, 150, 0.8, 0.8, 0.2), (50, 250, 0.7, 0.1, 0.9)]}
    result = evaluated(task, found)
    assert result.per_class["is_fishing"]["threshold"] == pytest.approx(0.4)
    assert (result.per_class["is_fishing"]["f1"], result.per_class["is_fishing"]["known"]) == (1.0, 2)
    assert result.per_class["is_vessel"]["threshold"] == pytest.approx(0.45)
    assert (result.metrics["fishing_fscore"], result.metrics["vessel_fscore"]) == (1.0, 1.0)
    settled = PointsConfig(**VESSELS)
    task.settle(settled, result)
    assert decided(tallied(task, found).images[0].found, settled).attributes["is_fishing"].tolist() == [1, 0, 1]


@pytest.mark.parametrize("low", ["ignore", "object", "background"])
def test_low_confidence_does_not_count_however_it_is_learnt(tmp_path: Path, low: str) -> None:
    """The official program leaves such a detection out: it is neither right nor a false alarm."""
    task = vessels(tmp_path, {"a": [(50, 50, "True", "", "HIGH"), (50, 150, "True", "", "LOW")]}, low_confidence=low)
    target = task.target(task.manifest.rows[0], ArrayImage(np.zeros((400, 400, 1), np.uint8)))
    assert (len(target), int(target.ignored.sum())) == {"ignore": (2, 1), "object": (2, 0), "background": (1, 0)}[low]
    for found in (
        [(50, 150, 0.95, 1, 1), (50, 50, 0.9, 1, 1), (300, 300, 0.5, 1, 1)],
        [(50, 50, 0.9, 1, 1), (300, 300, 0.5, 1, 1), (50, 150, 0.2, 1, 1)],
    ):
        result = evaluated(task, {"a": found})
        scores = result.per_class["object"]
        assert (scores["threshold"], scores["f1"], scores["cases"]) == (pytest.approx(0.7), 1.0, 1)
        assert result.metrics["loc_fscore"] == 1.0


def some_scenes(seed: int) -> tuple[dict[str, list[Label]], dict[str, list[Detection]]]:
    """Six scenes of one to five objects, found up to twice, up to 30 px away; one scene without any to find."""
    random = np.random.default_rng(seed)
    scenes: dict[str, list[Label]] = {}
    found: dict[str, list[Detection]] = {}
    for name in "cafebd":  # not sorted
        scenes[name], found[name] = [], []
        for _ in range(random.integers(1, 6)):
            row, col = (int(x) for x in random.integers(0, 350, 2))
            flags = [("True", "False", "")[random.integers(3)] for _ in range(2)]
            scenes[name].append((row, col, *flags, ("HIGH", "MEDIUM", "LOW")[random.integers(3)]))
            for _ in range(random.integers(0, 3)):
                away = random.uniform(0, 30)
                found[name].append((row + away, col, *random.uniform(0.05, 1, 3)))
        found[name].sort(key=lambda detection: -detection[2])
    scenes["low"] = [(9, 9, "True", "", "LOW")]
    return scenes, found


@pytest.mark.parametrize("seed", range(3))
def test_scores_of_drawn_scenes_are_those_of_a_data_set_that_has_them_so_often(tmp_path: Path, seed: int) -> None:
    scenes, found = some_scenes(seed)
    task = vessels(tmp_path, scenes, threshold=[0.2], flag_threshold=[0.5, 0.5])
    tally = tallied(task, found)
    weights = np.random.default_rng(seed).integers(0, 4, (len(scenes), 3)).astype(float)
    got = tally.scoring(tally.thresholds())(torch.from_numpy(weights))
    for draw in range(3):
        folder = tmp_path / f"draw{draw}"
        folder.mkdir()
        often = {f"{name}{k}": name for i, name in enumerate(scenes) for k in range(int(weights[i, draw]))}
        again = vessels(
            folder, {new: scenes[old] for new, old in often.items()}, threshold=[0.2], flag_threshold=[0.5, 0.5]
        )
        expected = evaluated(again, {new: found.get(old, []) for new, old in often.items()}).metrics
        for name, value in expected.items():
            assert float(got[name][draw]) == pytest.approx(value, abs=1e-12), name


def test_intervals_over_groups_of_scenes(tmp_path: Path) -> None:
    scenes, found = some_scenes(0)
    result = evaluated(vessels(tmp_path, scenes), found)
    assert set(result.intervals) == set(result.metrics)
    for name, (low, high) in result.intervals.items():
        assert low <= result.metrics[name] <= high, name
    assert result.intervals["loc_fscore"][1] - result.intervals["loc_fscore"][0] > 0.05
    assert result.notes[0] == "intervals are of 7 groups only, and so too narrow"
    assert result.notes[1].startswith("1 of 7 scenes have no object to find")
    alone = evaluated(vessels(tmp_path, scenes, groups=False), found)
    assert (alone.intervals, alone.metrics) == ({}, result.metrics)


def test_scenes_without_a_label(tmp_path: Path) -> None:
    """Officially they do not count, whatever is found there; in precision and F1 of objects it is a false alarm."""
    scenes: dict[str, list[Label]] = {"a": [(50, 50, "True", "True", "HIGH")], "empty": [], "nothing": []}
    found = {"a": [(50, 50, 0.9, 1, 1)], "empty": [(70, 70, 0.8, 1, 1)]}
    fixed = {"threshold": [0.5], "flag_threshold": [0.5, 0.5]}
    result = evaluated(vessels(tmp_path, scenes, **fixed), found)
    alone = evaluated(vessels(tmp_path, {"a": scenes["a"]}, **fixed), found)
    assert result.metrics == alone.metrics
    assert result.metrics["loc_fscore"] == 1
    assert result.per_class["object"]["precision"] == 0.5
    assert any(note.startswith("2 of 3 scenes have no object to find") for note in result.notes)
    none = evaluated(vessels(tmp_path, {"empty": [], "nothing": []}, **fixed), found)
    assert all(np.isnan(value) for value in none.metrics.values())
