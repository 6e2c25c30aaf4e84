"""What every dense head offers: answers for all places of a region, a loss that is a function of scene-level sums."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from gigaxt.targets.base import SceneTarget

Answers = Tensor | tuple[Tensor, ...]
"""Maps (n, channels, side, side) of n regions, each at a stride of its own: one, or several in a fixed order."""


class MapsHead(nn.Module, ABC):
    """A head that answers for every place of a region from its feature maps and context.

    It sees each region alone, with its halo, so that regions can be streamed in any grouping: no norm over the batch.
    What it answers for the halo is cut off.
    """

    @abstractmethod
    def forward(self, maps: Sequence[Tensor], context: Tensor) -> Answers:
        """Answer for regions, each on its own.

        Args:
            maps: (n, c_i, h_i, w_i) each, fine to coarse, of the regions with their halos.
            context: (n, rows, cols, dim), of that area too; zeros where the scene has no token.
        """

    @abstractmethod
    def shapes(self, region_px: int) -> Sequence[tuple[int, int, int]]:
        """Of the maps that `forward` returns for one region: (channels, side, side) each. A side divides it."""

    @abstractmethod
    def as_target(self, target: Any) -> SceneTarget:
        """The target of one scene, from what a user's own loop or a task gives.

        Raises:
            DataError: it is none for this head.
        """


class DenseHead(MapsHead):
    """A head whose loss is a function of sums over all regions of the batch, of the answers for their cores.

    They are counted in float64, so that the streamed loss is that of the whole scene.

    Attributes:
        linear: promise that the loss is the first of the sums times what has no gradient. It saves a pass over the
            region encoder where nothing is kept (see `gigaxt.streaming.nested`).
    """

    linear: bool = False

    @abstractmethod
    def loss_sums(self, answers: Answers, targets: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """The sums that loss and scores are made of.

        Args:
            answers: of `forward`, cut to the regions' cores.
            targets: what `SceneTarget.draw` gives, with the regions as first dimension, and `valid` (n, core, core).

        Returns:
            float64 tensors of any shapes that do not depend on the regions. If `linear`, the first is a scalar and the
            only one with a gradient.

        Raises:
            DataError: targets that do not fit.
        """

    def check_targets(self, targets: Mapping[str, Tensor]) -> None:
        """Refuse values that are no targets, where a chunk is loaded: on the host, so that no device is waited for.

        Called where the model is on a device of its own; there `loss_sums` should not look at values.

        Args:
            targets: as `loss_sums` gets them, on the host.

        Raises:
            DataError: values that are no targets.
        """

    @abstractmethod
    def loss(self, sums: Sequence[Tensor]) -> Tensor:
        """The scalar loss from the sums over all regions."""

    @abstractmethod
    def scores(self, sums: Sequence[Tensor]) -> dict[str, Tensor]:
        """The sums by name, for the metrics of an evaluation."""
