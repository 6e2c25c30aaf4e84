"""Dropout and stochastic depth whose random numbers depend on (step seed, region, layer, element) and on nothing else.

A streamed forward pass cuts the regions into chunks and its backward pass runs every chunk again. With the global
random state, the masks would depend on the chunk size, and the second run would need the state of the first. Here a
mask is a hash of its coordinates: the same in any chunk, on any device, in any thread, as often as it is asked for.

    key_dropout(model)                                    # once, after building
    with dropout_key(seed, region_ids):                   # around each forward pass over these regions
        output = model(pixels)                            # (len(region_ids), ...)

What is keyed: modules (`nn.Dropout` and its kin, `DropPath`). Dropout inside a fused attention kernel is not a module;
timm's attentions with a dropout rate are therefore switched to their explicit form. A module that runs twice in one
forward pass draws the same numbers both times. Recomputation outside the `with` block (`torch.utils.checkpoint` in a
backward pass that the caller runs later) does not see the key: enter the block there too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, TypeVar, cast

import torch
from timm.layers.drop import DropPath, drop_path
from torch import Tensor, nn
from torch.nn import functional as F

from gigaxt.errors import ConfigError, TrainingError

M = TypeVar("M", bound=nn.Module)

LAYERS_AT_ONCE = 64  # keys are made for this many layers in one go: on a GPU a hash costs launches, not arithmetic


class _Key:
    """The step seed and the regions of the forward pass that is running, mixed: (n,) int64."""

    def __init__(self, regions: Tensor) -> None:
        self.count, self.regions = len(regions), regions
        self._tables: dict[tuple[int, torch.device], tuple[Tensor, Tensor]] = {}

    def bits(self, layer: int, count: int, device: torch.device) -> Tensor:
        """(n, count) int32, any of them equally likely: `count` numbers for each region."""
        keys, first = self._of_layer(layer, device)
        return first[:, None] if count == 1 else _bits(keys, count)

    def _of_layer(self, layer: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """One int64 key per region, (n,), and the first number that it gives."""
        block, row = divmod(layer, LAYERS_AT_ONCE)
        table = self._tables.get((block, device))
        if table is None:
            regions = _onto(device, self.regions)
            layers = torch.arange(block * LAYERS_AT_ONCE, (block + 1) * LAYERS_AT_ONCE, device=device)
            keys = _mix64(regions[None, :] + layers[:, None] * _GOLDEN64)  # (layers, n)
            table = self._tables[block, device] = keys, _bits(keys.flatten(), 1).view_as(keys)
        return table[0][row], table[1][row]


def _onto(device: torch.device, keys: Tensor) -> Tensor:
    if device.type == "cuda" and keys.is_cpu:  # from pageable memory the copy would wait for all there is to do
        keys = keys.pin_memory()
    return keys.to(device, non_blocking=True)


_active: ContextVar[_Key | None] = ContextVar("gigaxt_dropout_key", default=None)


@contextlib.contextmanager
def dropout_key(seed: int, region_ids: Tensor, device: torch.device | None = None) -> Iterator[None]:
    """Key the dropout of the forward pass inside the block.

    Holds for the current thread only (an autograd thread that runs a forward pass enters its own block).

    Args:
        seed: any integer; another one for every training step.
        region_ids: (n,) int64, one per region of the batch, distinct over the images of a step.
        device: where the pass runs, if that is known: what it is keyed by is then brought there once, ahead of it, and
            not inside what may be compiled.

    Raises:
        TrainingError: `region_ids` are not int64 (n,).
    """
    if region_ids.ndim != 1 or region_ids.dtype != torch.int64:
        raise TrainingError(
            f"region_ids: expected int64 of shape (n,), got {region_ids.dtype} {tuple(region_ids.shape)}"
        )
    # Of the seed and the ids at once: a number read inside a compiled module would be a constant there, compiled anew
    # for every step.
    keys = _mix64(region_ids + _signed64(_mix_int(seed)))
    with keyed_by(keys if device is None else _onto(device, keys)):
        yield


@contextlib.contextmanager
def keyed_by(keys: Tensor | None) -> Iterator[None]:
    """As `dropout_key`, by what `region_keys` gave; None: nothing changes."""
    token = _active.set(_active.get() if keys is None else _Key(keys))
    try:
        yield
    finally:
        _active.reset(token)


def region_keys(device: torch.device) -> Tensor | None:
    """What the forward pass that is running is keyed by, on `device`: (n,) int64; None: by nothing."""
    key = _active.get()
    return None if key is None else _onto(device, key.regions)


def key_dropout(module: M) -> M:
    """Replace every dropout and stochastic depth below `module`, in place, by its keyed form.

    Layers are numbered in the order of `named_modules`; a second call numbers only what is new. Call it once on the
    whole model: two modules that were treated separately share layer numbers and so, for the same regions, masks.

    Raises:
        ConfigError: a module draws random numbers in a way that cannot be keyed.
    """
    taken = [child.layer for child in module.modules() if isinstance(child, KeyedDropout | KeyedDropPath)]
    layer = max(taken, default=-1) + 1
    replacements: dict[nn.Module, nn.Module] = {}
    for name, child in module.named_modules():
        _refuse_unkeyable(name, child)
        keyed = _keyed(child, layer)
        if keyed is not None:
            replacements[child] = keyed
            layer += 1
    for parent in module.modules():
        _unfuse_attention(parent)
        for name, child in list(parent._modules.items()):  # named_children would pass over a second place of a layer
            if child in replacements:
                setattr(parent, name, replacements[child])
    return cast(M, replacements.get(module, module))  # a dropout itself comes back as its keyed form


class KeyedDropout(nn.Module):
    """`nn.Dropout` (of single elements) or `nn.Dropout1d/2d/3d` (of whole channels) with keyed masks.

    Input (n * k, ...) for n regions: the k rows of a region (attention windows, say) are neighbours, as timm's window
    partition leaves them. Without an active key it is the ordinary module.
    """

    def __init__(self, p: float, layer: int, channels: bool = False) -> None:
        super().__init__()
        self.p, self.layer, self.channels = p, layer, channels

    def forward(self, x: Tensor) -> Tensor:
        """Zero elements with probability p and scale the others by 1 / (1 - p); identity in evaluation mode."""
        if self.p == 0.0 or not self.training:
            return x
        key = _active.get()
        if self.channels:
            # Flattened to (rows, channels, rest), for which torch has one function whatever the dimension was.
            if key is None:
                return F.dropout1d(x.flatten(2), self.p, training=True).view_as(x)
            shape = (*x.shape[:2], *(1,) * (x.ndim - 2))
        else:
            if key is None:
                return F.dropout(x, self.p, training=True)
            shape = tuple(x.shape)
        return _drop(x, key, self.layer, self.p, shape, scale=True)

    def extra_repr(self) -> str:
        """As torch's own, with the layer number."""
        return f"p={self.p}, layer={self.layer}{', channels=True' if self.channels else ''}"


