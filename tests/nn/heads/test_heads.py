from __future__ import annotations

from typing import Any

import pytest

from gigaxt.config import to_dict
from gigaxt.errors import ConfigError
from gigaxt.nn.heads import ClassifyConfig, DetectConfig, SegmentConfig, SegmentHead, build_head, head_config_from_dict


@pytest.mark.parametrize(
    "config",
    [
        ClassifyConfig(classes=3, pooling="mean", class_names=["a", "b", "c"]),
        SegmentConfig(classes=2, class_colors=[(0, 0, 0), (255, 0, 9)], class_weights=[0.5, 2.0], ignore=7),
        DetectConfig(classes=2, strides=[8, 16], category_ids=[3, 7]),
    ],
)
def test_config_is_plain_data(config: ClassifyConfig | DetectConfig | SegmentConfig) -> None:
    data = to_dict(config)
    assert data["kind"] == config.kind
    assert head_config_from_dict(data) == config


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"kind": "segmnt", "classes": 2}, "head.kind: unknown head `segmnt`; did you mean `segment`"),
        ({"kind": "segment", "clases": 2}, "head.clases: unknown key; did you mean `classes`"),
        ({"kind": "classify"}, "missing `classes`"),
        ({"kind": "classify", "classes": 2, "pooling": "max"}, "head.pooling: 'max'"),
        ({"classes": 2}, "expected keys with a `kind`, one of classify, detect, mask_rcnn, points, segment"),
    ],
)
def test_wrong_keys(data: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        head_config_from_dict(data)


def test_build_by_kind() -> None:
    assert isinstance(build_head(SegmentConfig(classes=2), 8, [4, 8], [4, 8]), SegmentHead)
    with pytest.raises(ConfigError, match="feature maps"):
        build_head(SegmentConfig(classes=2), 8)
