"""Detection on the command line: import, check, train, eval and predict, and scores of files."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as Pillow

from gigaxt.cli import main
from gigaxt.cli.predict_objects import image_ids
from gigaxt.draw import CASE_COLOURS
from gigaxt.metrics import coco_score

RUN = """
data: {csv: data.csv}
model:
  region_encoder: {name: convnextv2_atto, region: 64, options: {depths: [1, 1, 1, 1], dims: [16, 16, 16, 16]}}
  context: {kind: full, dim: 16, depth: 1, summary: 2}
  head: {kind: detect, classes: 2, dim: 16, depth: 1, strides: [4, 8]}
  input: {mean: [60, 60, 60], std: [60, 60, 60]}
train: {epochs: 25, batch: 1, lr: 0.005, warmup_epochs: 2, eval_every: 25, streaming: {budget_gib: 4}}
"""


def make_images(folder: Path) -> Path:
    """Bright and dark squares on grey, two images to train on and one to validate, across borders of regions."""
    rng = np.random.default_rng(0)
    images, annotations = [], []
    for i in range(3):
        pixels = np.full((80, 100, 3), 60, np.uint8)
        for k, (x, y) in enumerate(((10, 12), (56, 50), (70, 10), (20, 55))):
            x, y, side = x + int(rng.integers(0, 5)), y + int(rng.integers(0, 5)), int(rng.integers(14, 18))
            bright = (i + k) % 2
            pixels[y : y + side, x : x + side] = 230 if bright else 0
            box = {"bbox": [x, y, side, side], "area": side * side, "iscrowd": 0}
            annotations.append({"id": len(annotations) + 1, "image_id": 10 + i, "category_id": (4, 2)[bright], **box})
        Pillow.fromarray(pixels).save(folder / f"{i}.png")
        images.append({"id": 10 + i, "file_name": f"{i}.png", "height": 80, "width": 100})
    categories = [{"id": 4, "name": "dark"}, {"id": 2, "name": "bright"}]
    truth = {"images": images, "categories": categories, "annotations": annotations}
    (folder / "truth.json").write_text(json.dumps(truth))
    return folder / "truth.json"


def test_from_coco_json_to_predictions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    truth, table, run = make_images(tmp_path), tmp_path / "data.csv", tmp_path / "run"
    assert main(["import-coco", str(truth), str(tmp_path), str(table)]) == 0
    assert "3 images, 0 of them without annotations, 12 boxes of 2 categories" in capsys.readouterr().out
    assert main(["import-coco", str(truth), str(tmp_path), str(table)]) == 2
    lines = table.read_text().splitlines()
    splits = ["split", "train", "train", "val"]
    table.write_text("\n".join(f"{line},{split}" for line, split in zip(lines, splits, strict=True)))
    assert main(["check", str(table), "--write", str(tmp_path / "found.yaml"), "--overlays", str(tmp_path / "o")]) == 0
    out = capsys.readouterr().out
    assert "boxes: 12" in out
    assert "bright" in out
    assert 'class_names: ["bright", "dark"]' in (tmp_path / "found.yaml").read_text()
    assert "category_ids: [2, 4]" in (tmp_path / "found.yaml").read_text()
    assert len(list((tmp_path / "o").glob("*.png"))) == 3

    (tmp_path / "run.yaml").write_text(RUN)
    assert main(["train", "--config", str(tmp_path / "run.yaml"), "--out", str(run)]) == 0
    capsys.readouterr()
    assert main(["eval", str(run), str(table), "--split", "train", "--json", str(tmp_path / "scores.json")]) == 0
    scores = json.loads((tmp_path / "scores.json").read_text())["metrics"]
    pictures = ["eval", str(run), str(table), "--split", "all", "--png", str(tmp_path / "pictures")]
    assert main(pictures) == 0
    names = {f"{kind}_0{k}_{i}.png" for kind in ("worst", "best") for k in (1, 2, 3) for i in range(3)}
    drawn = sorted((tmp_path / "pictures").iterdir())
    assert len(drawn) == 6
    assert {path.name for path in drawn} < names
    found = np.asarray(Pillow.open(drawn[0]))[:, :100]
    assert all((found == colour).all(axis=2).sum() > 30 for colour in CASE_COLOURS[:2])  # true ones, and found ones
    assert main([*pictures[:-1], str(tmp_path / "0.png")]) == 2
    assert (run / "report.html").read_text().count('title="boxes"') == 2  # the worst and the best of one image
    assert scores["AP50"] > 0.9
    assert scores["f1"] > 0.9
    saved = json.loads((run / "model" / "config.json").read_text())
    assert saved["model"]["head"]["category_ids"] == [2, 4]
    assert saved["model"]["head"]["threshold"] is not None  # the best on val

    predict = ["predict", str(run), str(table), "--out"]
    assert main([*predict, str(tmp_path / "out" / "found.json"), "--png"]) == 0
    assert sorted(path.name for path in (tmp_path / "out").glob("*.png")) == ["0.png", "1.png", "2.png"]
    found = json.loads((tmp_path / "out" / "found.json").read_text())
    assert {entry["image_id"] for entry in found} == {10, 11, 12}
    assert {entry["category_id"] for entry in found} == {2, 4}
    assert coco_score(truth, found)["stats"]["AP50"] > 0.6
    assert main(["eval", str(tmp_path / "out" / "found.json"), str(truth)]) == 0
    assert "AP50" in capsys.readouterr().out
    assert main([*predict, str(tmp_path / "found.csv"), "--score", "0.5"]) == 0
    rows = list(csv.DictReader((tmp_path / "found.csv").read_text().splitlines()))
    assert min(float(row["score"]) for row in rows) >= 0.5
    assert {row["class"] for row in rows} == {"bright", "dark"}
    assert main([*predict, str(tmp_path / "found"), "--png"]) == 0
    for i in range(3):  # a picture is of what the model calls found, whatever a file for scoring takes besides
        assert (tmp_path / "out" / f"{i}.png").read_bytes() == (tmp_path / "found" / f"{i}.png").read_bytes()
    features = json.loads((tmp_path / "found" / "0.geojson").read_text())["features"]
    assert features[0]["properties"]["classification"]["name"] in ("bright", "dark")


def test_image_ids_are_those_of_the_coco_file(tmp_path: Path) -> None:
    make_images(tmp_path)
    truth = json.loads((tmp_path / "truth.json").read_text())
    for image in truth["images"]:
        image["id"] = f"0{image['id']}"
    for annotation in truth["annotations"]:
        annotation["image_id"] = f"0{annotation['image_id']}"
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    (tmp_path / "broken.json").write_text("{")
    table = tmp_path / "data.csv"
    table.write_text("image,boxes,image_id\n0.png,truth.json,\n1.png,truth.json,011\n2.png,,12\nx.png,truth.json,\n")
    assert image_ids([table]) == {tmp_path / "0.png": "010", tmp_path / "1.png": "011", tmp_path / "2.png": 12}
    table.write_text("image,boxes,image_id\n0.png,broken.json,\n1.png,broken.json,11\n2.png,areas.geojson,x\n")
    assert image_ids([table, tmp_path / "0.png"]) == {tmp_path / "1.png": 11, tmp_path / "2.png": "x"}


def test_without_a_val_split_the_threshold_is_chosen_on_the_training_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_images(tmp_path)
    rows = "".join(f"{i}.png,truth.json,{10 + i},train\n" for i in range(3))
    (tmp_path / "data.csv").write_text(f"image,boxes,image_id,split\n{rows}")
    (tmp_path / "run.yaml").write_text(RUN.replace("epochs: 25", "epochs: 6"))
    run = str(tmp_path / "run")
    assert main(["train", "--config", str(tmp_path / "run.yaml"), "--out", run]) == 0
    assert capsys.readouterr().err.count("no val split: thresholds are those that are best on the training images") == 1
    split = ["--split", "train", "--json", str(tmp_path / "scores.json")]
    assert main(["eval", run, str(tmp_path / "data.csv"), *split]) == 0
    scores = json.loads((tmp_path / "scores.json").read_text())["metrics"]
    head = json.loads((tmp_path / "run" / "model" / "config.json").read_text())["model"]["head"]
    assert head["threshold"] == pytest.approx(scores["best_threshold"])
    assert scores["f1"] == scores["best_f1"]
    report = (tmp_path / "run" / "report.html").read_text()
    assert "scene.tif --out found.geojson" in report
    assert "--split train" in report


def test_wrong_outputs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tiny_models import tiny_model

    make_images(tmp_path)
    tiny_model({"kind": "detect", "classes": 2, "dim": 8}).save(tmp_path / "m")
    images = [str(tmp_path / f"{i}.png") for i in range(2)]
    for args, message in (
        ([*images, "--out", str(tmp_path / "a.tif")], "the model gives objects: expected a .json, .geojson or .csv"),
        ([*images, "--out", str(tmp_path / "a.geojson")], "holds one image's objects, got 2: give a folder"),
        ([*images, "--out", str(tmp_path), "--png"], "is one of the images"),
        ([images[0], "--out", str(tmp_path / "a.csv"), "--overlap", "8"], "these are for masks"),
        ([images[0], "--out", str(tmp_path / "a.csv"), "--score", "2"], "--score: expected 0 to 1"),
    ):
        assert main(["predict", str(tmp_path / "m"), *args]) == 2
        assert message in capsys.readouterr().err
    tiny_model({"kind": "segment", "classes": 2, "dim": 8}).save(tmp_path / "s")
    (tmp_path / "s.csv").write_text("image,mask\n0.png,0.png\n")
    assert main(["eval", str(tmp_path / "s"), str(tmp_path / "s.csv"), "--split", "all", "--png", str(tmp_path)]) == 2
    assert "--png: draws boxes, and the model's head is of kind segment" in capsys.readouterr().err
    assert main(["predict", str(tmp_path / "s"), images[0], "--out", str(tmp_path / "a.tif"), "--score", "0.5"]) == 2


@pytest.mark.parametrize(
    ("case", "run", "found"),
    [
        ("bbox_01", "bbox", "dt.json"),
        ("bbox_01", "bbox_class_agnostic", "dt.json"),
        ("segm_01", "segm", "dt.json"),
        ("real_val2014_100", "bbox", "dt_bbox.json"),
        ("real_val2014_100", "segm", "dt_segm.json"),
    ],
)
def test_files_are_scored_as_by_pycocotools(tmp_path: Path, fixtures: Path, case: str, run: str, found: str) -> None:
    folder, out = fixtures / "coco_map_cases" / case, tmp_path / "scores.json"
    expected: dict[str, Any] = json.loads((folder / "expected.json").read_text())["runs"][run]
    options = ["--iou", expected["args"]["iou"], "--json", str(out)]
    options += ["--categories", "together"] if "agnostic" in run else []
    assert main(["eval", str(folder / found), str(folder / "gt.json"), *options]) == 0
    scores = json.loads(out.read_text())
    for key in ("stats", "per_category_AP"):
        assert scores[key] == pytest.approx(expected[key], abs=1e-9)


def test_files_that_do_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    truth = make_images(tmp_path)
    (tmp_path / "found.json").write_text('[{"image_id": 99, "category_id": 2, "bbox": [0, 0, 1, 1], "score": 1}]')
    assert main(["eval", str(tmp_path / "found.json"), str(truth)]) == 2
    assert "prediction 0 (from 0): expected an image_id" in capsys.readouterr().err
    assert main(["eval", str(tmp_path / "none.json"), str(truth)]) == 2
    assert main(["eval", str(tmp_path / "found.json"), str(truth), "--png", str(tmp_path)]) == 2
    assert "--png: draws what a model finds" in capsys.readouterr().err
