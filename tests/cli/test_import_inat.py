from __future__ import annotations

import csv
import json
import os
import signal
from pathlib import Path

import pytest
import yaml

import gigaxt
from gigaxt.cli import main
from gigaxt.training.log import TIME_COLUMNS, read_metrics
from gigaxt.training.loop import Run
from inat_folder import SPECIES, make_inat

NAMES = [SPECIES[key][1] for key in (4264, 4265, 4344)]

RUN = {
    "model": {
        "region_encoder": {
            "name": "convnextv2_atto",
            "region": 32,
            "options": {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16], "drop_path_rate": 0.2},
        },
        "context": {"kind": "mamba2", "dim": 16, "depth": 1, "summary": 2},
        "head": {"kind": "classify", "classes": 3, "label_smoothing": 0.3},
        "input": {
            "rgb": True,
            "resize_px": 64,
            "resize_side": "both",
            "mean": [123.675, 116.28, 103.53],
            "std": [58.395, 57.12, 57.375],
        },
    },
    "train": {
        "epochs": 2,
        "batch": 4,
        "lr": 0.002,
        "warmup_epochs": 0.0,
        "augment": {"mirror": True, "crop_area": 0.08, "randaugment": 9.0},
    },
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: the data set in `inat`, a CSV of its reptiles, and a config without `data`."""
    (tmp_path / "inat").mkdir()
    make_inat(tmp_path / "inat")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**RUN, "data": {"csv": "not said.csv"}}))
    monkeypatch.chdir(tmp_path)
    assert main(["import-inat", "inat", "reptilia.csv", "--supercategory", "Reptilia"]) == 0
    return tmp_path


def metrics(run: str) -> list[dict[str, str]]:
    rows = read_metrics(Path(run) / "metrics.csv")
    return [{key: row[key] for key in row.keys() - TIME_COLUMNS} for row in rows]


def test_from_the_data_set_to_answers_with_names(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Train, resume to the same numbers, eval, predict."""
    command = ["train", "reptilia.csv", "--config", "run.yaml", "--out"]
    assert main([*command, "whole"]) == 0
    original = Run.step

    def stopping(self: Run) -> None:
        original(self)
        if self.state.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Run, "step", stopping)
    assert main([*command, "stopped"]) == 128 + signal.SIGTERM
    monkeypatch.setattr(Run, "step", original)
    assert main([*command, "stopped"]) == 0
    assert metrics("stopped") == metrics("whole")
    models = [Path(name, "model/model.safetensors").read_bytes() for name in ("stopped", "whole")]
    assert models[0] == models[1]

    capsys.readouterr()
    assert main(["eval", "whole", "reptilia.csv", "--json", "scores.json"]) == 0
    table = capsys.readouterr().out
    scores = json.loads((folder / "scores.json").read_text())
    assert scores["images"] == 6
    for name in ("accuracy", "precision_macro", "recall_macro"):
        assert name in table
        assert name in scores["intervals"]
    assert list(scores["per_class"]) == NAMES

    assert main(["predict", "whole", "reptilia.csv", "--out", "answers.csv"]) == 0
    with (folder / "answers.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 18
    assert list(rows[0]) == ["image", "prediction", *NAMES]
    for row in rows:
        shares = {name: float(row[name]) for name in NAMES}
        assert sum(shares.values()) == pytest.approx(1, abs=1e-4)
        assert row["prediction"] == max(shares, key=lambda name: shares[name])
    model = gigaxt.load("whole/model")
    assert model.config.input.resize_px == 64
    assert model.config.head.class_names == NAMES


def test_the_csv(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["import-inat", "inat", "reptilia.csv"]) == 2
    assert "reptilia.csv exists; choose another name" in capsys.readouterr().err
    assert main(["import-inat", "inat", "reptilia.csv", "--force"]) == 0
    assert "reptilia.csv: 16 images to train on, 8 to validate, 4 classes" in capsys.readouterr().out
    assert main(["import-inat", "inat", "xt.csv", "--supercategory", "Reptilia", "--labels", "xt"]) == 0
    assert main(["import-inat", "inat", "x.csv", "--supercategory", "Reptiles"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: inat/categories.json: no supercategory 'Reptiles'")
    assert error.count("\n") == 1


def test_check_finds_nothing_wrong_and_a_missing_image(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "reptilia.csv", "--write", "checked.yaml"]) == 0
    text = (folder / "checked.yaml").read_text()
    written = yaml.safe_load(text)
    assert written["model"]["head"]["class_names"] == NAMES
    assert written["model"]["input"]["rgb"] is True  # three of the pictures are grey
    flags = ["--train.epochs", "1", "--model.region-encoder.region", "32", "--model.context.dim", "16"]
    assert main(["train", "--config", "checked.yaml", *flags, "--out", "run"]) == 0
    image = min((folder / "inat/train_val2018/Reptilia/4265").glob("*.jpg"))
    image.unlink()
    capsys.readouterr()
    assert main(["train", "reptilia.csv", "--config", "run.yaml", "--out", "other"]) == 2
    assert image.name in capsys.readouterr().err
    assert main(["import-inat", "inat", "reptilia.csv", "--force"]) == 2
    assert f"image {int(image.stem, 16)}" in capsys.readouterr().err
