"""Points through the command line: xView3-SAR scenes, and any images; wrong input ends in one line."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import yaml

from gigaxt.cli import main
from gigaxt.metrics import xview3_score
from xview3_folder import write_raster, write_root

VESSELS = {
    "scoring": "xview3",
    "flags": ["is_vessel", "is_fishing"],
    "numbers": ["vessel_length_m"],
    "logarithmic": ["vessel_length_m"],
}


def config(csv_path: Path, *, bands: int, head: dict[str, Any], **given: Any) -> Path:
    encoder = {"name": "convnextv2_atto", "region": 64, "in_channels": bands}
    data = {
        "data": {"csv": str(csv_path)},
        "model": {
            "region_encoder": {**encoder, "options": {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16]}},
            "context": {"dim": 16, "depth": 1, "summary": 2},
            "input": given,
            "head": {"kind": "points", "dim": 8, "score": 0.004, **head},
        },
        "train": {"epochs": 2, "batch": 1, "lr": 3e-3, "device": "cpu"},
    }
    path = csv_path.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(data))
    return path


@pytest.fixture(scope="module")
def vessels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with three scenes, their CSV and a run of two epochs."""
    folder = tmp_path_factory.mktemp("vessels")
    write_root(folder, 3)
    assert main(["import-xview3", str(folder), str(folder / "x.csv")]) == 0
    path = config(folder / "x.csv", bands=2, head=VESSELS, band_names=["VV", "VH"], mean=[-16.4, -26.3], std=[4.8, 5])
    assert main(["train", "--config", str(path), "--out", str(folder / "run")]) == 0
    return folder


def test_training_keeps_the_thresholds_of_the_best_model(vessels: Path) -> None:
    head = json.loads((vessels / "run" / "model" / "config.json").read_text())["model"]["head"]
    assert len(head["threshold"]) == 1
    assert len(head["flag_threshold"]) == 2
    assert "x.csv --out submission.csv" in (vessels / "run" / "report.html").read_text()
    assert head["number_mean"] == pytest.approx([np.log(60)])
    assert yaml.safe_load((vessels / "run" / "config.yaml").read_text())["model"]["head"]["threshold"] is None
    rows = list(csv.DictReader((vessels / "run" / "metrics.csv").read_text().splitlines()))
    assert {"aggregate", "loc_fscore_shore"} <= set(rows[0])


def test_scores_are_those_of_the_submission(vessels: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, out = vessels / "run", vessels / "all.csv"
    assert main(["predict", str(run), str(vessels / "validation"), "--out", str(out)]) == 0
    assert main(["eval", str(run), str(vessels / "x.csv"), "--split", "all", "--json", str(vessels / "s.json")]) == 0
    assert "aggregate" in capsys.readouterr().out
    expected = xview3_score(
        out,
        vessels / "validation.csv",
        vessels / "shoreline" / "validation",
        scenes=[f"{i:016x}v" for i in range(3)],
    )["scores"]
    found = json.loads((vessels / "s.json").read_text())["metrics"]
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-4)  # lengths are written to a centimetre


def test_geojson_of_a_scene(vessels: Path) -> None:
    out = vessels / "a.geojson"
    assert main(["predict", str(vessels / "run"), str(vessels / "validation" / f"{0:016x}v"), "--out", str(out)]) == 0
    data = json.loads(out.read_text())
    assert data["crs"]["properties"]["name"].endswith("32630")


@pytest.mark.parametrize(
    ("column", "word", "message"),
    [
        ("is_vessel", "maybe", "line 2: expected True, False or nothing in column `is_vessel`, got 'maybe'"),
        ("detect_scene_row", "", "line 2: expected a place in columns `detect_scene_row`"),
        ("detect_scene_row", "999", "points lie outside of"),
        ("vessel_length_m", "-3", "line 2: expected a number above 0 in column `vessel_length_m`"),
    ],
)
def test_wrong_labels(
    vessels: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], column: str, word: str, message: str
) -> None:
    folder = tmp_path / "x"
    shutil.copytree(vessels, folder)
    lines = list(csv.reader((folder / "validation.csv").read_text().splitlines()))
    lines[1][lines[0].index(column)] = word
    with (folder / "validation.csv").open("w", newline="") as file:
        csv.writer(file).writerows(lines)
    assert main(["eval", str(folder / "run"), str(folder / "x.csv"), "--split", "all"]) == 2
    captured = capsys.readouterr().err
    assert message in captured
    assert captured.count("\n") == 1


