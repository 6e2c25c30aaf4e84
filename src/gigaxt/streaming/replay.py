"""Running a module on chunks again and again, with the same result: what `streaming` and `nested` share.

A module is called on detached aliases of its parameters, so that parameter hooks (DDP's among
them) do not fire for every chunk, and under the autocast state of the forward pass. What a first run would hide from a
second one (changes in place, global random state, tensors that are no inputs) is found on the first chunk and refused.
"""

from __future__ import annotations

import contextlib
import functools
import pickle
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_flatten, tree_map_only

from gigaxt.errors import ConfigError
from gigaxt.streaming.host_copies import pinned_size
from gigaxt.streaming.rows import Rows, at_least_float32

J = TypeVar("J", bound="_HasAutocast")
P = ParamSpec("P")
T = TypeVar("T")


@dataclass
class Autocast:
    """The autocast state of one device type, taken at the forward pass and restored at the backward pass."""

    device_type: str
    enabled: bool
    dtype: torch.dtype

    @classmethod
    def now(cls, device: torch.device) -> Autocast:
        """The state at this moment."""
        kind = device.type
        return cls(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))

    def restored(self) -> torch.autocast:
        """A context manager."""
        return torch.autocast(self.device_type, self.dtype, enabled=self.enabled)

    @contextlib.contextmanager
    def one_pass(self) -> Iterator[None]:
        """Around all chunks of a pass: weights are cast for the first of them, and the casts used by the others.

        Autocast is off in it but where it is `restored`, and forgets its casts when the outermost block ends: this one,
        or one of the caller's around many steps, which is why they are let go at the end. `Aliases` see to it that a
        cast without a graph never serves where one is wanted.
        """
        with torch.autocast(self.device_type, enabled=False):
            try:
                yield
            finally:
                torch.clear_autocast_cache()


class _HasAutocast(Protocol):
    autocast: Autocast


def one_pass(method: Callable[Concatenate[J, P], T]) -> Callable[Concatenate[J, P], T]:
    """A method that runs all chunks, as one pass: see `Autocast.one_pass`."""

    @functools.wraps(method)
    def run(self: J, /, *args: P.args, **kwargs: P.kwargs) -> T:
        with self.autocast.one_pass():
            return method(self, *args, **kwargs)

    return run


class Aliases:
    """Detached aliases of a module's parameters, and calls of the module on them.

    Iterating gives one alias for each of `module.parameters()`, in that order; frozen parameters have frozen aliases.
    Calls without a graph have aliases of their own: autocast keeps what it casts, and a cast that was made without a
    graph would cut the gradient of a later call.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._of, without_graph = _detached(module), _detached(module)
        # Not torch.func.functional_call: with a submodule under two names it leaves an alias behind in the module.
        self._slots, self._slots_without_graph = (
            [
                (child._parameters, name, aliases[id(p)])
                for child in module.modules()
                for name, p in child._parameters.items()
                if p is not None
            ]
            for aliases in (self._of, without_graph)
        )

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self._of.values())

    def __call__(self, *args: Any) -> Any:
        """The module's output on `args`."""
        with _swapped(self._slots_now):
            return self.module(*_without_leaves(args))

    def call_checked(self, *args: Any) -> Any:
        """As a plain call, but refuses a module that changes what it works on or draws from global random state.

        Buffers are swapped for copies meanwhile, so that a refused module keeps its own.
        """
        copies = [
            (child._buffers, name, b.clone())
            for child in self.module.modules()
            for name, b in child._buffers.items()
            if b is not None
        ]
        own = [*self._slots_now, *copies]
        given = [t for t in tree_flatten(args)[0] if isinstance(t, Tensor)]
        versions = [version_of(t) for t in given], [version_of(t) for _, _, t in own]
        random_states = _random_states()
        with _swapped(own):
            result = self.module(*_without_leaves(args))
            changed = [
                name
                for (owner, name, t), version in zip(own, versions[1], strict=True)
                if owner[name] is not t or version_of(t) != version
            ]
        if changed:
            raise ConfigError(
                f"the module's forward changes its buffers or weights ({', '.join(changed[:3])}), which streaming "
                "would repeat: make them constant, or freeze the layers that own them"
            )
        if [version_of(t) for t in given] != versions[0]:
            raise ConfigError(
                "the module changes what it is given in place, so a second run would find it changed: "
                "let its first operation make a copy"
            )
        if _random_states() != random_states and self._draws(own, args):
            raise ConfigError(
                "the module draws from the global random state, so a second run would differ: "
                "replace its random layers with gigaxt.key_dropout(module)"
            )
        return result

    def _draws(self, own: Sequence[tuple[dict[str, Any], str, Tensor]], args: Any) -> bool:
        """Whether a second run moves the random states as well: in the first it may have been another thread."""
        before = _random_states()
        with torch.no_grad(), _swapped(own):
            self.module(*_without_leaves(args))
        return _random_states() != before

    @property
    def _slots_now(self) -> list[tuple[dict[str, Any], str, Tensor]]:
        return self._slots if torch.is_grad_enabled() else self._slots_without_graph


