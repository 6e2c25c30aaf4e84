"""A module's chunks as CUDA graphs: their kernels are recorded once, and launched all together from then on.

Kernels that are launched one by one wait for Python's lock, which the threads that read ahead want as well; a fast
device then stands idle. A graph holds addresses, not tensors: it computes with whatever a weight holds when it is
replayed, and nothing else of Python happens again. So the module must be a pure function of its inputs, weights and
buffers, and what would change its course (modes, numbers in its attributes, where its weights lie) is compared at
every pass.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.weak import WeakTensorKeyDictionary

from gigaxt.replay import Autocast

logger = logging.getLogger("gigaxt")

Work = Callable[[Any], Sequence[Tensor | None]]
"""From tensors in any nesting to tensors, by work of the device alone."""

RECORDED_ON = ("cuda",)
"""Types of devices."""
KEPT_BELOW = 64
"""Chunks of a pass from which on its graph, and with it the memory of a chunk, is let go at the pass's end: to record
it again takes about as long as a chunk or two."""

_known = WeakTensorKeyDictionary()
"""`Recordings` by a module's first weight: modules around it may be made anew for every step."""


def recordings_of(module: nn.Module, autocast: Autocast) -> Recordings | None:
    """What has been recorded of `module` as it is now; None: no GPU, no weights, or hooks, which graphs do not call."""
    key = next(module.parameters(), None)
    if (
        autocast.device_type not in RECORDED_ON
        or key is None
        or any(
            child._forward_hooks or child._forward_pre_hooks or child._backward_hooks or child._backward_pre_hooks
            for child in module.modules()
        )
    ):
        return None
    state = _state(module, autocast)
    found: Recordings | None = _known.get(key)
    if found is None or found.state != state:
        found = _known[key] = Recordings(state)
    return found


class Recordings:
    """Graphs by name, one each, of the form of inputs that came twice in a row.

    Args:
        state: of the module, on which they depend.
    """

    def __init__(self, state: object) -> None:
        self.state = state
        self.looked: tuple[tuple[int, int], bool] | None = None
        """What a stream found at its first look at the module: bytes that a region saves, on the device and on the
        host, and whether the output is a single tensor."""
        self._seen: dict[str, object] = {}
        self._made: dict[str, tuple[object, Recording]] = {}
        self._refused: set[str] = set()

    def run(self, name: str, work: Work, inputs: Any) -> Sequence[Tensor | None]:
        """What `work` makes of `inputs`; of a replay, tensors that the next one overwrites."""
        form = _form(inputs)
        last, self._seen[name] = self._seen.get(name), form
        if name in self._made and self._made[name][0] == form:
            return self._made[name][1].replay(inputs)
        if name in self._refused or last != form:  # run as it is: the first time, things happen that happen once
            return work(inputs)
        self._made.pop(name, None)
        others = [recording for _, recording in self._made.values()]
        try:
            self._made[name] = form, Recording(work, inputs, beside=others[0] if others else None)
        except RuntimeError as error:  # it waits for the device, draws random numbers of the host, or lacks memory
            self._refused.add(name)
            logger.warning("CUDA graphs: %s cannot be recorded, run as before: %s", name, str(error).splitlines()[0])
        if name in self._refused:  # not inside `except`: there the exception keeps the attempt's tensors alive
            return work(inputs)
        return self._made[name][1].replay(inputs)

    def end_pass(self, name: str, chunks: int) -> None:
        """After a pass over `chunks`: let go of what is recorded quickly again, measured by them."""
        if chunks >= KEPT_BELOW and self._made.pop(name, None) is not None:
            torch.cuda.empty_cache()


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


def _form(inputs: Any) -> object:
    """What inputs must have in common to be one graph's."""
    leaves, tree = tree_flatten(inputs)
    return tree, [(t.shape, t.dtype, t.requires_grad) if isinstance(t, Tensor) else t for t in leaves]


def _place_for(leaf: Tensor) -> Tensor:
    return torch.empty_like(leaf).requires_grad_(leaf.requires_grad)


def _state(module: nn.Module, autocast: Autocast) -> object:
    """What a graph of `module` depends on, apart from its inputs."""
    plain = bool, int, float, str, torch.dtype, type(None)
    attributes: list[object] = []
    for child in module.modules():
        attributes.append(type(child))
        for name, value in vars(child).items():
            if isinstance(value, plain):
                attributes.append((name, value))
            elif isinstance(value, Tensor):  # no weight and no buffer, but read by the graph all the same
                attributes.append((name, value.data_ptr()))
    weights = [(t.data_ptr(), t.shape, t.dtype, t.requires_grad) for t in (*module.parameters(), *module.buffers())]
    precision = torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()
    return attributes, weights, (autocast.enabled, autocast.dtype), precision
