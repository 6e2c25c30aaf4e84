from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

import gigaxt
from gigaxt.cli import main
from gigaxt.cli.train import run_config_from
from gigaxt.xt_release import scores

NAME = "xt_release/swin_hyper_2x2"


@pytest.fixture
def arguments(fixtures: Path) -> list[str]:
    """Checkpoint and config of a recorded model, and the flag for its small backbone."""
    folder = fixtures / NAME
    overrides = json.loads((folder / "config.json").read_text())["backbone_kwargs"]
    return [
        str(folder / "weights.safetensors"),
        str(folder / "config.json"),
        f"--backbone-overrides={json.dumps(overrides)}",
    ]


@pytest.fixture
def imported(arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: the imported model in `model`, twelve scenes and a CSV with the model's eleven classes."""
    monkeypatch.chdir(tmp_path)
    assert main(["import-xt", *arguments, "model"]) == 0
    random = np.random.default_rng(0)
    lines = ["image,label,split"]
    for i in range(12):
        pixels = random.integers(0, 256, [(70, 100, 3), (128, 128, 3)][i % 2]).astype(np.uint8)
        tifffile.imwrite(tmp_path / f"{i}.tif", pixels, photometric="rgb")
        lines.append(f"{i}.tif,{i % 11},{'val' if i > 8 else 'train'}")
    (tmp_path / "data.csv").write_text("\n".join(lines))
    return tmp_path


def test_the_folder_answers_as_recorded(imported: Path, fixtures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = gigaxt.load(imported / "model")
    image = load_file(fixtures / NAME / "input.safetensors")["image"]
    expected = load_file(fixtures / NAME / "logits.safetensors")["logits"]
    torch.testing.assert_close(model(image), expected, rtol=0, atol=1e-5)
    assert main(["info", "model"]) == 0
    found = capsys.readouterr().out
    assert "swinv2_tiny_window16_256, regions of 64 px, 2 x 2 tokens each" in found
    assert "xt_release, 2 x 128" in found


def test_eval_and_predict(imported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "model", "data.csv", "--split", "all", "--json", "scores.json"]) == 0
    assert json.loads((imported / "scores.json").read_text())["images"] == 12
    assert main(["predict", "model", "0.tif", "1.tif", "--out", "answers.csv"]) == 0
    with (imported / "answers.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2
    assert sum(float(rows[0][str(label)]) for label in range(11)) == pytest.approx(1, abs=1e-4)


def test_fine_tuning(imported: Path) -> None:
    (imported / "configs").mkdir()
    settings = {"init": "../model", "epochs": 1, "lr": 1e-4, "streaming": {"budget_gib": 0.0}}
    (imported / "configs/run.yaml").write_text(yaml.safe_dump({"data": {"csv": "../data.csv"}, "train": settings}))
    assert main(["train", "--config", "configs/run.yaml", "--out", "run"]) == 0
    assert "starting from the weights of" in (imported / "run/log.txt").read_text()
    before, after = gigaxt.load(imported / "model"), gigaxt.load(imported / "run/model")
    assert after.config.context == before.config.context
    changes = [
        float((a - b).detach().abs().max()) for a, b in zip(before.parameters(), after.parameters(), strict=True)
    ]
    assert min(changes) > 0  # a few steps away from the imported weights, in all parts
    assert max(changes) < 0.01
    # Without a YAML, and to go on without the folder that it began from.
    config = run_config_from(["--train.init", "model"], "data.csv", None, Path("other"))
    assert config.model.context.kind == "xt_release"
    assert config.model.head == before.config.head
    (imported / "moths.csv").write_text("image,label,split\n0.tif,owl,train\n1.tif,silk,train\n2.tif,tiger,train\n")
    assert main(["train", "moths.csv", "--train.init", "model", "--train.epochs", "1", "--out", "moths"]) == 0
    head = gigaxt.load(imported / "moths/model").config.head
    assert (head.classes, head.class_names) == (3, ["owl", "silk", "tiger"])
    assert "starting from the weights of model but for head." in (imported / "moths/log.txt").read_text()
    (imported / "model").rename(imported / "moved")
    assert main(["train", "--config", "configs/run.yaml", "--train.init", "moved", "--out", "run"]) == 0


def test_what_is_there_stays(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "note.txt").write_text("mine")
    assert main(["import-xt", *arguments, str(tmp_path / "model")]) == 2
    assert "exists; choose another folder" in capsys.readouterr().err
    assert main(["import-xt", *arguments, str(tmp_path / "model" / "note.txt")]) == 2
    assert (tmp_path / "model" / "note.txt").read_text() == "mine"


def test_verify(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = [{"id": i, "file_name": f"{i}.png"} for i in range(3)]
    for i in range(3):
        Image.fromarray(np.full((30 + i, 50, 3), 60 * i, np.uint8)).save(tmp_path / f"{i}.png")
    annotations = [{"image_id": i, "category_id": 7 + i} for i in range(3)]
    (tmp_path / "val2018.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    categories = [{"id": i, "name": f"snake {i}", "supercategory": "Reptilia"} for i in range(6, 17)]
    (tmp_path / "categories.json").write_text(json.dumps(categories))
    (tmp_path / "labels.json").write_text(json.dumps({str(16 - label): label for label in range(11)}))
    flags = ["--verify", str(tmp_path), "--labels", str(tmp_path / "labels.json"), "--device", "cpu"]
    assert main(["import-xt", *arguments, str(tmp_path / "none"), *flags]) == 2
    assert "does not say `data.crop_size`" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
    config = json.loads(Path(arguments[1]).read_text())
    arguments[1] = str(tmp_path / "config.json")
    Path(arguments[1]).write_text(json.dumps({**config, "data": {"crop_size": 128}}))
    flags += ["--categories", str(tmp_path / "categories.json")]
    assert main(["import-xt", *arguments, str(tmp_path / "model"), *flags]) == 0
    found = capsys.readouterr().out.splitlines()[-1]
    assert found.startswith("3 images squashed to 128 x 128 px: top-1 ")
    assert found.endswith("not published")
    model = gigaxt.load(tmp_path / "model")
    assert model.config.head.class_names == [f"snake {16 - label}" for label in range(11)]
    assert (model.config.input.resize_px, model.config.input.resize_side, model.config.input.rgb) == (128, "both", True)


def test_another_score_than_the_published_one(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scores, "validation_images", lambda *_: [(tmp_path, 0)] * 852)
    monkeypatch.setattr(scores, "table_row", lambda *_: "Swin-T 256")  # 458 images
    config = json.loads(Path(arguments[1]).read_text())
    arguments[1] = str(tmp_path / "config.json")
    Path(arguments[1]).write_text(json.dumps({**config, "data": {"crop_size": 128}}))
    flags = ["--verify", str(tmp_path)]
    for top1, status in ((450, 0), (440, 1)):
        monkeypatch.setattr(scores, "measure", lambda *_, top1=top1, **__: scores.Score(852, top1, 800))
        assert main(["import-xt", *arguments, str(tmp_path / str(top1)), *flags]) == status
    assert "error: 18 images apart from the published score" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, "none.ckpt", "No such file"),
        (1, "none.yaml", "none.yaml: cannot read the config"),
        (2, "--backbone-overrides=16", "expected JSON such as"),
        (2, "--backbone-overrides={", "expected JSON such as"),
        (2, '--backbone-overrides={"embed_dim": 48, "img_size": 64}', "does not fit the config"),
        (2, '--backbone-overrides={"embed_dimm": 16}', "embed_dimm"),
    ],
)
def test_mistakes(
    place: int, value: str, message: str, arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments[place] = value
    assert main(["import-xt", *arguments, str(tmp_path / "model")]) == 2
    text = capsys.readouterr().err
    assert message in text
    assert text.count("\n") == 1
    assert not (tmp_path / "model").exists()
