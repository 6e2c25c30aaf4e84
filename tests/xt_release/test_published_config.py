from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from small_release import SWIN, section

from gigaxt import ConfigError, ModelConfig
from gigaxt.xt_release.config import model_config
from gigaxt.xt_release.published import PublishedConfig

RELEASED = """
base_configs:
  - config/base.yaml
  - config/paths.yaml
name: swin_v2_large_1e-5_mamba_512_256
fp16: off
data:
  dataset: inaturalist
  crop_size: 512
  num_classes: 284
  dir: ${oc.env:NO_SUCH_VARIABLE}
  aug:
    mean: [0.5, 0.25, 0.125]
    std: [0.2, 0.4, 0.5]
model:
  name: xT
  num_classes: ${data.num_classes}
  mlp_ratio: 4
  backbone_class: swinv2_large_window16_256_timm
  backbone:
    input_size: 256
    pretrained: ${oc.env:PRETRAINED_CKPT_PATH, "./ckpts"}/swinv2.pth
  cls_head: xl
  context:
    hidden_size: 768
    classification_mode: off
    attention_method: mamba
    n_layer: 4
optimizer:
  lr: 1e-5
  lr: 1e-5
"""
"""As released, with the key that stands there twice."""


def settings(model: dict[str, Any], **overrides: Any) -> ModelConfig:
    return model_config(PublishedConfig({"model": model}), overrides or SWIN)


def test_released_yaml_beside_its_bases(tmp_path: Path) -> None:
    (tmp_path / "config" / "swin-l").mkdir(parents=True)
    base = {"model": {"cls_head": "naive", "mlp_ratio": 2, "backbone": {"input_size": 512}, "context": {"n_layer": 9}}}
    (tmp_path / "config" / "base.yaml").write_text(yaml.safe_dump(base))
    (tmp_path / "config" / "paths.yaml").write_text("data: {dir: here}\nmodel: {resume: x}\n")
    path = tmp_path / "config" / "swin-l" / "mamba.yaml"
    path.write_text(RELEASED)
    config = model_config(PublishedConfig.read(path))
    assert config.region_encoder.name == "swinv2_large_window12to16_192to256"
    assert (config.region_encoder.region, config.head.classes) == (256, 284)
    assert (config.context.kind, config.context.depth, config.context.dim) == ("xt_release", 4, 768)
    assert config.context.options == {"attention": "mamba", "window": 0}
    assert config.input.mean == [127.5, 63.75, 31.875]
    assert config.input.std == pytest.approx([51, 102, 127.5])


