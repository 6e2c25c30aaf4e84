"""Any timm network as a source of feature maps: built for one region size, checked by a dry run, refused with a reason.

timm accepts some input sizes that its networks do not cover exactly: a ViT with 14 px patches drops 4 px of 256, a Swin
pads its windows with zeros that draw attention. A region encoder must map every pixel alike, so each size is tried on
the meta device (shapes only, no arithmetic) before the real network is built.
"""

from __future__ import annotations

import contextlib
import difflib
import json
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import timm
import torch
from timm.models import FeatureInfo
from torch import Tensor, nn

from gigaxt.errors import ConfigError

REGION_STEP = 32
"""Region sizes are multiples of this, px."""

SEARCH_STEPS = 16
"""How many region sizes above and below a refused one are tried for the message."""

_OWN_KEYS = {
    "in_chans": "region_encoder.in_channels",
    "img_size": "region_encoder.region",
    "pretrained": "region_encoder.pretrained",
    "checkpoint_path": "region_encoder.pretrained",  # early versions of timm 1 unpickle it
    "features_only": "nothing: it is always on",
    "device": "model.to(device)",
}


@dataclass(kw_only=True, frozen=True)
class BackboneSpec:
    """What to ask timm for."""

    name: str
    in_channels: int
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True, frozen=True)
class Layout:
    """What a dry run shows of a network's feature maps, fine to coarse."""

    channels: tuple[int, ...]
    strides: tuple[int, ...]
    """px of the region per cell"""
    channels_last: bool
    """maps come as (n, h, w, channels)"""
    depth: int
    """how many maps the network could give"""
    plain: bool
    """all maps of the network have one stride, as in a plain ViT"""


_EXAMINED: dict[Hashable, Layout] = {}
"""What dry runs have shown, by `_key`: they take longer than building and running a small network."""


class InadmissibleError(Exception):
    """A region size that the backbone does not cover exactly; the text says why."""


