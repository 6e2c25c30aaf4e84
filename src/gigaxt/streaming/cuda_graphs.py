"""A module's chunks as CUDA graphs: their kernels are recorded once, and launched all together from then on.

Each launch of a kernel needs Python's lock, which the threads that read ahead want as well: a fast device then stands
idle. A CUDA graph launches all kernels of a chunk without Python. It holds addresses, not tensors: a replay computes
with whatever the weights hold by then, but no Python code runs again. So the module must be a pure function of its
inputs, weights and buffers, and its graphs are valid as long as nothing else about it changes (`known.py`).
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from gigaxt.streaming.prefetch import form

logger = logging.getLogger("gigaxt")

Work = Callable[[Any], Sequence[Tensor | None]]
"""From tensors in any nesting to tensors, computed by the device alone: the host neither waits nor looks at values."""

RECORDED_ON = ("cuda",)
"""Types of devices that have graphs."""
KEPT_BELOW = 64
"""Passes of fewer chunks keep their graph for the next step. Longer ones free it, and with it the memory of a chunk:
recording it again takes about as long as one or two chunks."""
FORMS = 2
"""Graphs that are kept of each kind of work: of chunks with a validity mask, and of chunks without."""


class Recordings:
    """A module's graphs, all in the same memory: for each kind of work those of the most common forms of inputs."""

    def __init__(self) -> None:
        self._seen: Counter[tuple[str, str]] = Counter()
        self._made: dict[tuple[str, str], Recording] = {}
        self._refused: set[str] = set()

    def run(self, name: str, work: Work, inputs: Any) -> Sequence[Tensor | None]:
        """What `work` makes of `inputs`, by a graph where there is one: its tensors are overwritten by the next replay.

        Args:
            name: of the kind of work, such as "gradients".
            work: what to do, and to record once a form of inputs has been seen twice.
            inputs: tensors in any nesting.
        """
        key = name, _form(inputs)
        self._seen[key] += 1
        if key not in self._made and name not in self._refused and self._has_room(key):
            beside = next(iter(self._made.values()), None)
            try:
                self._made[key] = Recording(work, inputs, beside)
            except RuntimeError as error:  # `work` waits for the device, draws on the host, or there is no memory left
                self._refused.add(name)
                reason = str(error).splitlines()[0]
                logger.warning("CUDA graphs: %s cannot be recorded, run as before: %s", name, reason)
        # Not inside `except`: there the exception keeps the attempt's tensors alive.
        return self._made[key].replay(inputs) if key in self._made else work(inputs)

    def end_pass(self, name: str, chunks: int) -> None:
        """After a pass over so many chunks: free its graphs if recording them again costs little beside the pass."""
        own = [key for key in self._made if key[0] == name]
        if chunks >= KEPT_BELOW and own:
            for key in own:
                del self._made[key]
            torch.cuda.empty_cache()

    def _has_room(self, key: tuple[str, str]) -> bool:
        """Whether to record a form of inputs; may drop the graph of a rarer one.

        Not at first sight: libraries do things at their first call that must not become part of a graph.
        """
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
        beside: another recording whose memory it shares: what one computed must be used before the other is replayed.
    """

    def __init__(self, work: Work, inputs: Any, beside: Recording | None = None) -> None:
        leaves, tree = tree_flatten(inputs)
        self._inputs = [_place_for(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self._graph = torch.cuda.CUDAGraph()
        pool = None if beside is None else beside._graph.pool()
        # Autocast keeps its casts of the weights. A graph must not read casts made before it, whose memory is reused
        # later, nor may later calls read those made while recording.
        torch.clear_autocast_cache()
        try:
            # The reading threads pin memory meanwhile: by default CUDA would refuse that while a graph is recorded.
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
    """What inputs must have in common to be replayed by one graph: shapes, dtypes, and which require grad."""
    rows = [(t.shape[:1], t.requires_grad) for t in tree_flatten(inputs)[0] if isinstance(t, Tensor)]
    return repr((form(inputs), rows))


def _place_for(leaf: Tensor) -> Tensor:
    return torch.empty_like(leaf).requires_grad_(leaf.requires_grad)
