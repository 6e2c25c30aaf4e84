from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from gigaxt.rows import Streaming
from gigaxt.training.device import slow_precision, small_chunks


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
    told = slow_precision(torch.device(device), amp)  # type: ignore[arg-type]  # parameters are plain str
    assert (told is not None and "no fast bfloat16" in told) == slow


@pytest.mark.parametrize(("device", "regions", "told"), [("cuda", 8, True), ("cuda", 64, False), ("cpu", 8, False)])
def test_chunks_that_let_a_gpu_wait_are_told(device: str, regions: int, told: bool) -> None:
    advice = small_chunks(torch.device(device), Streaming(chunk_regions=regions))
    assert (advice is not None and "chunk_regions: with 8" in advice) == told