def _detached(module: nn.Module) -> dict[int, Tensor]:
    """An alias for each parameter, by its id."""
    return {id(p): p.detach().requires_grad_(p.requires_grad) for p in module.parameters()}


def version_of(tensor: Tensor) -> tuple[int, int]:
    """Changes where a tensor is changed in place, or given other memory."""
    place = tensor.data_ptr() if tensor.layout == torch.strided else 0
    return place, 0 if tensor.is_inference() else tensor._version


def _random_states() -> list[bytes]:
    """Of what a module may draw from beside its inputs; no device has to be waited for."""
    on_cuda: Sequence[torch.Generator] = torch.cuda.default_generators  # none before CUDA is used
    if on_cuda and torch.cuda.is_current_stream_capturing():  # then they may not be asked
        on_cuda = ()
    of_torch = [generator.get_state().numpy().tobytes() for generator in (torch.default_generator, *on_cuda)]
    return [*of_torch, pickle.dumps((random.getstate(), np.random.get_state()))]


def _without_leaves(args: Any) -> Any:
    """`args` with views for leaves that require grad.

    Autocast takes such a leaf for a weight, and would keep it and its cast to the end of the pass, chunk for chunk.
    """
    return tree_map_only(Tensor, lambda t: t.view_as(t) if t.requires_grad and t.is_leaf else t, args)


@contextlib.contextmanager
def _swapped(slots: Sequence[tuple[dict[str, Any], str, Tensor]]) -> Iterator[None]:
    """Put tensors in the places of a module's own ones."""
    own = [owner[name] for owner, name, _ in slots]
    try:  # with the loop in it: Ctrl-C may come at any time
        for owner, name, tensor in slots:
            owner[name] = tensor
        yield
    finally:
        for (owner, name, _), tensor in zip(slots, own, strict=True):
            owner[name] = tensor


@dataclass
class Sums:
    """Gradients of trained parameters added up in float32 or better, in chunk order."""

    like: Sequence[Tensor]
    totals: list[Tensor | None] = field(init=False)

    def __post_init__(self) -> None:
        self.totals = [None] * len(self.like)

    def add(self, grads: Sequence[Tensor | None]) -> None:
        """Add one chunk's gradients; None is zero."""
        totals: list[Tensor] = []
        added: list[Tensor] = []
        for i, (tensor, grad) in enumerate(zip(self.like, grads, strict=True)):
            if grad is None:
                continue
            total = self.totals[i]
            if total is None:
                self.totals[i] = grad.to(at_least_float32(tensor.dtype), copy=True)
            else:
                totals.append(total)
                added.append(grad)
        if totals:
            torch._foreach_add_(totals, added)  # as `total += grad` for each; on CUDA in few launches

    def scale(self, factor: Tensor) -> None:
        """Multiply what has been added so far."""
        self.totals = [None if t is None else t * factor.to(t.dtype) for t in self.totals]

    def results(self) -> list[Tensor | None]:
        """In the dtypes of the tensors themselves."""
        return [None if t is None else t.to(like.dtype) for t, like in zip(self.totals, self.like, strict=True)]


def refuse_unstreamable(module: nn.Module) -> None:
    """Refuse what cannot be recomputed chunk by chunk.

    Raises:
        ConfigError: BatchNorm in training mode or without running statistics, FSDP inside, or parametrized weights that
            are cached.
    """
    for name, child in module.named_modules():
        if isinstance(child, nn.modules.batchnorm._BatchNorm) and (child.training or child.running_mean is None):
            how = "in training mode" if child.training else "without running statistics"
            raise ConfigError(
                f"`{name}` is {type(child).__name__} {how}, which mixes the regions of a chunk: set "
                "`region_encoder.freeze_batchnorm: true`, call gigaxt.freeze_batchnorm(module), or use another backbone"
            )
        if parametrize._cache_enabled and parametrize.is_parametrized(child):
            raise ConfigError(
                f"`{name or 'the module'}` has parametrized weights, which torch.nn.utils.parametrize.cached() would "
                "keep with the graph of another chunk, or without one: leave it out around a streamed module"
            )
        if any(c.__name__ in ("FullyShardedDataParallel", "FSDPModule") for c in type(child).__mro__):
            raise ConfigError(
                f"`{name or 'the module'}` is sharded by FSDP, whose hooks cannot run once a chunk: use DDP"
            )


