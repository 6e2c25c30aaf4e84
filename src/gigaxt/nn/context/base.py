"""What a context encoder is: its config, its registry, and the checks that all of them share."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from gigaxt.config import from_dict, nearest
from gigaxt.errors import ConfigError, DataError
from gigaxt.nn.context.ordering import check_places
from gigaxt.streaming.recurrence import State

ContextState = tuple[State, ...]
"""What a causal context hands on to the next part of a scene; `LayeredContext`: the state of each layer, and where the
part ended."""


@dataclass(kw_only=True)
class ContextConfig:
    """Which context encoder, and how large."""

    kind: str = "mamba2"
    """The family member: `none`, `full`, `hyper`, `longformer`, `mamba`, `mamba2`, `window`, `xl`, or a name given to
    `gigaxt.register_context`."""
    dim: int = 192
    """Width of the tokens, in and out."""
    depth: int = 2
    """Layers, each a mixer, the summary path and an MLP."""
    summary: int = 64
    """Latents that read all tokens and that all tokens read, in every layer; 0 for the bare family member."""
    order: Literal["hilbert", "raster", "snake"] = "hilbert"
    """The scan order of recurrent kinds, computed from the coordinates."""
    alternate: bool = False
    """Whether every other layer scans with rows and columns swapped, so that what is far in one order is near in the
    next."""
    bidirectional: bool = True
    """Whether a token also depends on those after it in the scan order."""
    heads: int | None = None
    """Heads of the mixer; None: chosen from `dim` (32 channels a head in attention, 64 in Mamba-2)."""
    mlp_ratio: float = 2.0
    """Hidden width of the MLPs over `dim`."""
    segment: int = 4096
    """Tokens (of all batch rows together) that are computed at once where activations are not kept."""
    keep_tokens: int = 2048
    """Batches of up to this many tokens (batch x tokens) keep their activations; larger ones are computed twice,
    segment by segment, at the price of a second forward pass. Mamba-2 of two layers keeps 159 KiB a token at
    `dim=192`."""
    budget_gib: float = 0.0
    """Device memory for activations that larger batches keep instead of computing them again; measured on the first
    segment of each layer's parts and spent from the first layer on."""
    host_gib: float = 0.0
    """Host memory (pinned) in which larger batches on a GPU keep what goes into the layers' parts, so that the device
    holds about seven token stores whatever the depth (Mamba-2 of four layers: 14 without); not of the attention of
    `full`, `hyper` and `window`. Nothing on a CPU."""
    options: dict[str, Any] = field(default_factory=dict)
    """The kind's own settings, such as `state` of mamba2."""

    def __post_init__(self) -> None:
        cls = KINDS.get(self.kind)
        if cls is None:
            raise ConfigError(f"context.kind: unknown {self.kind!r}{nearest(self.kind, KINDS)}")
        check_least("context", self, dim=1, depth=1, summary=0, segment=1, keep_tokens=0, budget_gib=0, host_gib=0)
        if self.order not in ("hilbert", "raster", "snake"):
            raise ConfigError(f"context.order: got {self.order!r}{nearest(self.order, ('hilbert', 'raster', 'snake'))}")
        if self.heads is not None and self.heads < 1:
            raise ConfigError(f"context.heads: expected at least 1, got {self.heads}")
        if not 0 < self.mlp_ratio < math.inf or round(self.dim * self.mlp_ratio) < 1:
            raise ConfigError(
                f"context.mlp_ratio: expected more than 0, and a hidden width of at least 1 at dim {self.dim}, got "
                f"{self.mlp_ratio}"
            )
        cls.check_config(self)


def check_least(section: str, settings: object, **least: int) -> None:
    """Refuse settings below their least value; None is no value.

    Raises:
        ConfigError: the first of them.
    """
    for name, bound in least.items():
        value = getattr(settings, name)
        if value is not None and not bound <= value < math.inf:
            raise ConfigError(f"{section}.{name}: expected at least {bound}, got {value}")


@dataclass(kw_only=True)
class NoOptions:
    """`context.options` of a kind that has none."""


