from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from gigaxt.errors import ConfigError
from gigaxt.machine import host_memory_gib
from gigaxt.nn.context import ContextConfig
from gigaxt.streaming.rows import Streaming
from gigaxt.training import device as device_module
from gigaxt.training.device import check_budgets, chunk_advice, pick_device, precision_advice


@pytest.mark.parametrize(
    ("device", "amp", "fast", "slow"),
    [
        ("cpu", "bf16", False, True),
        ("cpu", "bf16", True, False),
        ("cpu", "auto", False, False),
        ("cpu", "off", False, False),
        ("cuda", "bf16", False, False),
    ],
)
def test_bfloat16_without_instructions_for_it_is_told(
    device: str, amp: str, fast: bool, slow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace(_is_mkldnn_bf16_supported=lambda: fast))
    told = precision_advice(torch.device(device), amp)
    assert (told is not None and "no fast bfloat16" in told) == slow


@pytest.mark.parametrize(("device", "regions", "told"), [("cuda", 8, True), ("cuda", 64, False), ("cpu", 8, False)])
def test_chunks_that_let_a_gpu_wait_are_told(device: str, regions: int, told: bool) -> None:
    advice = chunk_advice(torch.device(device), Streaming(chunk_regions=regions))
    assert (advice is not None and "chunk_regions: with 8" in advice) == told


def test_the_contexts_host_memory_counts_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    total = host_memory_gib()[0]
    monkeypatch.setattr(device_module, "device_memory_gib", lambda _: (80.0, 80.0))
    check_budgets(Streaming(host_gib=total / 2), torch.device("cuda"), ContextConfig(host_gib=0.4 * total))
    check_budgets(Streaming(), torch.device("cpu"), ContextConfig(host_gib=2 * total))
    with pytest.raises(ConfigError, match=r"host_gib \+ model.context.host_gib: expected at most"):
        check_budgets(Streaming(host_gib=total / 2), torch.device("cuda"), ContextConfig(host_gib=0.6 * total))


def test_the_contexts_budget_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    total = host_memory_gib()[0]
    with pytest.raises(ConfigError, match=r"^model.context.budget_gib: expected at most the .* this machine has"):
        check_budgets(Streaming(budget_gib=0), torch.device("cpu"), ContextConfig(budget_gib=2 * total))
    monkeypatch.setattr(device_module, "device_memory_gib", lambda _: (80.0, 80.0))
    both = (
        r"^train.streaming.budget_gib \+ model.context.budget_gib: expected at most the 80.0 GiB that cuda has, got 90"
    )
    with pytest.raises(ConfigError, match=both):
        check_budgets(Streaming(budget_gib=50), torch.device("cuda"), ContextConfig(budget_gib=40))


@pytest.mark.parametrize("name", ["meta", "mps", "gpu", "cuda:99"])
def test_devices_that_cannot_train(name: str) -> None:
    with pytest.raises(ConfigError, match=r"train.device: expected"):
        pick_device(name)
    assert pick_device("cpu:7") == torch.device("cpu")
