"""Where and in which precision a run computes."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, Literal

import torch

from gigaxt.errors import ConfigError
from gigaxt.machine import device_memory_gib, host_memory_gib
from gigaxt.nn.context import ContextConfig
from gigaxt.streaming.rows import Streaming

FEW_REGIONS = 32
"""Regions of 256 px: on an H200 a chunk of 64 with Swin V2-T takes 17 ms forward, and a thousand launches as long."""


def pick_device(name: str) -> torch.device:
    """The device called `name`, the CPU or a CUDA one; `auto`: CUDA where there is one.

    Raises:
        ConfigError: there is no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type == "cpu":
        return torch.device("cpu")  # there is one, whatever its number
    if device.type != "cuda":
        raise ConfigError(f"train.device: expected auto, cpu, cuda or cuda:1 for example, got `{name}`")
    if (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"train.device: expected one of {torch.cuda.device_count()} CUDA devices, got `{name}`")
    return device


def check_budgets(
    streaming: Streaming, device: torch.device, context: ContextConfig | None = None, *, flags: bool = False
) -> None:
    """Refuse budgets that no run on this machine can spend.

    Args:
        streaming: with the budgets.
        device: that the run computes on.
        context: with budgets of its own, of which `host_gib` is nothing on a CPU.
        flags: the budgets were given on the command line, not in a config.

    Raises:
        ConfigError: more than the device or the host has.
    """
    on_host = [("train.streaming.host_gib", streaming.host_gib)]
    budgets = [("train.streaming.budget_gib", streaming.budget_gib or 0.0)]
    if context is not None:
        budgets.append(("model.context.budget_gib", context.budget_gib))
    if device.type == "cuda":
        on_host += [] if context is None else [("model.context.host_gib", context.host_gib)]
        wanted = [(on_host, host_memory_gib()[0], "this machine"), (budgets, device_memory_gib(device)[0], str(device))]
    else:
        wanted = [(budgets + on_host, host_memory_gib()[0], "this machine")]
    for parts, has, where in wanted:
        gib = sum(part for _, part in parts)
        if gib > has:
            name = " + ".join(name for name, part in parts if part)
            name = name.replace("train.streaming.", "--").replace("_", "-") if flags else name
            hint = "" if flags else "; make it smaller, such as 0, and `gigaxt plan CONFIG --fit` finds what fits"
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
