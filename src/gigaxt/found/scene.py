"""What a model finds in a scene, and the loss of it, in one pass over its regions; the same for boxes and points."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from gigaxt.found.objects import Objects
from gigaxt.nn.heads.dense import DenseHead
from gigaxt.nn.region_answers import RegionAnswer
from gigaxt.scenes.batch import Scene


class Found(NamedTuple):
    """What a model says of a scene."""

    objects: Objects
    """All that score at least `head.score`, best first, in px of the image; flags as chances."""
    sums: dict[str, Tensor] | None
    """Of the loss, as `GigaXT.evaluate` gives them; None without a target."""


class LossOfRegions:
    """The loss of a scene, from its regions' answers as they come.

    Args:
        head: of the model.
        scene: with a target; without one nothing is added up.
    """

    def __init__(self, head: DenseHead, scene: Scene) -> None:
        self.head, self.target, self.core = head, scene.target, scene.grid.core
        self.strides = [scene.grid.region // side for _, side, _ in head.shapes(scene.grid.region)]
        self._sums: list[Tensor] = []

    def add(self, answer: RegionAnswer) -> None:
        """One region's, whose maps are cut at the image's border: they are made whole again, and do not count there."""
        if self.target is None:
            return
        sides = [self.core // stride for stride in self.strides]
        maps = tuple(
            F.pad(found, (0, side - found.shape[2], 0, side - found.shape[1]))[None]
            for found, side in zip(answer.answers, sides, strict=True)
        )
        drawn = self.target.draw(answer.x, answer.y, self.core, self.core)
        valid = np.zeros((self.core, self.core), np.bool_)
        valid[: answer.valid.shape[0], : answer.valid.shape[1]] = answer.valid
        drawn = {**drawn, "valid": valid & drawn.get("valid", True)}
        targets = {name: torch.from_numpy(part)[None].to(maps[0].device) for name, part in drawn.items()}
        part = self.head.loss_sums(maps[0] if len(maps) == 1 else maps, targets)
        self._sums = [a + b for a, b in zip(self._sums, part, strict=True)] if self._sums else list(part)

    def scores(self) -> dict[str, Tensor] | None:
        """The sums by name; None without a target."""
        return self.head.scores(self._sums) if self._sums else None


def with_progress(
    answers: Iterator[RegionAnswer], regions: int, progress: Callable[[int, int], None] | None
) -> Iterator[RegionAnswer]:
    """The same answers; after each, `progress` is called with (regions done, all)."""
    for done, answer in enumerate(answers, start=1):
        yield answer
        if progress is not None:
            progress(done, regions)
