"""A device with little memory, on the CPU."""

from __future__ import annotations

from typing import Any

import torch

from gigaxt.testing.live_memory import LiveMemory


class ScarceMemory(LiveMemory):
    """Inside the block PyTorch runs out of memory where tensors made there would hold more than `most` bytes."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most

    def __torch_dispatch__(self, *args: Any) -> Any:
        result = super().__torch_dispatch__(*args)
        if self.now > self.most:
            raise torch.OutOfMemoryError(f"{self.now} bytes of {self.most}")
        return result
