from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from gigaxt.errors import ConfigError
from gigaxt.machine import host_memory_gib
from gigaxt.rows import Streaming
from gigaxt.training import device as device_module
from gigaxt.training.device import check_budgets, chunk_advice, precision_advice


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
    check_budgets(Streaming(host_gib=total / 2), torch.device("cuda"), context_gib=0.4 * total)
    check_budgets(Streaming(), torch.device("cpu"), context_gib=2 * total)
    with pytest.raises(ConfigError, match=r"host_gib \+ model.context.host_gib: expected at most"):
        check_budgets(Streaming(host_gib=total / 2), torch.device("cuda"), context_gib=0.6 * total)
