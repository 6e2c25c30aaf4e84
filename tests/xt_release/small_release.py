"""Small models with published names and random weights, as the release would have saved them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

import gigaxt
from gigaxt.xt_release.config import model_config
from gigaxt.xt_release.published import PublishedConfig
from gigaxt.xt_release.weights import published_names

SWIN = {"img_size": 32, "embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 1, 2], "window_size": 4}
"""Regions of 32 px, one token of 64 channels each."""


def section(**context: Any) -> dict[str, Any]:
    """A section `model`; without settings of the context that of a `cls_head: naive`."""
    full = {"n_layer": 2, "hidden_size": 128, "attention_method": "hyper", "in_context_patches": -1, **context}
    return {
        "backbone_class": "swinv2_tiny_window16_256_timm",
        "backbone": {"input_size": 32, "drop_path_rate": 0.2},
        "num_classes": 5,
        "cls_head": "xl" if context else "naive",
        "mlp_ratio": 4,
        "context": full,
    }


def random_state(model: dict[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """Weights of a model under their published names, all of them away from their first values."""
    config = model_config(PublishedConfig({"model": model}), SWIN)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        fresh = gigaxt.build_model(config)
        names = published_names(fresh)
        own = fresh.state_dict()
        return {name: own[mine] + 0.1 * torch.randn(own[mine].shape) for name, mine in names.items()}


def released(
    folder: Path, model: dict[str, Any], seed: int = 0, **sections: Any
) -> tuple[gigaxt.GigaXT, dict[str, Tensor]]:
    """A model that went through a file, and the weights in it; `sections` are others of its config, such as `data`."""
    state, config = random_state(model, seed), {"model": model, **sections}
    save_file(state, folder / "weights.safetensors")
    return gigaxt.from_xt_release(folder / "weights.safetensors", config, backbone_overrides=SWIN), state
