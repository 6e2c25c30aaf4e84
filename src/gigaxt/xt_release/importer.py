"""`gigaxt.from_xt_release`: a published checkpoint and its config to a model like any other."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gigaxt.nn.xt import GigaXT, build_model
from gigaxt.xt_release.config import model_config
from gigaxt.xt_release.published import PublishedConfig
from gigaxt.xt_release.weights import load_state, read_state


def from_xt_release(
    weights: str | Path,
    config: str | Path | Mapping[str, Any],
    *,
    backbone_overrides: Mapping[str, Any] | None = None,
) -> GigaXT:
    """A published xT model (bair-climate-initiative/xT): same weights in, same logits out.

    `model(images)` on a normalised float tensor (B, 3, H, W), H = W a multiple of the config's `input_size`, gives the
    published logits. Beyond the release the model takes images of any size, streams, trains, saves and loads like
    every other one.

    Args:
        weights: a `.ckpt` of the release, or safetensors with its names; with or without their `module.` prefix.
        config: the published YAML (its `base_configs` are looked for beside it and above), or its content.
        backbone_overrides: arguments of the timm model that differ from the published backbone's.

    Returns:
        The model, on the CPU, in evaluation mode. Its `input` makes images ready as the release's evaluation does:
        squashed to the config's `data.crop_size`, if it says one, and normalised. Tensors are taken as they are.

    Raises:
        ConfigError: a config that cannot be read, or that the release itself could not run or not reproduce.
        CheckpointError: a file that cannot be read or holds code, or weights that do not fit the config, listed.
    """
    published = PublishedConfig(config) if isinstance(config, Mapping) else PublishedConfig.read(config)
    settings = model_config(published, backbone_overrides)
    state = read_state(weights)
    model = build_model(settings)
    load_state(model, state, str(weights))
    return model.eval()
