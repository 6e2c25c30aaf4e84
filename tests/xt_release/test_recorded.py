"""Recorded inputs, weights, logits and gradients of the published code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import plain_release
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import gigaxt
from gigaxt.streaming.single import Streaming
from gigaxt.xt_release.config import model_config
from gigaxt.xt_release.published import PublishedConfig
from gigaxt.xt_release.weights import load_state, published_names

NAMES = ["swin_naive_1x1", "swin_hyper_2x2", "hiera_hyper_2x2", "swin_mamba_2x2"]
FULL_SIZE = [
    "hiera_base_1e-4_hyper_448_224",
    "swin_v2_tiny_1e-4_hyper_512_256",
    "swin_v2_tiny_1e-4_mamba_512_256",
    "swin_v2_tiny_1e-4_nonxl_256",
]


class Recorded:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config: dict[str, Any] = json.loads((folder / "config.json").read_text())
        self.weights, inputs, self.logits = (
            load_file(folder / f"{name}.safetensors") for name in ("weights", "input", "logits")
        )
        self.image, self.label = inputs["image"], inputs["label"]

    def load(self) -> gigaxt.GigaXT:
        return gigaxt.from_xt_release(
            self.folder / "weights.safetensors", self.config, backbone_overrides=self.config["backbone_kwargs"]
        )


@pytest.fixture(params=NAMES)
def recorded(request: pytest.FixtureRequest, fixtures: Path) -> Recorded:
    return Recorded(fixtures / "xt_release" / request.param)


def published_gradients(model: gigaxt.GigaXT) -> dict[str, Tensor]:
    parameters = dict(model.named_parameters())
    return {name: parameters[own].grad for name, own in published_names(model).items()}


def test_logits_loss_and_gradients(recorded: Recorded) -> None:
    model = recorded.load()
    assert not model.training
    torch.testing.assert_close(model(recorded.image), recorded.logits["logits"], rtol=0, atol=1e-5)
    loss = model(recorded.image, recorded.label)
    torch.testing.assert_close(loss[None], recorded.logits["loss"], rtol=1e-5, atol=0)
    loss.backward()
    gradients = published_gradients(model)
    assert gradients.keys() == recorded.config["grad_l2_norms"].keys()
    for name, norm in recorded.config["grad_l2_norms"].items():
        assert float(gradients[name].norm()) == pytest.approx(norm, rel=1e-4), name
    for name, whole in load_file(recorded.folder / "grads.safetensors").items():
        if name != "input":
            found = gradients[name.removeprefix("param.")]
            assert (found - whole).abs().max() <= 1e-3 * whole.abs().max(), name


def test_the_tests_oracle_is_right(recorded: Recorded) -> None:
    features = load_file(recorded.folder / "activations.safetensors")["encoder_last"]
    found = plain_release.logits(recorded.weights, recorded.config["model"], features)
    torch.testing.assert_close(found, recorded.logits["logits"], rtol=0, atol=1e-5)


def test_streamed_equals_whole_in_float64(recorded: Recorded) -> None:
    model = recorded.load().double()
    image, found = recorded.image.double(), []
    for streaming in (Streaming(budget_gib=None, chunk_regions=64), Streaming(budget_gib=0.0, chunk_regions=3)):
        model.streaming = streaming
        model.zero_grad()
        loss = model(image, recorded.label, seed=0)
        loss.backward()
        found.append((loss, *published_gradients(model).values()))
    for whole, streamed in zip(*found, strict=True):
        torch.testing.assert_close(streamed, whole, rtol=1e-10, atol=1e-12)


def test_saved_and_loaded(recorded: Recorded, tmp_path: Path) -> None:
    model = recorded.load()
    model.save(tmp_path / "model")
    loaded = gigaxt.load(tmp_path / "model")
    torch.testing.assert_close(loaded(recorded.image), model(recorded.image), rtol=0, atol=0)
    # From the second file on nothing of the release is needed.
    assert json.loads((tmp_path / "model" / "config.json").read_text())["model"]["context"]["kind"].startswith("xt")


def test_checkpoint_of_the_trainer(recorded: Recorded, tmp_path: Path) -> None:
    """`module.` on every name, optimiser and metrics beside the weights."""
    checkpoint = {
        "epoch": 3,
        "state_dict": {f"module.{name}": tensor for name, tensor in recorded.weights.items()},
        "optimizer_state_dict": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 1e-4}]},
        "metrics": {"accuracy_top1": 0.5},
    }
    torch.save(checkpoint, tmp_path / "last.ckpt")
    overrides = recorded.config["backbone_kwargs"]
    model = gigaxt.from_xt_release(tmp_path / "last.ckpt", recorded.config["model"], backbone_overrides=overrides)
    torch.testing.assert_close(model(recorded.image), recorded.logits["logits"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", FULL_SIZE)
def test_full_size_names_and_shapes(name: str, fixtures: Path) -> None:
    listed = json.loads((fixtures / "xt_release" / f"{name}.keys.json").read_text())
    config = model_config(PublishedConfig(listed))
    state = {key: torch.empty(entry["shape"], device="meta") for key, entry in listed["keys"].items()}
    with torch.device("meta"):
        model = gigaxt.build_model(config)
    load_state(model, state, name)
    assert sum(parameter.numel() for parameter in model.parameters()) == listed["n_params"]