def test_weights_are_published_without_the_bases(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(RELEASED)
    assert model_config(PublishedConfig.read(tmp_path / "run.yaml")).context.depth == 4


def test_names_of_the_time_of_training(tmp_path: Path) -> None:
    """`xl_context` and `img_size` win over what a later base says."""
    (tmp_path / "base.yaml").write_text(
        "model: {backbone: {input_size: 512}, context: {n_layer: 12, hidden_size: 384}}"
    )
    model = {
        "name": "EncoderDecoderV2",
        "num_classes": 284,
        "backbone_class": "swinv2_small_window16_256_timm",
        "backbone": {"img_size": 256, "upsample": False},
        "cls_head": "xl",
        "xl_context": {"in_context_patches": 128, "mem_chip": 2, "n_layer": 2},
    }
    (tmp_path / "xl.yaml").write_text(yaml.safe_dump({"base_configs": ["base.yaml"], "model": model}))
    config = model_config(PublishedConfig.read(tmp_path / "xl.yaml"))
    assert (config.region_encoder.region, config.context.depth, config.context.dim) == (256, 2, 384)
    assert config.context.options == {"attention": "hyper", "window": 128}


@pytest.mark.parametrize(
    ("name", "timm", "dim"),
    [
        ("swinv2_tiny_window16_256_timm", "swinv2_tiny_window16_256", 768),
        ("swinv2_large_window16_256_timm", "swinv2_large_window12to16_192to256", 1536),
        ("hiera_base", "hiera_base_224", 768),
        ("hiera_base_plus_224", "hiera_base_plus_224", 896),
    ],
)
def test_backbones(name: str, timm: str, dim: int) -> None:
    side = 224 if "hiera" in name else 256
    config = model_config(PublishedConfig({**section(), "backbone_class": name, "backbone": {"input_size": side}}))
    assert config.region_encoder.name == timm
    assert (config.context.kind, config.context.dim) == ("xt_release_pooled", dim)


def test_references() -> None:
    data = {
        "a": {"b": 3, "c": "${a.b}", "text": "x${a.c}-${oc.env:NO_SUCH_VARIABLE, 7}"},
        "model": {"backbone_class": "x", "whole": "${a}", "n": "${a.c}"},
        "loop": {"x": "${loop.y}", "y": "${loop.x}"},
    }
    config = PublishedConfig(data, "this")
    assert config.get("a.text", str) == "x3-7"
    assert config.get("model.n", int) == 3
    assert config.get("model.whole.c", int) == 3
    assert config.get("model.missing", int, 5) == 5
    config.data["model"] |= {
        "bad": "${a.x}",
        "worse": "${now:%Y}",
        "env": "${oc.env:NO_SUCH_VARIABLE}",
        "loop": "${loop.x}",
    }
    for key, message in {
        "bad": "this: .*a.x.* not there",
        "worse": "expected a key or oc.env",
        "env": "set the environment variable NO_SUCH_VARIABLE",
        "loop": "refers to itself",
        "missing": "missing `model.missing`",
    }.items():
        with pytest.raises(ConfigError, match=message):
            config.get(f"model.{key}", int)


def test_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_CLASSES", "284")
    data = {"model": {"name": "${oc.env:SOME_CLASSES, 1}/x", "backbone_class": "x"}}
    assert PublishedConfig(data).get("model.name", str) == "284/x"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: [", "expected YAML"),
        ("- 1", "got list"),
        ("data: {x: 1}", "section `model`, got data"),
        ("base_configs: [other.yaml]\nmodel: {}", "inherits from `other.yaml`, which is neither in"),
        ("base_configs: this.yaml\nmodel: {}", "expected a list of paths"),
        ("base_configs: [this.yaml]\nmodel: {}", "inherits from itself"),
    ],
)
def test_files_that_cannot_be_read(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "this.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        PublishedConfig.read(tmp_path / "this.yaml")
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="cannot read"):
        PublishedConfig.read(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backbone_class": "swinv2_tinny_window16_256_timm"}, "did you mean `swinv2_tiny_window16_256_timm`"),
        ({"backbone_class": "resnet50"}, "unknown `resnet50`"),
        ({"cls_head": "xxl"}, "cls_head: got 'xxl'"),
        ({"num_classes": None}, "missing `model.num_classes`"),
        ({"num_classes": "many"}, "model.num_classes"),
        ({"context": {"grad_ratio": 0.5}}, "shuffles the regions"),
        ({"context": {"hidden_size": 64}}, "at least 1 and a divisor"),
        ({"context": {"hidden_size": 400}}, "at least 1 and a divisor"),
        ({"context": {"attention_method": "mamba", "hidden_size": 130}}, "multiple of 4"),
        ({"context": {"attention_method": "linear"}}, "attention"),
        ({"context": {"in_context_patches": 1}}, "at least 2, got 1"),
        ({"context": {"in_context_patches": 5, "attention_method": "mamba"}}, "has no windows"),
        ({"context": {"n_layer": 0}}, "depth"),
    ],
)
def test_settings_that_cannot_be(change: dict[str, Any], message: str) -> None:
    model = section(n_layer=2)
    context = {**model["context"], **change.get("context", {})}
    with pytest.raises(ConfigError, match=message):
        model_config(PublishedConfig({"model": {**model, **change, "context": context}}))


def test_overrides() -> None:
    config = settings({**section(n_layer=2), "backbone_class": "hiera_golden"}, embed_dim=16, img_size=32, in_chans=4)
    assert config.region_encoder.name == "hiera_base_224"
    assert (config.region_encoder.options, config.region_encoder.in_channels) == ({"embed_dim": 16}, 4)
    with pytest.raises(ConfigError, match=r"img_size is 64, but model.backbone.input_size is 32"):
        settings(section(n_layer=2), img_size=64)