class KeyedDropPath(nn.Module):
    """Stochastic depth (timm's `DropPath`) with keyed masks: one draw per row of (n * k, ...)."""

    def __init__(self, drop_prob: float, layer: int, scale_by_keep: bool = True) -> None:
        super().__init__()
        self.drop_prob, self.layer, self.scale_by_keep = drop_prob, layer, scale_by_keep

    def forward(self, x: Tensor) -> Tensor:
        """Zero rows with probability `drop_prob`; identity in evaluation mode."""
        if self.drop_prob == 0.0 or not self.training:
            return x
        key = _active.get()
        if key is None:
            y: Tensor = drop_path(x, self.drop_prob, True, self.scale_by_keep)
            return y
        shape = (x.shape[0], *(1,) * (x.ndim - 1))
        return _drop(x, key, self.layer, self.drop_prob, shape, scale=self.scale_by_keep)

    def extra_repr(self) -> str:
        """As timm's own, with the layer number."""
        return f"drop_prob={self.drop_prob:0.3f}, layer={self.layer}"


def _drop(x: Tensor, key: _Key, layer: int, p: float, shape: tuple[int, ...], *, scale: bool) -> Tensor:
    """`x` with what the mask of `shape` (broadcast over x) drops set to zero, the rest scaled to keep the mean."""
    n = key.count
    if n == 0 or x.shape[0] % n:
        raise TrainingError(
            f"keyed dropout: the leading dimension of {tuple(x.shape)} is no multiple of the {n} regions of "
            "dropout_key; expected (regions * k, ...) with the rows of a region next to each other"
        )
    per_region = torch.Size(shape).numel() // n
    bits = key.bits(layer, per_region, x.device).view(shape)  # (n, per_region) -> shape
    factor = 1.0 / (1.0 - p) if scale and p < 1.0 else 1.0
    if bits.numel() < x.numel():  # broadcast over x: one product, whose backward pass saves next to nothing
        return x * (_kept(bits, p).to(x.dtype) * factor)
    # A product would save a mask of x's type for the backward pass; masked_fill saves a bool one.
    return x.masked_fill(~_kept(bits, p), 0.0) * factor


