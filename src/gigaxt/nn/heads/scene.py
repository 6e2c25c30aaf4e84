"""What a head offers that answers for a scene at once, from maps that it makes region by region."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from gigaxt.amounts import GIB
from gigaxt.errors import DataError
from gigaxt.machine import device_memory_gib
from gigaxt.nn.heads.dense import MapsHead
from gigaxt.scenes.batch import Scene
from gigaxt.targets.base import SceneTarget

Size = tuple[int, int]
"""Height and width in px."""


class SceneHead(MapsHead):
    """A head with two stages: one for each region, whose maps are stitched, and one over the maps of the whole scene.

    The first is streamed with the region encoder. The second is ordinary autograd, so that gradients are exact, but its
    memory grows with the scene.
    """

    @abstractmethod
    def scene_losses(self, maps: Sequence[Tensor], size: Size, target: SceneTarget, seed: int) -> dict[str, Tensor]:
        """The parts of one scene's loss by name, scalars, whose sum is the loss.

        Args:
            maps: (channels, ceil(height / stride), ceil(width / stride)) each, as `forward` gives them, stitched.
            size: of the scene.
            target: of `as_target`.
            seed: of what is drawn.
        """

    @abstractmethod
    def scene_answer(self, maps: Sequence[Tensor], size: Size) -> dict[str, Tensor]:
        """What is found in one scene, from its stitched maps."""

    @abstractmethod
    def needed_bytes(self, scene: Scene, *, training: bool) -> int:
        """About how much memory the second stage takes for one scene.

        Args:
            scene: with a target where something is learnt.
            training: whether what is needed for a backward pass must be kept.
        """

    def check_fits(self, scenes: Sequence[Scene], device: torch.device, *, training: bool) -> None:
        """Refuse scenes that are too large for this machine.

        Args:
            scenes: those that are in memory at once.
            device: where they are.
            training: as `needed_bytes` takes it.

        Raises:
            DataError: with the figures.
        """
        needed = [self.needed_bytes(scene, training=training) / GIB for scene in scenes]
        _, free = device_memory_gib(device)
        if device.type == "cuda":  # what PyTorch holds and does not use is free, too
            free += (torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)) / GIB
        if sum(needed) <= free:
            return
        largest = scenes[needed.index(max(needed))].image
        together = f", the {len(scenes)} scenes of this step {sum(needed):.3g} GiB" if len(scenes) > 1 else ""
        raise DataError(
            f"{largest.name}: the feature maps of {largest.width} x {largest.height} px, which this head holds at "
            f"once, and what it makes of them need about {max(needed):.3g} GiB{together}; {free:.3g} GiB are free on "
            f"{device.type}. Leave out the finest of head.strides, use smaller images, or head.kind detect, which "
            "streams"
        )