def build_backbone(spec: BackboneSpec, region: int, *, pretrained: bool = False) -> tuple[nn.Module, Layout]:
    """Build the timm network for `region` x `region` px.

    A plain network (one stride) gives four maps from evenly spaced blocks, unless `options` has `out_indices`.

    Args:
        spec: the network.
        region: px on a side, a multiple of 32.
        pretrained: load timm's weights (from its cache or the network).

    Returns:
        The module, (n, in_channels, region, region) -> list of feature maps in timm's layout, and their layout.

    Raises:
        ConfigError: an unknown name or option, a region size that the network does not cover, no weights.
    """
    check_name(spec.name)
    for key in spec.options:
        if key in _OWN_KEYS:
            raise ConfigError(f"region_encoder.options.{key}: not an option here; set {_OWN_KEYS[key]}")
    try:
        layout = examine(spec, region)
    except InadmissibleError as reason:
        raise ConfigError(_refusal(spec, region, str(reason))) from None
    if layout.plain and "out_indices" not in spec.options:
        spec = BackboneSpec(
            name=spec.name,
            in_channels=spec.in_channels,
            options={**spec.options, "out_indices": [layout.depth * (k + 1) // 4 - 1 for k in range(4)]},
        )
        layout = examine(spec, region)
    return create(spec, region, pretrained=pretrained), layout


def check_name(name: str) -> None:
    """Refuse a name, or a tag of published weights after a dot, that timm does not know, with the nearest that it does.

    Raises:
        ConfigError: as said; `hf-hub:` and `local-dir:` names are left to timm.
    """
    if ":" in name:
        return
    stem = name.split(".")[0]
    if timm.is_model(stem):
        tagged = timm.list_pretrained(f"{stem}.*")
        if "." in name and name not in tagged:
            raise ConfigError(
                f"region_encoder.name: timm {timm.__version__} knows no weights `{name}`; known: {', '.join(tagged)}"
            )
        return
    known = timm.list_models()
    near = [other for other in known if other.startswith(stem)][:3] or difflib.get_close_matches(stem, known, n=3)
    hint = f"did you mean {', '.join(f'`{other}`' for other in near)}?" if near else "`timm.list_models()` lists them"
    raise ConfigError(f"region_encoder.name: timm {timm.__version__} has no model `{name}`; {hint}")


def create(
    spec: BackboneSpec, region: int | None, *, features: bool = True, pretrained: bool = False, meta: bool = False
) -> nn.Module:
    """The timm network, as feature maps or whole (`features=False`, without a classifier), with its errors in one line.

    Args:
        spec: the network.
        region: px on a side; None for the network's own size.
        features: return feature maps; otherwise the network as timm defines it, weights under their published names.
        pretrained: load timm's weights.
        meta: build shapes only.

    Raises:
        ConfigError: whatever timm raises.
    """
    options = dict(spec.options)
    if features:
        options["features_only"] = True
    else:
        options.pop("out_indices", None)
        options["num_classes"] = 0
    if region is not None and _wants_img_size(spec.name):
        options["img_size"] = (region, region)  # Hiera of timm 1.0.3 takes no single number
    try:
        build = partial(timm.create_model, spec.name, pretrained=pretrained, in_chans=spec.in_channels, **options)
        module: nn.Module = _on_meta(build) if meta else build()
    except TypeError as error:
        raise ConfigError(f"region_encoder.options: {spec.name} refuses them: {useful_line(error)}") from error
    except Exception as error:  # timm raises AssertionError, RuntimeError, KeyError, OSError and its hub's own
        if pretrained:
            raise ConfigError(
                f"region_encoder.pretrained: timm's weights for `{spec.name}` cannot be had ({useful_line(error)}); "
                "give a local file (`pretrained: weights.safetensors`) or `pretrained: false`"
            ) from error
        raise ConfigError(f"region_encoder: {spec.name} cannot be built: {useful_line(error)}") from error
    return module


def _on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    """Build shapes only; older versions of timm (1.0.15 was seen) compute with values while they build."""
    try:
        with torch.device("meta"):
            return build()
    except RuntimeError:  # a value was asked for (NotImplementedError, too), and the meta device has none
        # Built for real, then, which raises again whatever else was wrong. A probe must not shift the numbers that the
        # real network is drawn from.
        with torch.random.fork_rng(devices=[]):
            return build().to("meta")


def _wants_img_size(name: str) -> bool:
    config = None if ":" in name else timm.get_pretrained_cfg(name)
    return config is None or bool(config.fixed_input_size)


def examine(spec: BackboneSpec, region: int) -> Layout:
    """Build the network on the meta device, run it on one region and check its maps; once in a process.

    Raises:
        ConfigError: a wrong option.
        InadmissibleError: the network does not cover this region size.
    """
    key = _key(spec, region)
    if key is None:
        return _examine(spec, region)
    if key not in _EXAMINED:
        _EXAMINED[key] = _examine(spec, region)
    return _EXAMINED[key]


def _key(spec: BackboneSpec, region: int) -> Hashable | None:
    """All that a layout depends on; None if it cannot be known, as with a file or an object, which may change."""
    if not timm.is_model(spec.name.split(".")[0]):  # a file, or a name that timm refuses
        return None
    try:
        options = json.dumps(dict(spec.options), sort_keys=True)
    except TypeError:
        return None
    return timm.model_entrypoint(spec.name), spec.name, spec.in_channels, options, region


def _examine(spec: BackboneSpec, region: int) -> Layout:
    try:
        module = create(spec, region, meta=True)
    except ConfigError as error:
        if _builds_at_own_size(spec):
            raise InadmissibleError(str(error)) from None
        raise
    shapes = _dry_run(module, spec.in_channels, region)
    info = cast(FeatureInfo, module.feature_info)
    channels, strides = info.channels(), info.reduction()
    sides = []
    for stride in strides:
        if region % stride:
            raise InadmissibleError(f"its stride of {stride} px leaves {region % stride} px of {region} out")
        sides.append(region // stride)
    channels_last = find_layout(shapes, channels, sides)
    if channels_last is None:  # channels == side in every map: at twice the size they differ
        shapes = _dry_run(create(spec, 2 * region, meta=True), spec.in_channels, 2 * region)
        channels_last = find_layout(shapes, channels, [2 * side for side in sides])
    _check_windows(module)
    reductions = [one["reduction"] for one in info.info]
    return Layout(
        channels=tuple(channels),
        strides=tuple(strides),
        channels_last=bool(channels_last),
        depth=len(reductions),
        plain=len(reductions) > 1 and len(set(reductions)) == 1,
    )


def find_layout(shapes: Sequence[Sequence[int]], channels: Sequence[int], sides: Sequence[int]) -> bool | None:
    """Whether feature maps have their channels last.

    One map with `channels == side` fits both layouts; all maps of a network share one, so any other map decides.

    Args:
        shapes: of each map.
        channels: of each map, as timm states them.
        sides: cells on a side of each map, as they must be.

    Returns:
        True for (n, h, w, c), False for (n, c, h, w), None where every map fits both.

    Raises:
        InadmissibleError: a map fits neither, or two maps contradict each other.
    """
    possible = {True, False}
    for shape, c, side in zip(shapes, channels, sides, strict=True):
        fits = {last for last in (True, False) if tuple(shape[1:]) == ((side, side, c) if last else (c, side, side))}
        if not fits & possible:
            raise InadmissibleError(
                f"a feature map of shape {tuple(shape[1:])} came where {c} x {side} x {side} was due"
            )
        possible &= fits
    return possible.pop() if len(possible) == 1 else None


def _dry_run(module: nn.Module, in_channels: int, region: int) -> list[tuple[int, ...]]:
    try:
        with torch.no_grad():
            maps: list[Tensor] = module.eval()(torch.empty(1, in_channels, region, region, device="meta"))
    except Exception as error:
        raise InadmissibleError(useful_line(error)) from None
    return [tuple(m.shape) for m in maps]


def _check_windows(module: nn.Module) -> None:
    """Refuse attention windows that do not divide their grid (Swin V1 and V2, Hiera).

    timm pads such grids. The padding takes part in the softmax of border windows, and as Swin's grid is rolled first,
    the mask that keeps opposite borders apart sits at the wrong cells (seen: a grid of 36, windows of 16, shift 8).
    """
    blocks: list[tuple[Any, Any]] = [
        (block.input_resolution, block.window_size)
        for block in module.modules()
        if hasattr(block, "shift_size") and hasattr(block, "input_resolution") and hasattr(block, "window_size")
    ]
    for grid, window in blocks:
        if any(g % w for g, w in zip(grid, window, strict=True)):
            sides = [side for other, _ in blocks for side in other]
            fits = [w for w in range(1, 2 * window[0]) if not any(side % min(w, side) for side in sides)]
            raise InadmissibleError(
                f"its windows of {window[0]} x {window[1]} cells do not divide a grid of {grid[0]} x {grid[1]} "
                f"(`options: {{window_size: {min(fits, key=lambda w: abs(w - window[0]))}}}` would)"
            )
    for hiera in module.modules():
        grid, unit = getattr(hiera, "tokens_spatial_shape", ()), getattr(hiera, "mask_unit_size", ())
        if grid and unit and any(g % u for g, u in zip(grid, unit, strict=True)):
            raise InadmissibleError(f"its mask units of {unit[0]} x {unit[1]} do not divide {grid[0]} x {grid[1]}")


def _builds_at_own_size(spec: BackboneSpec) -> bool:
    try:
        create(spec, None, meta=True)
    except ConfigError:
        return False
    return True


def _refusal(spec: BackboneSpec, region: int, reason: str) -> str:
    near = [size for size in (_nearest(spec, region, -REGION_STEP), _nearest(spec, region, REGION_STEP)) if size]
    if not near:
        return (
            f"region_encoder: {spec.name} cannot run with {dict(spec.options)} and regions near {region} px: {reason}"
        )
    fits = " and ".join(map(str, near))
    return f"region_encoder.region: {spec.name} does not admit {region} px: {reason}; nearest sizes that fit: {fits}"


def _nearest(spec: BackboneSpec, region: int, step: int) -> int | None:
    for size in range(region + step, region + step * (SEARCH_STEPS + 1), step):
        if size < REGION_STEP:
            return None
        with contextlib.suppress(InadmissibleError, ConfigError):
            examine(spec, size)
            return size
    return None


def useful_line(error: BaseException) -> str:
    """The most useful line of an exception: of a failed load the first mismatch, else the first line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    mismatch = [line for line in lines if line.startswith("size mismatch")]
    return (mismatch or lines or [type(error).__name__])[0]
