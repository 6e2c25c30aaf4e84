from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from gigaxt.errors import ConfigError
from gigaxt.training.config import TrainConfig
from gigaxt.training.optim import lr_factor, make_optimizer, parameter_groups, set_lr


def model() -> nn.Module:
    encoder = nn.Sequential(nn.Conv2d(3, 4, 3), nn.LayerNorm(4))
    built = nn.ModuleDict(
        {"encode": nn.ModuleDict({"encoder": encoder, "project": nn.Linear(4, 4)}), "head": nn.Linear(4, 2)}
    )
    built["head"].weight._no_weight_decay = True
    return built


def grouped(module: nn.Module, **settings: Any) -> dict[str, set[str]]:
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    groups = parameter_groups(module, TrainConfig(**settings))
    return {group["name"]: {names[id(p)] for p in group["params"]} for group in groups}


def test_groups_by_part_and_decay() -> None:
    assert grouped(model()) == {
        "encoder with decay": {"encode.encoder.0.weight"},
        "encoder without decay": {"encode.encoder.0.bias", "encode.encoder.1.weight", "encode.encoder.1.bias"},
        "rest with decay": {"encode.project.weight"},
        "rest without decay": {"encode.project.bias", "head.weight", "head.bias"},
    }


def test_frozen_parameters_are_in_no_group() -> None:
    module = model()
    module["encode"]["encoder"].requires_grad_(False)
    assert set(grouped(module)) == {"rest with decay", "rest without decay"}
    with pytest.raises(ConfigError, match="the region encoder has no trainable parameter"):
        grouped(module, encoder_lr=0.1)
    module.requires_grad_(False)
    with pytest.raises(ConfigError, match="no trainable parameter"):
        grouped(module)


def test_weight_decay_reaches_only_its_groups() -> None:
    optimizer = make_optimizer(model(), TrainConfig(weight_decay=0.3))
    assert {group["name"]: group["weight_decay"] for group in optimizer.param_groups} == {
        "encoder with decay": 0.3,
        "encoder without decay": 0.0,
        "rest with decay": 0.3,
        "rest without decay": 0.0,
    }


@pytest.mark.parametrize("name", ["adamw", "sgd", "lion", "lamb", "adafactor"])
def test_optimizers_of_timm_take_a_step(name: str) -> None:
    module = model()
    optimizer = make_optimizer(module, TrainConfig(optimizer=name, encoder_lr=0.01, lr=0.1))
    before = [p.clone() for p in module.parameters()]
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    set_lr(optimizer, TrainConfig(optimizer=name, encoder_lr=0.01, lr=0.1), 5, 5)
    optimizer.step()
    assert all((p != b).any() for p, b in zip(module.parameters(), before, strict=True))


def test_the_learning_rate_over_a_run() -> None:
    config = TrainConfig(epochs=10, warmup_epochs=2, lr_floor=0.1)
    factors = [lr_factor(config, step, 5) for step in range(50)]
    assert factors[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert factors[10] == 1.0
    assert factors[30] == pytest.approx(0.1 + 0.9 * 0.5)  # the middle of the cosine
    assert factors[49] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 39 / 40)))
    assert sorted(factors[10:], reverse=True) == factors[10:]


def test_no_warm_up_and_a_constant_rate() -> None:
    assert lr_factor(TrainConfig(warmup_epochs=0), 0, 5) == 1.0
    assert lr_factor(TrainConfig(warmup_epochs=0, schedule="constant"), 200, 5) == 1.0
    assert lr_factor(TrainConfig(epochs=1, warmup_epochs=1), 4, 5) == 1.0  # warm-up is the whole run


def test_the_encoders_own_learning_rate() -> None:
    config = TrainConfig(lr=0.1, encoder_lr=0.01, warmup_epochs=1)
    optimizer = make_optimizer(model(), config)
    assert set_lr(optimizer, config, 0, 4) == pytest.approx(0.025)
    rates = {group["name"].split()[0]: group["lr"] for group in optimizer.param_groups}
    assert rates == pytest.approx({"encoder": 0.0025, "rest": 0.025})


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
def test_fused_on_cuda_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def create(groups: Any, **given: Any) -> torch.optim.Optimizer:
        asked.update(given)
        return torch.optim.SGD(groups, lr=0.1)

    monkeypatch.setattr("timm.optim.create_optimizer_v2", create)
    make_optimizer(model(), TrainConfig(optimizer=name))
    assert "fused" not in asked
    monkeypatch.setattr(nn.Parameter, "is_cuda", True)
    make_optimizer(model(), TrainConfig(optimizer=name))
    assert asked.get("fused", False) == (name != "sgd")
