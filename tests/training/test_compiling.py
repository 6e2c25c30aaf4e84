from __future__ import annotations

from typing import Any

import pytest
import torch
from timm.models.swin_transformer_v2 import WindowAttention
from torch import Tensor, nn

from gigaxt.errors import ConfigError
from gigaxt.nn.xt import GigaXT
from gigaxt.training.compiling import compile_encoder
from tiny_models import segmenter

CPU = torch.device("cpu")


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> GigaXT:
    monkeypatch.setattr(torch, "compile", lambda function: function)  # a real one takes seconds
    return segmenter().train()


def becomes(encoder: nn.Module, call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling makes this of the encoder's forward pass."""
    monkeypatch.setattr(encoder, "compile", lambda: setattr(encoder, "_compiled_call_impl", call))


def test_the_region_encoder_alone_is_compiled(model: GigaXT, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, names = model.encode.encoder, list(model.state_dict())
    becomes(encoder, encoder._call_impl, monkeypatch)
    compile_encoder(model, CPU)
    assert [name for name, part in model.named_modules() if part._compiled_call_impl is not None] == ["encode.encoder"]
    assert list(model.state_dict()) == names
    assert all(p.grad is None for p in model.parameters())


def test_a_machine_without_a_compiler(model: GigaXT, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(function: Any) -> Any:
        raise RuntimeError("\nNo working C++ compiler found\nSet CXX")

    monkeypatch.setattr(torch, "compile", refuse)
    with pytest.raises(ConfigError, match=r"train.compile: .*: No working C\+\+ compiler found; set it to false"):
        compile_encoder(model, CPU)


class _Wrong(torch.autograd.Function):
    """The identity, with another gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 1.5 * grad


@pytest.mark.parametrize("frozen", [False, True])
def test_wrong_gradients_are_refused(model: GigaXT, monkeypatch: pytest.MonkeyPatch, frozen: bool) -> None:
    encoder = model.encode.encoder

    def compiled(pixels: Tensor) -> Any:
        tokens, maps = encoder._call_impl(pixels)
        return _Wrong.apply(tokens), maps

    encoder.requires_grad_(not frozen)
    becomes(encoder, compiled, monkeypatch)
    if frozen:
        compile_encoder(model, CPU)  # none is asked for
        return
    with pytest.raises(ConfigError, match=r"compiles of .* for cpu is wrong, .* by up to ..%; set it to"):
        compile_encoder(model, CPU)
    assert encoder._compiled_call_impl is None


def test_an_encoder_that_cannot_be_compiled_is_refused(model: GigaXT, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen with PyTorch 2.11 and Swin V2 on an H200."""

    def compiled(pixels: Tensor) -> Any:
        raise RuntimeError("Failed to import /tmp/a.py\nSyntaxError: unterminated string literal")

    becomes(model.encode.encoder, compiled, monkeypatch)
    with pytest.raises(
        ConfigError, match=r"cannot compile .* for cpu in version .*: Failed to import /tmp/a.py; set it"
    ):
        compile_encoder(model, CPU)
    assert model.encode.encoder._compiled_call_impl is None


def test_swin_on_a_cpu_is_refused(model: GigaXT) -> None:
    model.encode.encoder.add_module("attention", WindowAttention(8, (2, 2), 2))
    with pytest.raises(ConfigError, match="wrong gradients for Swin V2"):
        compile_encoder(model, CPU)
