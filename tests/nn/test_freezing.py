"""Region encoders that do not learn, or in part: exact where they learn, fixed where they do not, no work for that."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from test_ready_modules import Encoder
from test_ready_modules import config as ready_config
from test_xt import make, scenes, targets_of
from torch import Tensor

from gigaxt import ConfigError, GigaXT, ModelConfig, build_model
from gigaxt.nn.freezing import Learning, freeze
from gigaxt.streaming.single import Streaming

VIT = {"name": "vit_tiny_patch16_224", "options": {"embed_dim": 24, "depth": 4, "num_heads": 2}}


def grads(model: GigaXT, streaming: Streaming, targets: Any) -> dict[str, Tensor]:
    model.streaming = streaming
    model.zero_grad()
    model.loss(scenes()[0], targets, seed=3).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("learning", ["frozen", "last_n"])
@pytest.mark.parametrize(
    ("encoder", "head"),  # boxes are decoded from the same maps as masks: once is enough
    [*product(["swin", "hiera", "convnext"], ["classify", "segment"]), ("convnext", "detect")],
)
def test_what_learns_has_the_gradient_of_ordinary_autograd(encoder: str, head: str, learning: Learning) -> None:
    """Overviews too; all budgets; stochastic depth is off where it is frozen."""
    model = make(encoder, head, overview=[2]).train()
    freeze(model.encode, learning)
    targets = targets_of(head, scenes()[1])
    expected = grads(model, Streaming(budget_gib=None), targets)
    trunk = "encode.encoder.trunk."
    assert any(name.startswith(trunk) for name in expected) == (learning == "last_n")
    assert {"encode.norm.weight", "encode.project.weight"} <= expected.keys()
    for streaming in (Streaming(chunk_regions=2), Streaming(host_gib=1.0), Streaming(budget_gib=1.0)):
        found = grads(model, streaming, targets)
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            assert (found[name] - gradient).abs().max() <= 1e-10 * gradient.abs().max() + 1e-18, name


def count_passes(model: GigaXT) -> dict[str, int]:
    """How many regions go through the backbone, and come back."""
    counts = {"forward": 0, "backward": 0}

    def forward(module: Any, inputs: tuple[Tensor], outputs: Any) -> None:
        counts["forward"] += len(inputs[0])
        last = outputs[-1]
        if last.requires_grad:
            last.register_hook(lambda gradient: counts.update(backward=counts["backward"] + len(gradient)))

    model.encode.encoder.trunk.register_forward_hook(forward)
    return counts


@pytest.mark.parametrize(
    ("head", "streaming", "forward"),
    [
        ("classify", Streaming(), 1),
        ("classify", Streaming(budget_gib=1.0), 1),
        ("segment", Streaming(), 2),
        ("segment", Streaming(host_gib=1.0), 1),
        ("segment", Streaming(budget_gib=1.0), 1),
    ],
)
def test_a_frozen_encoder_runs_once(head: str, streaming: Streaming, forward: int) -> None:
    """Once for the tokens; once more for the maps where they are not kept; never for gradients."""
    model = make("convnext", head).train()
    freeze(model.encode, "frozen")
    counts = count_passes(model)
    regions = len(model.batch(scenes()[0]).places)
    grads(model, streaming, scenes()[1] if head == "segment" else [1, 3])
    assert counts == {"forward": forward * regions, "backward": 0}


def test_fixed_parts_behave_as_in_evaluation() -> None:
    model = make("convnext").train()
    freeze(model.encode, "last_n", 1)
    trunk = model.encode.encoder.trunk
    fixed = [name for name, module in trunk.named_modules() if not module.training]
    assert any(name.startswith("stages_2") for name in fixed)
    assert not any(name.startswith("stages_3") for name in fixed)
    model.eval().train()
    assert fixed == [name for name, module in trunk.named_modules() if not module.training]
    assert model.encode.norm.training
    whole = make("convnext").train()
    freeze(whole.encode, "frozen")
    images = scenes()[0]
    assert torch.equal(whole(images, seed=1), whole(images, seed=2))  # stochastic depth is off
    assert not torch.equal(make("convnext").train()(images, seed=1), make("convnext").train()(images, seed=2))


@pytest.mark.parametrize(
    ("name", "options", "learning"),
    [
        ("swinv2_tiny_window16_256", {}, ["layers_3", "layers_2"]),
        ("convnextv2_atto", {}, ["stages_3", "stages_2"]),
        ("resnet18", {}, ["layer4", "layer3"]),
        ("hiera_tiny_224", {"stages": [1, 1, 2, 1]}, ["model.blocks.4", "model.blocks.2", "model.blocks.3"]),
        ("vit_tiny_patch16_224", {}, ["model.blocks.11", "model.blocks.10"]),
        ("efficientnet_b0", {}, ["blocks.5", "blocks.6", "blocks.3", "blocks.4"]),
    ],
)
def test_the_last_stages_of_networks_learn(name: str, options: dict[str, Any], learning: list[str]) -> None:
    """One stage lies between two feature maps; of a plain ViT one is a block. `last_n: 2` is all that is listed."""
    config = {
        "region_encoder": {"name": name, "region": 224 if "224" in name else 256, "options": options},
        "context": {"dim": 16, "depth": 1},
        "head": {"kind": "classify", "classes": 2},
    }
    with torch.device("meta"):
        model = build_model(ModelConfig.from_dict(config))
    trunk = model.encode.encoder.trunk
    freeze(model.encode, "last_n", 2)
    learns = {name for name, p in trunk.named_parameters() if p.requires_grad}
    assert learns == {name for name, _ in trunk.named_parameters() if name.startswith(tuple(f"{s}." for s in learning))}
    freeze(model.encode, "full")
    assert all(p.requires_grad for p in trunk.parameters())
    assert all(module.training for module in model.train().modules())


def test_a_plain_vit_learns_its_maps() -> None:
    """The backbone is fixed, the finer maps made of it are not."""
    model = make("convnext", "segment", region_encoder=VIT)
    freeze(model.encode, "frozen")
    assert not model.encode.frozen
    names = {name for name, p in model.encode.encoder.named_parameters() if p.requires_grad}
    assert names
    assert all(name.startswith("pyramid") for name in names)


def test_ready_encoders() -> None:
    model = build_model(ready_config(), region_encoder=Encoder())
    with pytest.raises(ConfigError, match="no stages to tell apart"):
        freeze(model.encode, "last_n")
    freeze(model.encode, "frozen")
    assert model.encode.frozen


@pytest.mark.parametrize("last_n", [0, 4])
def test_there_are_not_so_many_stages(last_n: int) -> None:
    with pytest.raises(ConfigError, match="expected 1 to 3 of the 4 stages of convnextv2_atto"):
        freeze(make("convnext").encode, "last_n", last_n)