# ------------------------------------------------------------------------------------------------ the hash
# Per region and layer one 64-bit key (splitmix64); per element 32 bits: the element's number, xored with one half of
# the key, through murmur3's finaliser, xored with the other half, through it again. Signed integers that wrap around
# are what CPU and CUDA share; `>>` is arithmetic there, hence the masks.

_MASK64 = (1 << 64) - 1


def _signed64(value: int) -> int:
    return (value & _MASK64) - ((value & (1 << 63)) << 1)


def _signed32(value: int) -> int:
    return (value & 0xFFFFFFFF) - ((value & (1 << 31)) << 1)


_GOLDEN64 = _signed64(0x9E3779B97F4A7C15)
_SPLITMIX = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_MURMUR = (0x85EBCA6B, 0xC2B2AE35)


def _shift_right(x: Tensor, by: int, width: int) -> Tensor:
    """The logical shift of a signed tensor whose elements have `width` bits."""
    return (x >> by) & ((1 << (width - by)) - 1)


def _mix_int(value: int) -> int:
    """splitmix64 of a Python integer."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK64
    value = ((value ^ (value >> 30)) * _SPLITMIX[0]) & _MASK64
    value = ((value ^ (value >> 27)) * _SPLITMIX[1]) & _MASK64
    return value ^ (value >> 31)


def _mix64(x: Tensor) -> Tensor:
    """splitmix64 of each element of an int64 tensor."""
    x = x + _GOLDEN64
    x = (x ^ _shift_right(x, 30, 64)) * _signed64(_SPLITMIX[0])
    x = (x ^ _shift_right(x, 27, 64)) * _signed64(_SPLITMIX[1])
    return x ^ _shift_right(x, 31, 64)


def _mix32_(x: Tensor) -> Tensor:
    """murmur3's 32-bit finaliser of each element of an int32 tensor, in place."""
    x ^= _shift_right(x, 16, 32)
    x *= _signed32(_MURMUR[0])
    x ^= _shift_right(x, 13, 32)
    x *= _signed32(_MURMUR[1])
    x ^= _shift_right(x, 16, 32)
    return x


def _bits(keys: Tensor, count: int) -> Tensor:
    """(n, count) int32 for n int64 keys."""
    low = (keys << 32 >> 32).to(torch.int32)[:, None]
    high = (keys >> 32).to(torch.int32)[:, None]
    bits = torch.arange(count, dtype=torch.int32, device=keys.device) ^ low  # (n, count)
    return _mix32_(_mix32_(bits) ^ high)


def _kept(bits: Tensor, p: float) -> Tensor:
    """False with probability p, resolution 2^-32."""
    return torch.zeros_like(bits, dtype=torch.bool) if p >= 1.0 else bits >= min(round(p * 2**32) - 2**31, 2**31 - 1)


# ------------------------------------------------------------------------------------------------ which modules


def _keyed(module: nn.Module, layer: int) -> nn.Module | None:
    """The keyed form of a dropout module, or None for any other."""
    keyed: KeyedDropout | KeyedDropPath
    if isinstance(module, nn.Dropout):
        keyed = KeyedDropout(module.p, layer)
    elif isinstance(module, nn.Dropout1d | nn.Dropout2d | nn.Dropout3d):
        keyed = KeyedDropout(module.p, layer, channels=True)
    elif isinstance(module, DropPath) or type(module).__name__ == "DropPath":
        rate = getattr(module, "drop_prob", None)
        keyed = KeyedDropPath(float(rate or 0.0), layer, getattr(module, "scale_by_keep", True))
    else:
        return None
    return keyed.train(module.training)


def _unfuse_attention(module: nn.Module) -> None:
    """Make a timm attention with a dropout rate use its dropout module, not the kernel's own."""
    if getattr(module, "fused_attn", False) and getattr(getattr(module, "attn_drop", None), "p", 0.0) > 0.0:
        cast(Any, module).fused_attn = False  # a plain flag of timm's attention classes


def _refuse_unkeyable(name: str, module: nn.Module) -> None:
    rate = 0.0
    if isinstance(module, nn.AlphaDropout | nn.FeatureAlphaDropout):
        rate = module.p
    elif isinstance(module, nn.MultiheadAttention | nn.RNNBase):
        rate = module.dropout  # applied inside one kernel
    elif isinstance(module, nn.RReLU):
        rate = module.upper - module.lower
    elif type(module).__name__ in ("DropBlock2d", "PatchDropout", "PatchDropoutWithIndices"):
        rate = float(getattr(module, "drop_prob", 0.0) or getattr(module, "prob", 0.0))
    if rate > 0.0:
        raise ConfigError(
            f"{name or 'module'}: the random numbers of {type(module).__name__} cannot be keyed on the region; "
            "set its rate to 0 (nn.Dropout and DropPath can be keyed)"
        )
