from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from gigaxt import CheckpointError, ConfigError
from gigaxt.training.config import read_yaml, run_config
from gigaxt.training.initial import start_from
from tiny_models import classifier, tiny_model


def test_weights_are_those_of_the_folder(tmp_path: Path) -> None:
    classifier().save(tmp_path)
    model = tiny_model({"kind": "classify", "classes": 3}, seed=1)
    assert start_from(model, tmp_path) == []
    for own, given in zip(model.parameters(), classifier().parameters(), strict=True):
        assert torch.equal(own, given)


def test_other_classes_start_fresh(tmp_path: Path) -> None:
    classifier().save(tmp_path)
    model = tiny_model({"kind": "classify", "classes": 5}, seed=1)
    before = model.head.classifier.weight.clone()
    assert start_from(model, tmp_path) == ["head.classifier.bias", "head.classifier.weight"]
    assert torch.equal(model.head.classifier.weight, before)
    assert torch.equal(model.head.queries.weight, classifier().head.queries.weight)


def test_other_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"train\.init: .*cannot read the weights"):
        start_from(classifier(), tmp_path)
    classifier().save(tmp_path)
    with pytest.raises(CheckpointError, match=r"encode.encoder.trunk.*leave sections of `model` out"):
        start_from(tiny_model({"kind": "classify", "classes": 3}, bands=4), tmp_path)
    with pytest.raises(CheckpointError, match=r"head\.queries\.weight"):
        start_from(tiny_model({"kind": "classify", "classes": 3, "pooling": "mean"}), tmp_path)


def test_sections_left_out_are_those_of_the_folder(tmp_path: Path) -> None:
    model = classifier()
    model.save(tmp_path / "model")
    data = {"data": {"csv": "x.csv"}, "model": {"head": {"kind": "classify", "classes": 7}}, "train": {"init": "model"}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(data))
    read = read_yaml(tmp_path / "run.yaml")
    assert read["train"]["init"] == str(tmp_path / "model")
    config = run_config(read)
    assert config.model.region_encoder == model.config.region_encoder
    assert config.model.context == model.config.context
    assert (config.model.head.classes, config.model.head.class_names) == (7, None)
    with pytest.raises(CheckpointError, match="expected a model folder"):
        run_config({**read, "train": {"init": str(tmp_path / "none")}})
    with pytest.raises(ConfigError, match="missing"):
        run_config({**read, "train": {}})


@pytest.mark.parametrize(
    "given",
    [
        {"kind": "detect", "classes": 3, "dim": 8, "threshold": 0.7},
        {"kind": "points", "classes": 1, "dim": 8, "flags": ["ship"], "threshold": [0.7], "flag_threshold": [0.6]},
    ],
)
def test_thresholds_of_the_folder_are_chosen_anew(tmp_path: Path, given: dict[str, object]) -> None:
    tiny_model(given).save(tmp_path)
    head = run_config({"data": {"csv": "x.csv"}, "train": {"init": str(tmp_path)}}).model.head
    assert (head.threshold, getattr(head, "flag_threshold", None)) == (None, None)
    kept = run_config({"data": {"csv": "x.csv"}, "model": {"head": given}, "train": {"init": str(tmp_path)}}).model.head
    assert kept.threshold == given["threshold"]
