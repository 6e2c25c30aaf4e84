"""Models of a few thousand weights, for tests of what is done with a model."""

from __future__ import annotations

from typing import Any

import torch

from gigaxt import GigaXT, ModelConfig, build_model


def tiny_model(
    head: dict[str, Any], *, bands: int = 3, seed: int = 0, region: int = 64, context: str = "mamba2", **given: Any
) -> GigaXT:
    """Random weights, regions of 64 px, in evaluation mode; `given` is the config's section `input`."""
    config = {
        "region_encoder": {
            "name": "convnextv2_atto",
            "region": region,
            "in_channels": bands,
            "options": {"depths": [1, 1, 1, 1], "dims": [8, 8, 8, 16]},
        },
        "context": {"kind": context, "dim": 16, "depth": 1, "summary": 2},
        "head": head,
        "input": given,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build_model(ModelConfig.from_dict(config)).eval()


def segmenter(*, classes: int = 4, bands: int = 3, head: dict[str, Any] | None = None, **given: Any) -> GigaXT:
    """A class for every pixel. Its bias is set so that no class wins everywhere."""
    model = tiny_model({"kind": "segment", "classes": classes, "dim": 8, **(head or {})}, bands=bands, **given)
    noise = torch.rand(1, bands, 128, 128, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.head.classifier.shared.bias -= model(noise).mean((0, 2, 3))
    return model


def classifier(**head: Any) -> GigaXT:
    """Three classes for the whole image, or what `head` says."""
    return tiny_model({"kind": "classify", "classes": 3, "class_names": ["ash", "oak", "yew"], **head})
