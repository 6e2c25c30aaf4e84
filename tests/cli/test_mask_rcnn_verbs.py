"""Instance masks on the command line: import, train, eval, predict, and scores of what was predicted."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as Pillow
from shapely.geometry import shape

from gigaxt.cli import main
from gigaxt.metrics import coco_score
from gigaxt.shapes.crops import Crop
from gigaxt.shapes.run_lengths import run_lengths

RUN = """
data: {csv: data.csv}
model:
  region_encoder: {name: convnextv2_atto, region: 64, options: {depths: [1, 1, 1, 1], dims: [16, 16, 32, 32]}}
  context: {kind: full, dim: 16, depth: 1, summary: 2}
  head: {kind: mask_rcnn, classes: 2, dim: 16, hidden: 32, strides: [4, 8], anchor_cells: 4, proposals: 64, samples: 32,
    max_objects: 20}
  input: {mean: [80, 80, 80], std: [60, 60, 60]}
train: {epochs: 50, batch: 1, lr: 0.005, warmup_epochs: 2, eval_every: 50, streaming: {budget_gib: 4}}
"""


def make_images(folder: Path) -> Path:
    """Discs (run lengths) and corners (polygons), across the borders of regions of 64 px."""
    rng = np.random.default_rng(0)
    images, annotations = [], []
    for i in range(3):
        pixels = np.full((96, 128, 3), 70, np.uint8)
        for k, (x, y) in enumerate(((8, 10), (54, 44), (84, 8), (16, 56))):
            x, y, side = x + int(rng.integers(0, 6)), y + int(rng.integers(0, 6)), int(rng.integers(24, 30))
            rows, cols = np.mgrid[:side, :side] + 0.5
            disc, corner = np.hypot(rows - side / 2, cols - side / 2) <= side / 2, (rows > side / 2) | (cols < side / 2)
            is_disc = (i + k) % 2
            mask = disc if is_disc else corner
            pixels[y : y + side, x : x + side][mask] = (230, 200, 60) if is_disc else (10, 20, 140)
            h = side / 2
            polygon = [x, y, x + h, y, x + h, y + h, x + side, y + h, x + side, y + side, x, y + side]
            one = {"id": len(annotations) + 1, "image_id": i + 1, "category_id": 2 if is_disc else 5, "iscrowd": 0}
            one |= {"bbox": [x, y, side, side], "area": int(mask.sum())}
            annotations.append(
                {**one, "segmentation": run_lengths(Crop(x, y, mask), 96, 128) if is_disc else [polygon]}
            )
        Pillow.fromarray(pixels).save(folder / f"{i}.png")
        images.append({"id": i + 1, "file_name": f"{i}.png", "height": 96, "width": 128})
    categories = [{"id": 2, "name": "disc"}, {"id": 5, "name": "corner"}]
    (folder / "truth.json").write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": categories})
    )
    return folder / "truth.json"


@pytest.mark.slow
def test_from_coco_json_to_masks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    truth, table, run = make_images(tmp_path), tmp_path / "data.csv", tmp_path / "run"
    assert main(["import-coco", str(truth), str(tmp_path), str(table)]) == 0
    lines = table.read_text().splitlines()
    splits = ["split", "train", "train", "val"]
    table.write_text("\n".join(f"{line},{split}" for line, split in zip(lines, splits, strict=True)))
    (tmp_path / "run.yaml").write_text(RUN)
    assert main(["train", "--config", str(tmp_path / "run.yaml"), "--out", str(run)]) == 0
    assert "mask_AP50" in capsys.readouterr().err
    assert main(["eval", str(run), str(table), "--split", "train", "--json", str(tmp_path / "scores.json")]) == 0
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["metrics"]["mask_AP50"] > 0.9
    assert scores["metrics"]["AP50"] > 0.9
    assert {"mask_AP", "AP", "boxes"} == set(scores["per_class"]["disc"])
    assert json.loads((run / "model" / "config.json").read_text())["model"]["head"]["category_ids"] == [2, 5]

    found = tmp_path / "out" / "found.json"
    assert main(["predict", str(run), str(table), "--out", str(found), "--png"]) == 0
    assert len(list(found.parent.glob("*.png"))) == 3
    for iou in ("segm", "bbox"):
        assert coco_score(truth, found, iou=iou)["stats"]["AP50"] > 0.8
    capsys.readouterr()
    assert main(["eval", str(found), str(truth), "--iou", "segm"]) == 0
    assert "segm" in capsys.readouterr().out
    # Not from the model's threshold on, which is the best of one image and leaves out much or little by chance.
    one = [str(tmp_path / "0.png"), "--out", str(tmp_path / "0.geojson"), "--score", "0.2"]
    assert main(["predict", str(run), *one]) == 0
    features = json.loads((tmp_path / "0.geojson").read_text())["features"]
    shapes = [shape(feature["geometry"]) for feature in features]
    assert all(each.is_valid for each in shapes)
    shares = [each.area / each.envelope.area for each in shapes]
    assert len(shapes) >= 4
    assert 0.5 < np.median(shares) < 0.95  # neither boxes nor nothing


def test_windows_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.yaml").write_text(RUN.replace("{epochs: 50", "{window: 64, epochs: 50"))
    assert main(["train", "--config", str(tmp_path / "run.yaml"), "--out", str(tmp_path / "run")]) == 2
    assert "train.window: mask_rcnn sees whole images" in capsys.readouterr().err
