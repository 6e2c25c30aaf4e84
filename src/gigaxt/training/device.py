"""Where and in which precision a run computes."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, Literal

import torch

from gigaxt.errors import ConfigError
from gigaxt.rows import Streaming


def pick_device(name: str) -> torch.device:
    """The device called `name`; `auto`: CUDA where there is one, else the CPU.

    Raises:
        ConfigError: there is no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"train.device: expected auto, cpu, cuda or cuda:1 for example, got `{name}`") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"train.device: expected one of {torch.cuda.device_count()} CUDA devices, got `{name}`")
    return device


def autocast(device: torch.device, amp: Literal["auto", "off", "bf16"]) -> AbstractContextManager[Any]:
    """bfloat16 autocast as `amp` says; `auto`: on CUDA devices that have it."""
    fits = device.type == "cuda" and torch.cuda.is_bf16_supported()
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=amp == "bf16" or (amp == "auto" and fits))


def smaller(streaming: Streaming) -> tuple[Streaming, str] | None:
    """What to go on with after CUDA ran out of memory, and what that is called; None: nothing is left to give up."""
    if streaming.chunk_regions > 1:
        half = streaming.chunk_regions // 2
        return replace(streaming, chunk_regions=half), f"{half} regions a chunk"
    if streaming.budget_gib != 0:
        return replace(streaming, budget_gib=0.0), "no activations kept"
    return None
