"""A module's chunks as CUDA graphs: their kernels are recorded once, and launched all together from then on.

Kernels that are launched one by one wait for Python's lock, which the threads that read ahead want as well; a fast
device then stands idle. A graph holds addresses, not tensors: it computes with whatever a weight holds when it is
replayed, and nothing else of Python happens again. So the module must be a pure function of its inputs, weights and
buffers, and its graphs serve as long as it is what it was (`known.py`).
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from gigaxt.prefetch import form

logger = logging.getLogger("gigaxt")

Work = Callable[[Any], Sequence[Tensor | None]]
"""From tensors in any nesting to tensors, by work of the device alone."""

RECORDED_ON = ("cuda",)
"""Types of devices."""
KEPT_BELOW = 64
"""Chunks of a pass from which on its graph, and with it the memory of a chunk, is let go at the pass's end: to record
it again takes about as long as a chunk or two."""
FORMS = 2
"""Recorded of each name: chunks with a mask of real pixels, and without."""


class Recordings:
    """Graphs of a module: by name those of the most common forms of inputs, all in the same memory."""

    def __init__(self) -> None:
        self._seen: Counter[tuple[str, str]] = Counter()
        self._made: dict[tuple[str, str], Recording] = {}
        self._refused: set[str] = set()

    def run(self, name: str, work: Work, inputs: Any) -> Sequence[Tensor | None]:
        """What `work` makes of `inputs`; of a replay, tensors that the next one overwrites."""
        key = name, _form(inputs)
        self._seen[key] += 1
        if key not in self._made and name not in self._refused and self._has_room(key):
            beside = next(iter(self._made.values()), None)
            try:
                self._made[key] = Recording(work, inputs, beside)
            except RuntimeError as error:  # it waits for the device, draws random numbers of the host, or lacks memory
                self._refused.add(name)
                reason = str(error).splitlines()[0]
                logger.warning("CUDA graphs: %s cannot be recorded, run as before: %s", name, reason)
        # Not inside `except`: there the exception keeps the attempt's tensors alive.
        return self._made[key].replay(inputs) if key in self._made else work(inputs)

    def end_pass(self, name: str, chunks: int) -> None:
        """After a pass over `chunks`: let go of what is recorded quickly again, measured by them."""
        own = [key for key in self._made if key[0] == name]
        if chunks >= KEPT_BELOW and own:
            for key in own:
                del self._made[key]
            torch.cuda.empty_cache()

    def _has_room(self, key: tuple[str, str]) -> bool:
        """Whether to record a form: not at first sight, as things happen then that happen once. May forget another."""
        own = [other for other in self._made if other[0] == key[0]]
        if self._seen[key] < 2 or len(own) < FORMS:
            return self._seen[key] > 1
        least = min(own, key=self._seen.__getitem__)
        if self._seen[key] < 2 * self._seen[least]:
            return False
        del self._made[least]
        return True


class Recording:
    """One graph, and the tensors that it reads and writes.

    Args:
        work: what is recorded.
        inputs: like those that it will be replayed for.
        beside: another one, which works in the same memory: what either computed is used before the other is replayed.
    """

    def __init__(self, work: Work, inputs: Any, beside: Recording | None = None) -> None:
        leaves, tree = tree_flatten(inputs)
        self._inputs = [_place_for(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self._graph = torch.cuda.CUDAGraph()
        pool = None if beside is None else beside._graph.pool()
        # Casts that were made before lie in memory that is used for other things later; those made in here go with it.
        torch.clear_autocast_cache()
        try:
            # Other threads pin memory meanwhile, which only concerns this one if it is asked to care.
            with torch.cuda.graph(self._graph, pool, capture_error_mode="thread_local"):
                self._outputs = work(tree_unflatten(self._inputs, tree))
        finally:
            torch.clear_autocast_cache()

    def replay(self, inputs: Any) -> Sequence[Tensor | None]:
        """The outputs for other inputs of the same form."""
        for own, leaf in zip(self._inputs, tree_flatten(inputs)[0], strict=True):
            if isinstance(own, Tensor):
                own.copy_(leaf)
        self._graph.replay()
        return self._outputs


def _form(inputs: Any) -> str:
    """What inputs must have in common to be one graph's."""
    rows = [(t.shape[:1], t.requires_grad) for t in tree_flatten(inputs)[0] if isinstance(t, Tensor)]
    return repr((form(inputs), rows))


def _place_for(leaf: Tensor) -> Tensor:
    return torch.empty_like(leaf).requires_grad_(leaf.requires_grad)
