"""Chunks of a nested stream, which go through it more than once and are not loaded whole each time; what is kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

Maps = tuple[Tensor, ...]


class Turn(NamedTuple):
    """A chunk, and what is loaded of it this time."""

    chunk: Any
    regions: int
    """How many are in it; 0 where not known yet."""
    pixels: bool
    targets: bool

    @property
    def region_ids(self) -> Any:
        """Of the chunk, if it has them; see `gigaxt.stream`."""
        return getattr(self.chunk, "region_ids", None)

    def parts(self, most: int) -> list[Turn]:
        """The same in at most `most` parts, where the chunk knows how to cut itself and its pixels are loaded."""
        cut: Callable[[int], Sequence[Any]] | None = getattr(self.chunk, "parts", None)
        if cut is None or not self.pixels:
            return [self]
        return [self._replace(chunk=part, regions=0) for part in cut(most)]

    def __str__(self) -> str:
        return str(self.chunk)


def make_turns(chunks: Sequence[Any], counts: Sequence[int], wanted: Callable[[int], tuple[bool, bool]]) -> list[Turn]:
    """A turn of each chunk, with (pixels, targets) as `wanted` says; `counts`: of regions, or empty where not known."""
    counts = counts or [0] * len(chunks)
    return [Turn(chunk, n, *wanted(i)) for i, (chunk, n) in enumerate(zip(chunks, counts, strict=True))]


def load_turn(load: Callable[[Any], Any], load_targets: Callable[[Any], Any] | None, turn: Turn) -> Any:
    """What `encode` takes, what `decode` takes, and a tensor with a row a region."""
    pixels = load(turn.chunk) if turn.pixels else None
    targets = load_targets(turn.chunk) if turn.targets and load_targets else None
    # The empty tensor tells the number of regions where nothing else is loaded.
    return pixels, targets, torch.empty(turn.regions, 0) if turn.regions else None


@dataclass
class Encoded:
    """What is kept of a chunk after the encode stage."""

    start: int
    """Place of its first region in the stream."""
    tokens: Tensor | None
    """With its graph; None where only the maps are kept."""
    maps: Maps
    """With their graph, or plain on the host."""
    map_grads: list[Maps] = field(default_factory=list)
    """From the decode stage, a tuple for each part of the rows."""


class Decoded(NamedTuple):
    """Outputs of the decoder on some rows, and what flows back through it."""

    outputs: tuple[Tensor, ...]
    context_grad: Tensor | None = None
    map_grads: Maps = ()
    parameter_grads: Sequence[Tensor | None] = ()