def refuse_foreign_leaves(outputs: Sequence[Tensor], known: Sequence[Tensor]) -> None:
    """Walk the graph behind `outputs`; any leaf that requires grad must be one of `known`.

    Raises:
        ConfigError: the module reaches a tensor that is no input of the stream, whose gradient would be lost.
    """
    allowed = {id(t) for t in known}
    stack = [t.grad_fn for t in outputs if t.grad_fn is not None]
    seen = set(stack)
    while stack:
        node = stack.pop()
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) not in allowed:
            raise ConfigError(
                f"the module uses a tensor of shape {tuple(leaf.shape)} that requires grad but is not among its own "
                "parameters: pass it as an input, or register it as a parameter"
            )
        for parent, _ in node.next_functions:
            if parent is not None and parent not in seen:
                seen.add(parent)
                stack.append(parent)


def refuse_learning(rows: Rows) -> None:
    """Refuse pixels that require grad.

    Raises:
        ConfigError: they do.
    """
    if any(isinstance(t, Tensor) and t.requires_grad for t in tree_flatten(rows.loaded)[0]):
        raise ConfigError(
            "load(chunk) returned a tensor that requires grad, but pixels get no gradient when streamed: pass it in "
            "`sliced` or `shared`, or keep everything with Streaming(budget_gib=None)"
        )


class Saves:
    """How much memory autograd saved tensors in, of one graph."""

    def __init__(self) -> None:
        self.storages: dict[int, int] = {}
        """Where each begins, and its bytes."""
        self.hosted = 0
        """Bytes of pinned memory that `offloaded` would take: a copy of a tensor for each operation that saved it."""

    @property
    def bytes(self) -> int:
        """Each storage once."""
        return sum(self.storages.values())


@contextlib.contextmanager
def counted_saves(ignore: Sequence[Tensor]) -> Iterator[Saves]:
    """Count what autograd saves inside the block, but for what lies in `ignore`'s storages."""
    known = {t.untyped_storage().data_ptr() for t in ignore}
    saves = Saves()

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saves.storages[storage.data_ptr()] = storage.nbytes()
            saves.hosted += pinned_size(tensor.nbytes)
        return tensor.detach()  # the tensor itself would make a cycle when it is its node's own output

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saves


def first_look(
    call: Callable[[Callable[..., Any], Rows, Sequence[Tensor]], tuple[Tensor, ...]],
    aliases: Aliases,
    rows: Rows,
    leaves: Sequence[Tensor],
) -> tuple[tuple[Tensor, ...], Saves]:
    """Run the first rows of a stream with a graph and check that they can be replayed.

    Returns:
        The outputs, and what their graph saved.

    Raises:
        ConfigError: see `Aliases.call_checked`, `refuse_foreign_leaves`, `refuse_learning`.
    """
    refuse_learning(rows)
    known = [*aliases, *leaves]
    with counted_saves(known) as saves:
        outputs = call(aliases.call_checked, rows, leaves)
    refuse_foreign_leaves(outputs, known)
    return outputs, saves


def gradient_of(rows: Rows, grads: Sequence[Tensor | None], per_row: Sequence[int]) -> list[Tensor | None]:
    """The rows' share of the outputs' gradients: all of it where outputs were added up (no `per_row`)."""
    if not per_row:
        return list(grads)
    return [None if g is None else rows.of([g], k)[0] for g, k in zip(grads, per_row, strict=True)]


def grad(outputs: Sequence[Tensor], inputs: Sequence[Tensor], grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    """`torch.autograd.grad` that passes over outputs without a gradient and inputs that need none."""
    pairs = [(t, g.to(t.dtype)) for t, g in zip(outputs, grads, strict=True) if g is not None and t.requires_grad]
    wanted = [t for t in inputs if t.requires_grad]
    if not pairs or not wanted:
        return [None] * len(inputs)
    found = iter(torch.autograd.grad([t for t, _ in pairs], wanted, [g for _, g in pairs], allow_unused=True))
    return [next(found) if t.requires_grad else None for t in inputs]


def as_leaves(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Detached, each asking for a gradient where its original does."""
    return [t.detach().requires_grad_(t.requires_grad) for t in tensors]


def draw_seed() -> int:
    """A seed from PyTorch's default generator, as nn.Dropout would take its own; follows torch.manual_seed."""
    return int(torch.randint(2**62, ()).item())
