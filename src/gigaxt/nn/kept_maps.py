"""Feature maps between the two times that they are needed, so that their regions are not encoded again."""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor

from gigaxt.streaming.rows import Budget, Streaming

Maps = tuple[Tensor, ...]


class KeptMaps:
    """Feature maps of some regions at a time, as many as the budgets hold; for work without gradients.

    Args:
        streaming: `budget_gib` on the device, then `host_gib`. None keeps nothing here: it is meant for one training
            step, and a whole scene may be far larger.
        device: where maps come from and are wanted.
    """

    def __init__(self, streaming: Streaming, device: torch.device) -> None:
        self._device = device
        self._on_device, self._on_host = Budget(streaming.budget_gib or 0.0), Budget(streaming.host_gib)
        self._maps: dict[Hashable, Maps] = {}

    def add(self, key: Hashable, maps: Maps) -> None:
        """Keep maps if they fit."""
        size = sum(t.nbytes for t in maps)
        if self._on_device.take(size):
            self._maps[key] = maps
        elif self._on_host.take(size):
            self._maps[key] = tuple(t.cpu() for t in maps)

    def pop(self, key: Hashable) -> Maps | None:
        """The maps that were kept under this key, which are then kept no longer; None: there are none."""
        maps = self._maps.pop(key, None)
        return None if maps is None else tuple(t.to(self._device) for t in maps)
