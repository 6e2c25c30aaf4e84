"""`gigaxt eval`, and the whole way from a CSV of cases to scores, for each kind of label."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import yaml

from gigaxt.cli import main

MODEL = {
    "region_encoder": {
        "name": "convnextv2_atto",
        "region": 64,
        "options": {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16]},
    },
    "context": {"kind": "mamba2", "dim": 16, "depth": 1, "summary": 2},
}
HEADS: dict[str, dict[str, Any]] = {
    "label": {"classes": 2},
    "multi": {"classes": 2, "target": "multi", "label_columns": ["er", "pr"]},
    "number": {"classes": 1, "target": "regression", "label_columns": ["mass"]},
    "time": {"classes": 3, "target": "survival"},
}
CASES = 24


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 patients of one or two images, from two hospitals (and a third with one patient), with labels of all kinds."""
    folder = tmp_path_factory.mktemp("study")
    random = np.random.default_rng(0)
    lines = ["image,case,site,label,er,pr,mass,time,event"]
    for p in range(CASES):
        kind = p % 2
        site = "Chur" if p == 0 else ["Bern", "Basel"][p // 2 % 2]
        labels = [
            "ab"[kind],
            "" if p % 5 == 0 else str(kind),
            str(p // 3 % 2),
            "" if p == 7 else f"{5000 + 800 * kind}",
            f"{1 + p * 7 % 24 / 2}",
            str(int(p % 4 > 0)),
        ]
        for i in range(1 + p % 3 % 2):
            pixels = random.integers(0, 80, (64, 64 + 20 * i, 3)).astype(np.uint8)
            pixels[8:40, 8:40, kind] += 150
            tifffile.imwrite(folder / f"{p}_{i}.tif", pixels, tile=(32, 32), photometric="rgb")
            lines.append(",".join([f"{p}_{i}.tif", f"p{p}", site, *labels]))
    (folder / "study.csv").write_text("\n".join(lines))
    for name, head in HEADS.items():
        run = {
            "data": {"csv": "study.csv"},
            "model": {**MODEL, "head": {"kind": "classify", **head}},
            "train": {"epochs": 2, "batch": 4, "lr": 0.002, "streaming": {"budget_gib": 1.0}},
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(run))
    return folder


@pytest.fixture
def folder(study: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(study)
    return study


@pytest.fixture(scope="module")
def runs(study: Path) -> Path:
    """Runs of one head, as one and as folds."""
    for name, more in (("label", []), ("folds", ["--folds", "2"])):
        arguments = ["train", "--config", str(study / "label.yaml"), "--out", str(study / name), *more]
        assert main([*arguments, "--train.epochs", "1"]) == 0
    return study


@pytest.mark.parametrize("name", ["multi", "number", "time"])
def test_every_kind_of_label_from_csv_to_scores(folder: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--config", f"{name}.yaml", "--out", name]) == 0
    head = yaml.safe_load((folder / name / "config.yaml").read_text())["model"]["head"]
    filled = {"multi": "label_columns", "number": "target_std", "time": "time_bins"}[name]
    assert head[filled] is not None
    saved = json.loads((folder / name / "model/config.json").read_text())
    assert saved["model"]["head"] == head  # what the data decided goes with the model
    if name == "time":
        assert main(["train", "--config", f"{name}.yaml", "--out", name]) == 0  # nothing left to do, no contradiction
    capsys.readouterr()
    assert main(["eval", name, "study.csv", "--split", "all", "--json", f"{name}.json"]) == 0
    out = capsys.readouterr().out
    assert "study.csv, all: 24 cases of 32 images" in out
    scores = json.loads((folder / f"{name}.json").read_text())
    metric = {"multi": "average_precision", "number": "rmse", "time": "concordance"}[name]
    low, high = scores["intervals"][metric]
    assert low <= scores["metrics"][metric] <= high
    assert f"{low:.4f} to {high:.4f}" in out
    page = (folder / name / "report.html").read_text()
    assert f"<td>{metric}</td>" in page
    assert "95%: of 1,000 draws of groups" in page
    if name == "number":
        assert scores["metrics"]["rmse"] < 800  # learnt in units of the data: a bias alone would still be near 0

    assert main(["predict", name, "study.csv", "--out", f"{name}.csv"]) == 0
    with (folder / f"{name}.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["case"] for row in rows] == [f"p{p}" for p in range(CASES)]
    assert rows[1]["image"] == "1_0.tif|1_1.tif"
    if name == "time":
        bins = [float(rows[0][key]) for key in head["class_names"]]
        assert sum(bins) < 1
        assert float(rows[0]["prediction"]) == pytest.approx(sum(np.cumsum(bins)), rel=1e-4)


def test_one_table_for_each_value_of_a_column(runs: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "label", "study.csv", "--split", "all", "--by", "Site", "--json", "by.json"]) == 0
    out = capsys.readouterr().out
    assert out.index("site = Basel: 12 cases") < out.index("site = Bern: 11 cases")
    assert "site = Chur: not scored: 1 of the 10 cases that a score needs at least" in out
    scores = json.loads((folder / "by.json").read_text())
    assert list(scores["by"]["not_scored"]) == ["Chur"]
    parts = scores["by"]["values"]
    right = sum(parts[site]["metrics"]["accuracy"] * parts[site]["cases"] for site in parts)
    assert right == pytest.approx(scores["metrics"]["accuracy"] * CASES, abs=1)
    assert parts["Bern"]["loss"] is None
    assert len(parts["Bern"]["intervals"]["accuracy"]) == 2


def test_folds_are_scored_each_on_its_own(runs: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "folds", "study.csv", "--json", "folds.json"]) == 0
    out = capsys.readouterr().out
    assert "study.csv, val, each model on its own fold" in out
    assert "study.csv, val: 24 cases of 32 images" in out  # every case once
    scores = json.loads((folder / "folds.json").read_text())
    assert scores["folds"]["accuracy"]["mean"] == pytest.approx(scores["metrics"]["accuracy"])  # of equal size
    with (folder / "folds/summary.csv").open() as file:
        table = {row["score"]: row for row in csv.DictReader(file)}
    assert scores["folds"]["accuracy"]["values"] == [float(table["accuracy"][f"fold-{i}"]) for i in (1, 2)]
    for arguments in (["--folds"], ["--folds", "2"], ["--folds", "--by", "site"]):
        assert main(["eval", "folds", "study.csv", *arguments]) == 0
        assert "mean" in capsys.readouterr().out
    assert main(["eval", "folds/fold-2", "study.csv"]) == 0
    assert "study.csv, val: 12 cases" in capsys.readouterr().out


def test_a_stopped_or_repeated_command_continues_the_folds(runs: Path, folder: Path) -> None:
    before = (folder / "folds/fold-1/metrics.csv").read_text()
    arguments = ["train", "--config", "label.yaml", "--out", "folds", "--train.epochs", "1"]
    assert main([*arguments, "--folds=2"]) == 0
    assert (folder / "folds/fold-1/metrics.csv").read_text() == before


def test_folds_of_other_rows_are_refused(runs: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A division of other rows is another one: models would be scored on what they were trained on."""
    Path("more.csv").write_text(Path("study.csv").read_text() + "\n0_0.tif,p0,Chur,a,,0,5000,1.0,0")
    Path("fewer.csv").write_text("\n".join(Path("study.csv").read_text().splitlines()[:-3]))
    capsys.readouterr()
    for arguments in (["fewer.csv"], ["study.csv", "--split-seed", "1"]):
        assert main(["eval", "folds", *arguments]) == 2
        assert (
            "expected the rows and the split seed that the folds of folds/fold-1 were made of"
            in capsys.readouterr().err
        )
    assert main(["eval", "folds", "more.csv"]) == 2
    assert "image 0_0.tif is twice in case 'p0'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["eval", "label", "study.csv", "--by", "sight"], "column `sight` is missing; did you mean `site`?"),
        (["eval", "label", "study.csv", "--budget-gib", "1e9"], "--budget-gib: expected at most the "),
        (["eval", "label", "study.csv", "--by", "image", "--split", "all"], "case 'p1' has two values of `image`"),
        (["eval", "label", "study.csv", "--folds"], "label: expected folds (fold-1, fold-2, ..."),
        (["eval", "folds", "study.csv", "--folds", "5"], "folds: expected 5 folds"),
        (["eval", "folds", "study.csv", "--split", "all"], "models of folds are scored on val, each on its own, or"),
        (["eval", "folds", "study.csv", "--split", "test", "--by", "site"], "--by: on test each fold's model"),
        (["eval", "folds", "study.csv", "--split", "test"], "no row is in the split `test`"),
        (["predict", "folds", "study.csv", "--out", "x.csv"], "it holds folds: choose one, such as folds/fold-1"),
        (
            ["train", "--config", "label.yaml", "--folds", "five"],
            "--folds: expected a number after it, such as 5, got f",
        ),
        (["train", "--config", "label.yaml", "--folds"], "--folds: expected a number after it"),
        (["train", "--config", "label.yaml", "--folds", "1"], "expected at least 2 folds"),
        (["train", "--config", "label.yaml", "--folds", "40", "--out", "x"], "40 folds need at least as many groups"),
        (["train", "--config", "label.yaml", "--folds", "2", "--out", "label"], "label holds a run, not folds"),
        (["train", "--config", "time.yaml", "--model.head.target", "multi", "--out", "x"], "model.head.classes is 3"),
        (
            ["train", "--config", "multi.yaml", "--model.head.label-columns", "er", "pgr", "--out", "x"],
            "`pgr` is missing",
        ),
    ],
)
def test_mistakes_are_one_line(
    runs: Path, folder: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert message in captured.err
