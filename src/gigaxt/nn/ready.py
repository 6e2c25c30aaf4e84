"""Ready modules: what stands in for a section of the config, and whether a given module can.

`gigaxt.build_model` says what each must offer. Attributes are looked at when the model is built, what `forward` returns
at every call: a tensor of another shape could pass through the rest and give a wrong answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from gigaxt.errors import ConfigError
from gigaxt.nn.heads.scene import SceneHead

if TYPE_CHECKING:
    from gigaxt.nn.xt import ModelConfig


class Ready(NamedTuple):
    """Modules that a model is given; None: the section builds its own."""

    region_encoder: nn.Module | None = None
    context: nn.Module | None = None
    head: nn.Module | None = None

    def given(self) -> dict[str, nn.Module]:
        """Section -> module."""
        return {section: module for section, module in self._asdict().items() if module is not None}

    def names(self) -> dict[str, str]:
        """Section -> dotted name of the module's class, for people."""
        return {section: f"{type(m).__module__}.{type(m).__qualname__}" for section, m in self.given().items()}


NONE_READY = Ready()


def check_ready(ready: Ready, config: ModelConfig) -> None:
    """Refuse modules that cannot stand in for their section.

    Raises:
        ConfigError: no nn.Module, attributes missing or out of range, a width that is not the config's.
    """
    for section, module in ready.given().items():
        if not isinstance(module, nn.Module):
            raise ConfigError(f"{section}: expected a ready nn.Module, got {module!r}")
    dense = config.head.kind != "classify"
    if ready.region_encoder is not None:
        _check_region_encoder(ready.region_encoder, config, dense)
    if ready.context is not None:
        dim = getattr(ready.context, "dim", None) or getattr(getattr(ready.context, "config", None), "dim", None)
        if dim not in (None, config.context.dim):
            raise ConfigError(
                f"context.dim: the ready {_name(ready.context)} has dim {dim}, the config {config.context.dim}: "
                "make them equal"
            )
    if ready.head is not None:
        methods: tuple[str, ...] = ("loss_sums", "loss", "scores", "as_target", "shapes") if dense else ("loss",)
        if config.head.kind == "mask_rcnn":
            if not isinstance(ready.head, SceneHead):
                raise ConfigError(
                    "head: a ready module for kind `mask_rcnn` must be a gigaxt.nn.heads.scene.SceneHead, "
                    f"{_name(ready.head)} is none"
                )
            methods = ()  # an abstract one could not have been made
        missing = [method for method in methods if not callable(getattr(ready.head, method, None))]
        if missing:
            raise ConfigError(
                f"head: a ready module for kind `{config.head.kind}` needs a method `{missing[0]}`, "
                f"{_name(ready.head)} has none"
            )


def check_encoded(found: Any, encoder: Any, regions: int, region: int, maps: bool) -> None:
    """What a region encoder returned: tokens (regions, t, t, dim), and feature maps where they are wanted.

    Raises:
        ConfigError: something else.
    """
    t, dim = encoder.tokens_per_side, encoder.dim
    if not isinstance(found, tuple) or len(found) != 2:
        raise ConfigError(f"region_encoder: expected (tokens, feature maps), got {_shown(found)}")
    tokens, features = found
    _check_shape("region_encoder: expected tokens", tokens, (regions, t, t, dim))
    if not maps:
        return
    if len(features) != len(encoder.map_strides):
        raise ConfigError(f"region_encoder: expected {len(encoder.map_strides)} feature maps, got {len(features)}")
    for feature, channels, stride in zip(features, encoder.map_channels, encoder.map_strides, strict=True):
        _check_shape("region_encoder: expected a feature map", feature, (regions, channels, *2 * (region // stride,)))


def check_context_output(found: Any, tokens: Tensor, *, all_of_them: bool) -> None:
    """What a context returned: (tokens like those given, state).

    Args:
        found: what it returned.
        tokens: what it was given, (B, N, dim).
        all_of_them: whether there must be as many tokens as were given.

    Raises:
        ConfigError: something else.
    """
    if not isinstance(found, tuple) or len(found) != 2:
        raise ConfigError(f"context: expected (tokens, state), got {_shown(found)}")
    context = found[0]
    fewer_allowed = not all_of_them and isinstance(context, Tensor) and context.ndim == 3
    count = context.shape[1] if fewer_allowed else tokens.shape[1]
    _check_shape("context: expected tokens", context, (tokens.shape[0], count, tokens.shape[2]))


def check_logits(found: Any, shape: Sequence[int]) -> None:
    """What a head returned.

    Raises:
        ConfigError: another shape.
    """
    _check_shape("head: expected logits", found, shape)


def check_answers(found: Any, regions: int, shapes: Sequence[tuple[int, int, int]]) -> None:
    """What a dense head returned: maps of these shapes, one a region.

    Raises:
        ConfigError: something else.
    """
    maps = (found,) if isinstance(found, Tensor) else tuple(found)
    if len(maps) != len(shapes):
        raise ConfigError(f"head: expected {len(shapes)} maps, got {len(maps)}")
    for answer, shape in zip(maps, shapes, strict=True):
        _check_shape("head: expected a map", answer, (regions, *shape))


def check_sums(found: Any) -> None:
    """What a dense head's `loss_sums` returned.

    Raises:
        ConfigError: no tuple of tensors in float64.
    """
    good = isinstance(found, tuple) and found and all(isinstance(t, Tensor) for t in found)
    if not good or any(t.dtype != torch.float64 for t in found):
        raise ConfigError(
            "head: expected `loss_sums` to return a tuple of sums in float64, got "
            f"{', '.join(map(_shown, found)) if isinstance(found, tuple) else _shown(found)}"
        )


def _check_region_encoder(encoder: nn.Module, config: ModelConfig, dense: bool) -> None:
    wanted = ["dim", "tokens_per_side", *(("map_channels", "map_strides") if dense else ())]
    missing = [f"`{name}`" for name in wanted if not hasattr(encoder, name)]
    if missing:
        raise ConfigError(
            f"region_encoder: a ready module for kind `{config.head.kind}` needs the attributes "
            f"{', '.join(f'`{name}`' for name in wanted)}; {_name(encoder)} lacks {', '.join(missing)}"
        )
    for name in ("dim", "tokens_per_side"):
        value = getattr(encoder, name)
        if not isinstance(value, int) or value < 1:
            raise ConfigError(f"region_encoder: expected `{name}` to be a whole number of at least 1, got {value!r}")
    if not dense:
        return
    channels, strides = (list(getattr(encoder, name)) for name in ("map_channels", "map_strides"))
    if not strides or len(channels) != len(strides):
        raise ConfigError(
            f"region_encoder: expected `map_channels` and `map_strides` of one length, at least 1, got {channels} and "
            f"{strides}"
        )
    for stride in strides:
        if config.region_encoder.region % stride or config.input.halo % stride:
            raise ConfigError(
                f"region_encoder: a stride of {stride} px does not divide regions of {config.region_encoder.region} px "
                f"with a halo of {config.input.halo} px: change `map_strides`, `region` or `input.halo`"
            )


def _check_shape(what: str, found: Any, shape: Sequence[int]) -> None:
    if not isinstance(found, Tensor) or tuple(found.shape) != tuple(shape):
        raise ConfigError(f"{what} {tuple(shape)}, got {_shown(found)}")


def _shown(value: Any) -> str:
    return (
        f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
        if isinstance(value, Tensor)
        else type(value).__name__
    )


def _name(module: nn.Module) -> str:
    return type(module).__name__
