"""Where and in which precision a run computes."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, Literal

import torch

from gigaxt.errors import ConfigError
from gigaxt.machine import device_memory_gib, host_memory_gib
from gigaxt.rows import Streaming

FEW_REGIONS = 32
"""Regions of 256 px: on an H200 a chunk of 64 with Swin V2-T takes 17 ms forward, and a thousand launches as long."""


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


def check_budgets(streaming: Streaming, device: torch.device, *, context_gib: float = 0.0, flags: bool = False) -> None:
    """Refuse budgets that no run on this machine can spend.

    Args:
        streaming: with the budgets.
        device: that the run computes on.
        context_gib: host memory for the context, `model.context.host_gib`; nothing on a CPU.
        flags: the budgets were given on the command line, not in a config.

    Raises:
        ConfigError: more than the device or the host has.
    """
    budget, host = streaming.budget_gib or 0.0, streaming.host_gib
    has_host = host_memory_gib()[0]
    wanted = [("host_gib", host, has_host, "this machine")]
    if device.type == "cuda":
        wanted.append(("host_gib + model.context.host_gib", host + context_gib, has_host, "this machine"))
        wanted.append(("budget_gib", budget, device_memory_gib(device)[0], str(device)))
    else:
        wanted.append(("budget_gib + host_gib" if host else "budget_gib", budget + host, has_host, "this machine"))
    for name, gib, has, where in wanted:
        if gib > has:
            name = f"--{name.replace('_', '-')}" if flags else f"train.streaming.{name}"
            hint = "" if flags else "; `gigaxt plan CONFIG --fit` finds what fits"
            raise ConfigError(f"{name}: expected at most the {has:.1f} GiB that {where} has, got {gib:g}{hint}")


def autocast(device: torch.device, amp: Literal["auto", "off", "bf16"]) -> AbstractContextManager[Any]:
    """bfloat16 autocast as `amp` says; `auto`: on CUDA devices that have it."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=in_bfloat16(device, amp))


def in_bfloat16(device: torch.device, amp: Literal["auto", "off", "bf16"]) -> bool:
    """Whether `autocast` is on."""
    return amp == "bf16" or (amp == "auto" and device.type == "cuda" and has_bfloat16(device))


def has_bfloat16(device: torch.device) -> bool:
    """Whether a device multiplies in bfloat16, rather than by way of float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    return device.type == "cpu" and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def precision_advice(device: torch.device, amp: Literal["auto", "off", "bf16"]) -> str | None:
    """A warning about a precision that makes this device slower instead of faster; None: it does not."""
    if amp != "bf16" or device.type != "cpu" or has_bfloat16(device):
        return None
    return "this CPU has no fast bfloat16: with amp bf16 a step can take ten times as long as with amp off"


def chunk_advice(device: torch.device, streaming: Streaming) -> str | None:
    """A warning about chunks so small that a GPU waits for their kernels to be launched; None: they are not."""
    if device.type != "cuda" or streaming.chunk_regions >= FEW_REGIONS or streaming.most_regions is not None:
        return None
    return (
        f"train.streaming.chunk_regions: with {streaming.chunk_regions} a GPU mostly waits for its kernels to be "
        "launched; take 64 or more, or what `gigaxt plan CONFIG --fit` finds, and `cuda_graphs: true`"
    )


def smaller_streaming(streaming: Streaming) -> tuple[Streaming, str] | None:
    """Settings that need less memory, for after CUDA ran out of it, and their description; None: there are none."""
    if streaming.chunk_regions > 1:
        half = streaming.chunk_regions // 2
        return replace(streaming, chunk_regions=half), f"{half} regions a chunk"
    if streaming.budget_gib != 0:
        return replace(streaming, budget_gib=0.0), "no activations kept"
    return None