def test_wrong_scenes(vessels: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "x"
    shutil.copytree(vessels, folder)
    scene = folder / "validation" / f"{0:016x}v"

    def error(verb: str) -> str:
        split = ["--split", "all"] if verb == "eval" else ["--out", str(folder / "o.csv")]
        what = folder / "x.csv" if verb == "eval" else scene
        assert main([verb, str(folder / "run"), str(what), *split]) == 2
        assert not (folder / "o.csv").exists()
        text = capsys.readouterr().err
        assert text.count("\n") == 1
        return text

    shore = folder / "shoreline" / "validation" / f"{0:016x}v_shoreline.npy"
    kept = shore.read_bytes()
    shore.unlink()
    assert "expected a shoreline file" in error("eval")
    shore.write_bytes(kept)
    for name in ("VV_dB.tif", "VH_dB.tif"):
        write_raster(scene / name, np.full((128, 128), -32768, np.float16), 10.0)
    assert "none of its 4 regions holds data" in error("predict")
    data = (scene / "VV_dB.tif").read_bytes()
    (scene / "VV_dB.tif").write_bytes(data[:9000])
    assert "VV_dB.tif" in error("predict")


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures with two kinds of cells, and a run of two epochs."""
    folder = tmp_path_factory.mktemp("cells")
    random = np.random.default_rng(0)
    for i in range(3):
        pixels = random.integers(0, 60, (100, 130, 3), dtype=np.uint8)
        lines = ["x,y,kind,area"]
        for k, (row, col) in enumerate(random.integers(10, 90, (6, 2)).tolist()):
            pixels[row - 2 : row + 3, col - 2 : col + 3, k % 2] = 250
            lines.append(f"{col + 0.5},{row + 0.5},{('red', 'green')[k % 2]},{20 + k}")
        tifffile.imwrite(folder / f"{i}.tif", pixels)
        (folder / f"{i}.csv").write_text("\n".join(lines) + "\n")
    rows = "".join(f"{i}.tif,{i}.csv,{('train', 'train', 'val')[i]}\n" for i in range(3))
    (folder / "all.csv").write_text("image,points,split\n" + rows)
    head = {"classes": 2, "class_column": "kind", "numbers": ["area"]}
    path = config(folder / "all.csv", bands=3, head=head)
    assert main(["train", "--config", str(path), "--out", str(folder / "run"), "--train.augment.dihedral", "True"]) == 0
    return folder


def test_points_of_any_csv(cells: Path, capsys: pytest.CaptureFixture[str]) -> None:
    head = json.loads((cells / "run" / "model" / "config.json").read_text())["model"]["head"]
    assert head["class_names"] == ["green", "red"]
    assert main(["eval", str(cells / "run"), str(cells / "all.csv")]) == 0
    assert "average_precision" in capsys.readouterr().out
    out = cells / "found.csv"
    assert main(["predict", str(cells / "run"), str(cells / "0.tif"), str(cells / "1.tif"), "--out", str(out)]) == 0
    header = out.read_text().splitlines()[0]
    before = len(out.read_text().splitlines())
    less = ["--score", "0.999", "--png", "--out", str(out)]
    assert main(["predict", str(cells / "run"), str(cells / "0.tif"), *less]) == 0
    assert len(out.read_text().splitlines()) < before
    assert (cells / "0.points.png").exists()
    assert header == "image,row,col,class,score,area,map_x,map_y"
    assert "gigaxt predict" in (cells / "run" / "report.html").read_text()


def test_wrong_outputs(cells: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, image = str(cells / "run"), str(cells / "0.tif")
    for out, more, message in (
        ("a.tif", [], "expected the name of a .csv or .geojson file"),
        ("a.geojson", [str(cells / "1.tif")], "expected a .csv for the points of 2 images"),
        ("a.csv", ["--dihedral", "4"], "these are for masks"),
        ("a.csv", ["--score", "2"], "--score: expected 0 to 1"),
    ):
        assert main(["predict", run, image, *more, "--out", str(cells / out)]) == 2
        assert message in capsys.readouterr().err


def test_check_writes_a_config_that_fits(vessels: Path, cells: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder, csv_path, wanted in (
        (vessels, vessels / "x.csv", {"scoring": "xview3", "numbers": ["vessel_length_m"]}),
        (cells, cells / "all.csv", {"kind": "points"}),
    ):
        path = folder / "written.yaml"
        assert main(["check", str(csv_path), "--write", str(path), "--overlays", str(folder / "pictures")]) == 0
        data = yaml.safe_load(path.read_text())
        assert wanted.items() <= data["model"]["head"].items()
        printed = capsys.readouterr().out
        assert "points: " in printed
        assert "(ignored: nothing is learnt there)" in printed or folder is cells
        assert len(list((folder / "pictures").glob("*.png"))) == 3
        if folder is vessels:  # what is nodata in one band alone is no number of it
            assert data["model"]["input"]["mean"][2] > -100
    (cells / "0.csv").write_text("x,y,kind,area\n500,3,red,1\n")
    assert main(["check", str(cells / "all.csv")]) == 2
    assert "points that do not fit: 1" in capsys.readouterr().out


def test_without_a_val_split_thresholds_are_chosen_on_the_training_data(
    vessels: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "x"
    shutil.copytree(vessels, folder)
    shutil.rmtree(folder / "run")
    text = (folder / "x.csv").read_text()
    (folder / "x.csv").write_text(text.replace(",val\n", ",train\n"))
    path = config(folder / "x.csv", bands=2, head=VESSELS, band_names=["VV", "VH"], mean=[-16.4, -26.3], std=[4.8, 5])
    assert main(["train", "--config", str(path), "--out", str(folder / "run")]) == 0
    captured = capsys.readouterr()
    assert captured.err.count("no val split: thresholds are those that are best on the training images") == 1
    head = json.loads((folder / "run" / "model" / "config.json").read_text())["model"]["head"]
    assert (
        main(["eval", str(folder / "run"), str(folder / "x.csv"), "--split", "train", "--json", str(folder / "a")]) == 0
    )
    chosen = json.loads((folder / "a").read_text())
    assert chosen["per_class"]["object"]["threshold"] == pytest.approx(head["threshold"][0])
    assert head["threshold"] != [0.3]
    assert len(head["flag_threshold"]) == 2
    fixed = ["--model.head.threshold", "0.2", "--model.head.flag-threshold", "0.5", "0.5"]
    assert main(["train", "--config", str(path), *fixed, "--out", str(folder / "fixed")]) == 0
    assert "no val split" not in capsys.readouterr().err
    assert json.loads((folder / "fixed/model/config.json").read_text())["model"]["head"]["threshold"] == [0.2]
