from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from timm.models.swin_transformer_v2 import WindowAttention
from torch import nn

from gigaxt.errors import ConfigError
from gigaxt.training import compiling


def test_the_region_encoder_alone_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = nn.Linear(2, 2)
    model: Any = SimpleNamespace(encode=SimpleNamespace(encoder=encoder))
    monkeypatch.setattr(encoder, "compile", lambda: compiled.append(encoder))
    monkeypatch.setattr(torch, "compile", lambda function: function)  # a real one takes seconds
    compiled: list[nn.Module] = []
    compiling.compile_encoder(model, torch.device("cpu"))
    assert compiled == [encoder]


def test_a_machine_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(function: Any) -> Any:
        raise RuntimeError("\nNo working C++ compiler found\nSet CXX")

    monkeypatch.setattr(torch, "compile", refuse)
    with pytest.raises(ConfigError, match=r"train.compile: .*: No working C\+\+ compiler found; set it to false"):
        compiling.compile_encoder(SimpleNamespace(), torch.device("cpu"))  # type: ignore[arg-type]  # is not reached


def test_swin_on_a_cpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function: function)
    model: Any = SimpleNamespace(encode=SimpleNamespace(encoder=nn.Sequential(WindowAttention(8, (2, 2), 2))))
    with pytest.raises(ConfigError, match="wrong gradients for Swin V2"):
        compiling.compile_encoder(model, torch.device("cpu"))
