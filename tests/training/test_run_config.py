from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from gigaxt.cli.train import run_config_from
from gigaxt.config import to_dict
from gigaxt.errors import ConfigError
from gigaxt.training.config import TrainConfig, differences, named_files, read_yaml, run_config

MODEL = {"region_encoder": {"name": "convnextv2_atto"}, "head": {"kind": "classify", "classes": 2}}


def test_a_config_survives_yaml(tmp_path: Path) -> None:
    data = {"data": {"csv": "/data.csv"}, "model": MODEL, "train": {"lr": 1e-4, "streaming": {"budget_gib": None}}}
    config = run_config(data)
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(to_dict(config)))
    assert run_config(read_yaml(path)) == config
    assert config.train.streaming.budget_gib is None


@pytest.mark.parametrize("word", ["off", "Off", "'off'"])
def test_the_word_off_in_yaml(word: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"data": {"csv": "data.csv"}, "model": MODEL}) + f"train: {{amp: {word}}}\n")
    assert run_config(read_yaml(path)).train.amp == "off"


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
        ({"train": {"augment": {"colour": -0.5}}}, "train.augment.colour: expected a strength from 0 to 1, got -0.5"),
        ({"model": MODEL | {"head": {"kind": [1]}}}, "head.kind: got [1]; known: "),
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


def test_a_key_that_stands_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("train: {epochs: 1}\nmodel:\n  head: {classes: 2}\ntrain: {lr: 0.1}\n")
    with pytest.raises(ConfigError, match=r"run.yaml: .* at line 4: `train` stands there again, first in line 1"):
        read_yaml(path)
    path.write_text("a: &a {x: 1}\nb: &b {<<: *a, x: 2}\nc: {<<: *b, x: 3}\n")  # a merged key may be set anew
    assert read_yaml(path)["c"] == {"x": 3}


def test_differences_name_dotted_keys() -> None:
    old = {"train": {"lr": 1, "device": "cpu", "augment": {"colour": 0}}, "model": {"a": 1}}
    new = {"train": {"lr": 2, "device": "cuda", "augment": {"colour": 1}}, "model": {"a": 1, "b": 2}}
    assert differences(old, new) == [
        "model.b was None, now 2",
        "train.augment.colour was 0, now 1",
        "train.lr was 1, now 2",
    ]


def write(path: Path, data: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(data if isinstance(data, str) else yaml.safe_dump(data))
    return path


def test_a_file_on_a_base(tmp_path: Path) -> None:
    """Keys of the later file win, sections are merged, paths count from the file that names them."""
    write(tmp_path / "base/base.yaml", {"data": {"csv": "data.csv", "split_seed": 3}, "model": MODEL})
    write(tmp_path / "base/middle.yaml", {"base": "base.yaml", "train": {"lr": 0.1, "epochs": 3}})
    own = {"base": "base/middle.yaml", "model": {"head": {"classes": 5}}, "train": {"lr": 0.2, "init": "start"}}
    data = read_yaml(write(tmp_path / "run.yaml", own))
    assert data == {
        "data": {"csv": str(tmp_path / "base/data.csv"), "split_seed": 3},
        "model": {**MODEL, "head": {"kind": "classify", "classes": 5}},
        "train": {"lr": 0.2, "epochs": 3, "init": str(tmp_path / "start")},
    }
    lists = write(tmp_path / "lists.yaml", {"base": "run.yaml", "model": {"input": {"overview": [8]}}, "train": None})
    over = write(tmp_path / "over.yaml", {"base": "lists.yaml", "model": {"input": {"overview": [64]}}})
    assert read_yaml(over)["model"]["input"] == {"overview": [64]}
    assert read_yaml(lists)["train"] is None
    assert named_files(over).count(", based on ") == 4


@pytest.mark.parametrize(
    ("base", "text", "message"),
    [
        ("none.yaml", "", r"run\.yaml: base: .*none\.yaml: cannot read the config: No such file"),
        ("run.yaml", "", r"run\.yaml: base: .*run\.yaml is based on itself"),
        ("other.yaml", "base: run.yaml", r"other\.yaml: base: .*run\.yaml is based on itself"),
        ("other.yaml", "a: [", r"run\.yaml: base: .*other\.yaml: expected YAML"),
        ("other.yaml", "- a", r"run\.yaml: base: .*other\.yaml: expected the keys"),
        (7, "", r"run\.yaml: base: expected the path of a YAML file, got 7"),
        (["a.yaml"], "", r"run\.yaml: base: expected the path of a YAML file"),
    ],
)
def test_bases_that_cannot_be(tmp_path: Path, base: Any, text: str, message: str) -> None:
    write(tmp_path / "other.yaml", text)
    with pytest.raises(ConfigError, match=message) as caught:
        read_yaml(write(tmp_path / "run.yaml", {"base": base}))
    assert "\n" not in str(caught.value)


def test_errors_name_the_file_and_its_base(tmp_path: Path) -> None:
    base = write(tmp_path / "base.yaml", {"data": {"csv": "data.csv"}, "model": MODEL, "train": {"epoch": 3}})
    run = write(tmp_path / "run.yaml", {"base": "base.yaml"})
    with pytest.raises(ConfigError) as caught:
        run_config_from([], None, str(run), tmp_path / "out")
    assert str(caught.value) == f"{run}, based on {base}: train.epoch: unknown key; did you mean `epochs`?"


@pytest.mark.parametrize(
    ("model", "augment", "message"),
    [
        ({}, {"crop_area": 0.0}, "train.augment.crop_area: expected a share above 0 and up to 1, got 0.0"),
        ({}, {"crop_area": 1.5}, "train.augment.crop_area: expected"),
        ({}, {"randaugment": 11}, "train.augment.randaugment: expected a magnitude from 0 to 10, got 11.0"),
        ({"head": {"kind": "segment", "classes": 2}}, {"randaugment": 9}, "knows nothing of masks"),
        ({"input": {"foreground": "tissue"}}, {"crop_area": 0.5}, "exclude each other"),
    ],
)
def test_augmentation_that_does_not_fit(model: dict[str, Any], augment: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run_config({"data": {"csv": "a.csv"}, "model": {**MODEL, **model}, "train": {"augment": augment}})
