from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from gigaxt.config import to_dict
from gigaxt.errors import ConfigError
from gigaxt.training.config import TrainConfig, differences, read_yaml, run_config

MODEL = {"region_encoder": {"name": "convnextv2_atto"}, "head": {"kind": "classify", "classes": 2}}


def test_a_config_survives_yaml(tmp_path: Path) -> None:
    data = {"data": {"csv": "/data.csv"}, "model": MODEL, "train": {"lr": 1e-4, "streaming": {"budget_gib": None}}}
    config = run_config(data)
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(to_dict(config)))
    assert run_config(read_yaml(path)) == config
    assert config.train.streaming.budget_gib is None


def test_paths_are_relative_to_the_yaml(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("data: {csv: sub/data.csv}")
    assert read_yaml(path)["data"]["csv"] == str(tmp_path / "sub/data.csv")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"trian": {}}, "trian: unknown key; did you mean `train`"),
        ({"train": {"learning_rate": 1}}, "train.learning_rate: unknown key"),
        ({"train": {"weight_decy": 1}}, "train.weight_decy: unknown key; did you mean `weight_decay`"),
        ({"train": {"augment": {"dihedrl": True}}}, "train.augment.dihedrl: unknown key; did you mean `dihedral`"),
        ({"train": {"lr": "fast"}}, "train.lr: expected float, got 'fast'"),
        ({"train": {"optimizer": "adamv"}}, "train.optimizer: timm has no `adamv`; did you mean `adam"),
        ({"train": {"optimizer": "adahessian"}}, "train.optimizer"),
        ({"train": {"amp": "fp16"}}, "train.amp: 'fp16' is none of 'auto', 'off', 'bf16'"),
        ({"train": {"on_bad_image": "skipp"}}, "did you mean 'skip'"),
        ({"train": {"class_weights": "balancd"}}, "did you mean 'balanced'"),
        ({"data": {}}, "data: missing `csv`"),
    ],
)
def test_wrong_settings_are_refused_in_one_line(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        run_config({"data": {"csv": "data.csv"}, "model": MODEL, **change})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"epochs": 0},
        {"batch": 0},
        {"accumulate": 0},
        {"lr": 0.0},
        {"lr": float("nan")},
        {"encoder_lr": -1.0},
        {"clip_grad": 0.0},
        {"ema": 1.0},
        {"lr_floor": 2.0},
        {"warmup_epochs": -1.0},
        {"checkpoint_minutes": float("inf")},
    ],
)
def test_values_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"train.{next(iter(settings))}: expected"):
        TrainConfig(**settings)


@pytest.mark.parametrize(
    ("text", "message"),
    [("a: [1,", "expected YAML"), ("- a", "expected the keys"), ("", "expected the keys"), ("a\tb: {", "YAML")],
)
def test_what_is_no_yaml_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        read_yaml(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="No such file"):
        read_yaml(tmp_path / "none.yaml")


def test_differences_name_dotted_keys() -> None:
    old = {"train": {"lr": 1, "device": "cpu", "augment": {"colour": 0}}, "model": {"a": 1}}
    new = {"train": {"lr": 2, "device": "cuda", "augment": {"colour": 1}}, "model": {"a": 1, "b": 2}}
    assert differences(old, new) == [
        "model.b was None, now 2",
        "train.augment.colour was 0, now 1",
        "train.lr was 1, now 2",
    ]
