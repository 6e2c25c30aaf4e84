"""What earlier steps found out about a module, kept as long as nothing changes that a run of it depends on.

A module that is streamed is looked at once (`replay.first_look`), and its chunks are recorded once (`cuda_graphs`).
Both hold while nothing changes its course: the kinds of its parts, their attributes (numbers, functions, hooks, lists
of them, where weights and buffers lie), autocast. What the weights hold does not matter; what other objects that are
attributes hold is not seen.
"""

from __future__ import annotations

import weakref
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from gigaxt.streaming.cuda_graphs import RECORDED_ON, Recordings
from gigaxt.streaming.replay import Autocast, version_of

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


class Unchanged:
    """What modules' course depends on beside their weights, which autograd looks after between the passes.

    Taken after the forward pass, in which a module may make masks, or set parts of its own to evaluation mode.
    """

    def __init__(self, *modules: nn.Module) -> None:
        children = [child for module in modules for child in module.modules()]
        self._modes = [(child, _mode(child)) for child in children]
        # As items: those of a TorchScript module lie in no dictionary.
        self._own = [(own, dict(own.items())) for child in children for own in (child._modules, child._buffers)]
        buffers = {id(b): b for child in children for b in child._buffers.values() if b is not None}
        self._versions = [(b, version_of(b)) for b in buffers.values()]

    def check(self) -> None:
        """Refuse a second run that would not be like the first.

        Raises:
            RuntimeError: parts, modes or buffers have changed.
        """
        changed = {name for child, mode in self._modes for name, value in _mode(child).items() if mode[name] != value}
        for own, before in self._own:
            now = dict(own.items())
            changed |= {name for name, value in before.items() if now.get(name) is not value}
        if changed or any(version_of(b) != version for b, version in self._versions):
            raise RuntimeError(
                f"the module was changed between the forward and the backward pass, which runs it again "
                f"({', '.join(sorted(changed)) or 'a buffer, in place'}): call backward() first"
            )


def _mode(module: nn.Module) -> dict[str, object]:
    """Whether it is in training, and the rate of dropout or stochastic depth, if it has one."""
    rates = {name: vars(module).get(name) for name in ("p", "drop_prob")}
    return {"training": module.training} | {name: r if isinstance(r, float) else None for name, r in rates.items()}


def known_of(module: nn.Module, autocast: Autocast) -> Known:
    """What is known of `module` as it is now."""
    state = _state(module, autocast)
    key = next(module.parameters(), None)
    found: Known | None = None if key is None else _known.get(key)
    if found is None or found.state != state:
        hooked = any(  # a graph would call none
            child._forward_hooks or child._forward_pre_hooks or child._backward_hooks or child._backward_pre_hooks
            for child in module.modules()
        )
        found = Known(state, recordable=autocast.device_type in RECORDED_ON and not hooked)
        if key is not None:
            _known[key] = found
    return found


def _state(module: nn.Module, autocast: Autocast) -> object:
    """What a graph of `module` depends on, apart from its inputs."""
    parts: list[object] = []
    for child in module.modules():
        parts.append((type(child), getattr(type(child), "forward", None)))
        for name, value in vars(child).items():
            if isinstance(value, PLAIN):
                parts.append((name, value))
            elif not (isinstance(value, dict) and not value):  # as most of what every module has
                parts.append((name, _trait(value)))
    precision = torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()
    return parts, (autocast.enabled, autocast.dtype), precision


PLAIN = bool, int, float, complex, str, bytes, torch.dtype, torch.device, type(None)
"""What is equal where it has the same value."""


def _trait(value: Any) -> object:
    """What is equal for two values where a graph may take the one for the other; it holds none of them."""
    if isinstance(value, PLAIN):
        return value
    if isinstance(value, Tensor):
        place = value.data_ptr() if value.layout == torch.strided else id(value)
        return place, value.shape, value.dtype, value.requires_grad
    if isinstance(value, dict):  # parts, weights, buffers and hooks among them
        return [(name, _trait(one)) for name, one in value.items()]
    if isinstance(value, list | tuple | set | frozenset):
        return [_trait(one) for one in value]
    if isinstance(value, MethodType):  # made anew whenever it is asked for
        return _trait(value.__func__), _trait(value.__self__)
    try:
        return id(value), weakref.ref(value)  # an id alone may be that of another object by and by
    except TypeError:
        return id(value), value
