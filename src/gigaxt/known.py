"""What earlier steps found out about a module, kept as long as nothing changes that a run of it depends on.

A module that is streamed is looked at once (`replay.first_look`), and its chunks are recorded once (`cuda_graphs`).
Both hold while nothing changes its course: the kinds of its parts, their modes and the numbers in their attributes,
hooks, where its weights and buffers lie, autocast. What the weights hold does not matter.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from gigaxt.cuda_graphs import RECORDED_ON, Recordings
from gigaxt.replay import Autocast

_known = WeakTensorKeyDictionary()
"""`Known` by a module's first weight: modules around it may be made anew for every step."""


class Look(NamedTuple):
    """What a stream found of its first chunk."""

    form: object
    """Of what the module was given."""
    per_row: tuple[int, int]
    """Bytes that a region's graph saves, on the device and on the host."""
    single: bool
    """Whether the module returns one tensor."""


class Known:
    """What is known of a module.

    Args:
        state: what a run of the module depends on; once that is another, a new `Known` takes the place of this one.
        recordable: whether its chunks may be recorded as CUDA graphs.

    Attributes:
        look: what a stream found when it looked at the module; None: none did.
        graphs: of its chunks; None: there can be none.
    """

    def __init__(self, state: object, *, recordable: bool) -> None:
        self.state = state
        self.look: Look | None = None
        self.graphs = Recordings() if recordable else None


def known_of(module: nn.Module, autocast: Autocast) -> Known:
    """What is known of `module` as it is now."""
    hooks = [
        bool(child._forward_hooks or child._forward_pre_hooks or child._backward_hooks or child._backward_pre_hooks)
        for child in module.modules()
    ]
    state = _state(module, autocast), hooks
    key = next(module.parameters(), None)
    found: Known | None = None if key is None else _known.get(key)
    if found is None or found.state != state:  # a graph would call no hooks
        found = Known(state, recordable=autocast.device_type in RECORDED_ON and not any(hooks))
        if key is not None:
            _known[key] = found
    return found


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
