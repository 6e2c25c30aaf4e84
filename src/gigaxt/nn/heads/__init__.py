"""Heads: from context (and feature maps) to answers. One file a kind; a kind is known once it stands in `_KINDS`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gigaxt.config import from_dict, nearest
from gigaxt.errors import ConfigError
from gigaxt.nn.heads.classify import ClassifyConfig, ClassifyHead
from gigaxt.nn.heads.detect import DetectConfig, DetectHead
from gigaxt.nn.heads.mask_rcnn import MaskRCNNConfig, MaskRCNNHead
from gigaxt.nn.heads.points import PointsConfig, PointsHead
from gigaxt.nn.heads.segment import SegmentHead
from gigaxt.nn.heads.segment_config import SegmentConfig

HeadConfig = ClassifyConfig | DetectConfig | MaskRCNNConfig | PointsConfig | SegmentConfig
"""The settings of any head; `kind` tells which."""

_KINDS: dict[str, type[HeadConfig]] = {
    "classify": ClassifyConfig,
    "detect": DetectConfig,
    "mask_rcnn": MaskRCNNConfig,
    "points": PointsConfig,
    "segment": SegmentConfig,
}


def head_config_from_dict(data: Mapping[str, Any], where: str = "head") -> HeadConfig:
    """The config of the head that `data["kind"]` names.

    Args:
        data: plain keys and values, as read from YAML or JSON.
        where: dotted path of `data` in the whole config, for messages.

    Raises:
        ConfigError: an unknown kind or key (with the nearest name), or a value out of range.
    """
    if not isinstance(data, Mapping) or "kind" not in data:
        raise ConfigError(f"{where}: expected keys with a `kind`, one of {', '.join(_KINDS)}; got {data!r}")
    kind = str(data["kind"])
    if kind not in _KINDS:
        raise ConfigError(f"{where}.kind: unknown head `{kind}`{nearest(kind, _KINDS)}")
    return from_dict(_KINDS[kind], data, where)


def build_head(
    config: HeadConfig, dim: int, map_channels: Sequence[int] = (), map_strides: Sequence[int] = ()
) -> ClassifyHead | DetectHead | MaskRCNNHead | PointsHead | SegmentHead:
    """The head that `config` describes.

    Args:
        config: its kind chooses the class.
        dim: channels of the context.
        map_channels: channels of the region encoder's feature maps, fine to coarse; dense heads need them.
        map_strides: their strides in px.
    """
    if isinstance(config, ClassifyConfig):
        return ClassifyHead(config, dim)
    if isinstance(config, DetectConfig):
        return DetectHead(config, dim, map_channels, map_strides)
    if isinstance(config, MaskRCNNConfig):
        return MaskRCNNHead(config, dim, map_channels, map_strides)
    if isinstance(config, PointsConfig):
        return PointsHead(config, dim, map_channels, map_strides)
    return SegmentHead(config, dim, map_channels, map_strides)


__all__ = [
    "ClassifyConfig",
    "ClassifyHead",
    "DetectConfig",
    "DetectHead",
    "HeadConfig",
    "MaskRCNNConfig",
    "MaskRCNNHead",
    "PointsConfig",
    "PointsHead",
    "SegmentConfig",
    "SegmentHead",
    "build_head",
    "head_config_from_dict",
]
