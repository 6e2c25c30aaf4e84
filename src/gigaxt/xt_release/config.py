"""What the `model` section of a published config means here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gigaxt.config import nearest
from gigaxt.errors import ConfigError
from gigaxt.nn.backbone import BackboneSpec, examine
from gigaxt.nn.context import ContextConfig
from gigaxt.nn.heads import ClassifyConfig
from gigaxt.nn.region_encoder import RegionEncoderConfig
from gigaxt.nn.xt import ModelConfig
from gigaxt.scenes.inputs import InputConfig
from gigaxt.xt_release.context import KIND, POOLED_KIND
from gigaxt.xt_release.published import PublishedConfig

BACKBONES = {
    **{f"swinv2_{size}_window16_256_timm": f"swinv2_{size}_window16_256" for size in ("tiny", "small", "base")},
    # Its position bias is scaled by the windows that it was pretrained with, which timm keeps under this name.
    "swinv2_large_window16_256_timm": "swinv2_large_window12to16_192to256",
    **{
        f"hiera_{size}{tag}": f"hiera_{size}_224"
        for size in ("tiny", "small", "base", "base_plus")
        for tag in ("", "_224")  # later and at the time of training
    },
    "hiera_base_plus_448": "hiera_base_plus_224",
}
"""`model.backbone_class` of the release -> timm's name."""

FAMILIES = {"swinv2": "swinv2_tiny_window16_256", "hiera": "hiera_base_224"}
"""What `backbone_overrides` start from where the release has no backbone of that name."""

IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def model_config(published: PublishedConfig, backbone_overrides: Mapping[str, Any] | None = None) -> ModelConfig:
    """The `ModelConfig` of a published config.

    Left out are settings that the release reads and drops: `num_heads`, `drop_path_rate`, `in_chans`, `pretrained` of
    the backbone and others (`facts/xt_release.md`, Q1, Q9, B15). timm's own drop path rate of 0.1 holds for Swin.

    Raises:
        ConfigError: missing or unknown settings, or such that the release itself cannot run or not reproduce.
    """
    encoder = _region_encoder(published, dict(backbone_overrides or {}))
    head = ClassifyConfig(classes=published.get("model.num_classes", int), pooling="mean")
    mean = published.get("data.aug.mean", list[float], IMAGENET_MEAN)
    std = published.get("data.aug.std", list[float], IMAGENET_STD)
    return ModelConfig(
        region_encoder=encoder,
        context=_context(published, encoder),
        head=head,
        input=InputConfig(
            # The release normalises pixels in 0..1; here they are in the files' units, uint8.
            mean=[round(255 * value, 6) for value in mean],
            std=[round(255 * value, 6) for value in std],
            # It makes RGB of every picture and, but in training, squashes it to a square.
            rgb=encoder.in_channels == 3,
            resize_px=published.get("data.crop_size", int, 0) or None,
            resize_side="both",
        ),
    )


def _region_encoder(published: PublishedConfig, options: dict[str, Any]) -> RegionEncoderConfig:
    name = published.get("model.backbone_class", str)
    timm_name = BACKBONES.get(name)
    if timm_name is None and options:
        timm_name = next((base for family, base in FAMILIES.items() if name.startswith(family)), None)
    if timm_name is None:
        raise ConfigError(f"{published.name}: model.backbone_class: unknown `{name}`{nearest(name, BACKBONES)}")
    region = published.get("model.backbone.input_size", int, 256)
    side = options.pop("img_size", region)
    if side not in (region, [region, region], (region, region)):
        raise ConfigError(
            f"backbone_overrides: img_size is {side}, but model.backbone.input_size is {region}: make them equal"
        )
    return RegionEncoderConfig(name=timm_name, region=region, in_channels=options.pop("in_chans", 3), options=options)


def _context(published: PublishedConfig, encoder: RegionEncoderConfig) -> ContextConfig:
    ratio = float(published.get("model.mlp_ratio", int, 4))
    kind = published.get("model.cls_head", str, "naive")
    share = published.get("model.context.grad_ratio", float, 1.0)
    if share < 1:
        raise ConfigError(
            f"{published.name}: model.context.grad_ratio is {share:g}: below 1 the release shuffles the regions at "
            "random, so there are no logits to reproduce; set it to 1 for regions in their places"
        )
    if kind == "naive":
        spec = BackboneSpec(name=encoder.name, in_channels=encoder.in_channels, options=encoder.options)
        dim = examine(spec, encoder.region).channels[-1]
        return ContextConfig(kind=POOLED_KIND, dim=dim, depth=1, summary=0, mlp_ratio=ratio)
    if kind != "xl":
        raise ConfigError(f"{published.name}: model.cls_head: got {kind!r}{nearest(kind, ('naive', 'xl'))}")
    attention = published.get("model.context.attention_method", str, "hyper")
    return ContextConfig(
        kind=KIND,
        dim=published.get("model.context.hidden_size", int, 768),
        depth=published.get("model.context.n_layer", int, 12),
        summary=0,
        order="raster",
        bidirectional=attention != "hyper",
        mlp_ratio=ratio,
        options={
            "attention": attention,
            "window": max(0, published.get("model.context.in_context_patches", int, -1)),
        },
    )