class ContextEncoder(nn.Module, ABC):
    """The tokens of a whole scene in, their context out: one token for each, which depends on all others.

    A subclass is built from a `ContextConfig`, implements `encode`, and is made known by `register_context`.
    Input arrives in `encode` checked. `LayeredContext` is the usual way: it needs only a mixer.
    """

    options_class: ClassVar[type] = NoOptions
    """A keyword-only dataclass that `config.options` must fit."""

    def __init__(self, config: ContextConfig) -> None:
        super().__init__()
        self.config = config

    @classmethod
    def check_config(cls, config: ContextConfig) -> None:
        """Called by `ContextConfig` for its kind; extend it by what the kind asks for.

        Raises:
            ConfigError: an unknown option, or settings that do not go together.
        """
        from_dict(cls.options_class, config.options, "context.options")

    @property
    def causal(self) -> bool:
        """Whether a state is returned and accepted, because no token depends on later ones."""
        return False

    def forward(
        self, tokens: Tensor, coords: Tensor, validity: Tensor | None = None, state: ContextState | None = None
    ) -> tuple[Tensor, ContextState | None]:
        """The context of tokens, checked on the way in.

        Args:
            tokens: (batch, tokens, dim), floating point, in any order.
            coords: (batch, tokens, 2) as (row, col) on the token lattice; fractional ones allowed (overview tokens).
            validity: (batch, tokens) bool. A masked token changes nothing, whatever its values, and comes out as zeros.
            state: what the last call returned for the part of the scene ahead of this one; only where `causal`.

        Returns:
            Tokens like those given, and the state after the last token (None where not `causal`).

        Raises:
            DataError: zero tokens, a batch row that is masked as a whole, coordinates that are not on the lattice
                (negative, not finite), or an overflow of float16.
            ConfigError: shapes that do not fit each other or `dim`, or a state that this encoder cannot continue: one
                of another encoder, of another batch, or of a part of the scene that does not lie ahead of this one.
        """
        _check_shapes(tokens, coords, validity, self.config.dim)
        check_places(coords, validity)
        if state is not None and not self.causal:
            raise ConfigError(
                f"context: kind {self.config.kind!r} with bidirectional={self.config.bidirectional}, "
                f"summary={self.config.summary} and alternate={self.config.alternate} cannot continue from a state: it "
                "needs a recurrent kind, bidirectional=False, summary=0 and alternate=False"
            )
        result, state = self.encode(tokens, coords, validity, state)
        if _computes_in_float16(tokens) and not result.isfinite().all():
            raise DataError(
                "context: inf or NaN came out of float16, whose largest number is 65504: use bfloat16 or float32"
            )
        return result, state

    @abstractmethod
    def encode(
        self, tokens: Tensor, coords: Tensor, validity: Tensor | None, state: ContextState | None
    ) -> tuple[Tensor, ContextState | None]:
        """`forward` on checked input."""


class NoContext(ContextEncoder):
    """Tokens come out as they went in: the baseline that shows what context is worth. Costs nothing."""

    def encode(
        self, tokens: Tensor, coords: Tensor, validity: Tensor | None, state: ContextState | None
    ) -> tuple[Tensor, ContextState | None]:
        """See `ContextEncoder.forward`."""
        return (tokens if validity is None else tokens.masked_fill(~validity.unsqueeze(-1), 0)), None


KINDS: dict[str, type[ContextEncoder]] = {"none": NoContext}
"""What `kind` may be; `register_context` adds to it."""


def register_context(name: str, cls: type[ContextEncoder]) -> None:
    """Make `kind: name` mean `cls`, a ContextEncoder that is built from a ContextConfig.

    Raises:
        ConfigError: the name is taken by another class.
    """
    if KINDS.setdefault(name, cls) is not cls:
        raise ConfigError(f"context kind {name!r} is already {KINDS[name].__name__}: choose another name")


def build_context(config: ContextConfig) -> ContextEncoder:
    """The encoder that `config` describes, freshly initialised."""
    return KINDS[config.kind](config)


def _computes_in_float16(tokens: Tensor) -> bool:
    kind = tokens.device.type
    autocast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16
    return autocast or tokens.dtype == torch.float16


def _check_shapes(tokens: Tensor, coords: Tensor, validity: Tensor | None, dim: int) -> None:
    if tokens.ndim != 3 or tokens.shape[-1] != dim or not tokens.is_floating_point():
        raise ConfigError(
            f"context: expected floating-point tokens (batch, tokens, {dim}), got {tuple(tokens.shape)} of "
            f"{tokens.dtype}: `context.dim` must be the width of the tokens"
        )
    if 0 in tokens.shape:
        raise DataError(f"context: expected at least one token, got {tuple(tokens.shape)}: leave empty images out")
    expected = tokens.shape[:2]
    if coords.shape != (*expected, 2):
        raise ConfigError(f"context: expected coords {(*expected, 2)} as (row, col), got {tuple(coords.shape)}")
    if validity is not None and (validity.shape != expected or validity.dtype != torch.bool):
        raise ConfigError(
            f"context: expected validity {tuple(expected)} of bool, got {tuple(validity.shape)} of {validity.dtype}"
        )
