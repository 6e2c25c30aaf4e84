"""A run's model as it is before the first step: built, given weights to start from, and what of it learns."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from gigaxt.errors import CheckpointError
from gigaxt.nn.freezing import freeze
from gigaxt.nn.xt import GigaXT, build_model
from gigaxt.token_cache import TokenCache
from gigaxt.training.config import RunConfig

HEAD = "head."
"""Prefix of the weights that may have another shape: other classes are another last layer."""


def first_model(config: RunConfig, *, continued: bool) -> tuple[GigaXT, list[str]]:
    """A run's model as it is before the first step, with what of it does not learn.

    Args:
        config: of the run.
        continued: a checkpoint will give it its weights, so that none are loaded here.

    Returns:
        The model, and the weights that differ in shape from those of `train.init` and so start at random.

    Raises:
        ConfigError: settings that do not go together. CheckpointError: `train.init` has no model that fits.
    """
    settings, wanted = config.train, config.model
    if settings.init is not None or continued:  # better weights than the pretrained ones
        wanted = replace(wanted, region_encoder=replace(wanted.region_encoder, pretrained=False))
    model = build_model(wanted)
    model.config, model.streaming, model.grad_share = config.model, settings.streaming, settings.grad_share
    fresh = [] if settings.init is None or continued else start_from(model, Path(settings.init))
    if settings.encoder != "full":
        freeze(model.encode, settings.encoder, settings.last_n)
    cache = settings.token_cache
    model.token_cache = None if cache is None else TokenCache(cache, settings.token_cache_gib)
    return model, fresh


def what_learns(model: nn.Module, config: RunConfig) -> tuple[str, str]:
    """For the first lines of a run: the number of weights, and of those that learn; and what is unwise about it."""
    settings, count = config.train, sum(p.numel() for p in model.parameters())
    learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if learning == count:
        return f"{count / 1e6:.2f} M weights", ""
    part = settings.encoder + (f" {settings.last_n}" if settings.encoder == "last_n" else "")
    weights = f"{count / 1e6:.2f} M weights of which {learning / 1e6:.2f} M learn (region encoder: {part})"
    if settings.init is None and not config.model.region_encoder.pretrained:
        return weights, (
            "the region encoder is frozen at random weights: set model.region_encoder.pretrained or train.init, "
            "or let it learn (train.encoder full)"
        )
    if settings.encoder == "frozen" and settings.token_cache is None and config.model.head.kind == "classify":
        return weights, "the region encoder is frozen: train.token_cache FOLDER computes each image's tokens only once"
    return weights, ""


def start_from(model: nn.Module, folder: Path) -> list[str]:
    """Give `model` the weights of a model folder.

    Returns:
        Weights of the head that have another shape there and were left as they are.

    Raises:
        CheckpointError: the folder has no model, or one of another architecture.
    """
    path = folder / "model.safetensors"
    try:
        weights = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"train.init: {path}: cannot read the weights: {error}") from error
    own = model.state_dict()
    different = sorted(name for name in own.keys() & weights.keys() if own[name].shape != weights[name].shape)
    wrong = [*sorted(own.keys() ^ weights.keys()), *(name for name in different if not name.startswith(HEAD))]
    if wrong:
        raise CheckpointError(
            f"train.init: {len(wrong)} weights of {folder} do not fit the config's `model`: {', '.join(wrong[:4])}"
            f"{', ...' if len(wrong) > 4 else ''}; leave sections of `model` out, or copy those of {folder}/config.json"
        )
    with torch.no_grad():
        for name in own.keys() - set(different):
            own[name].copy_(weights[name])
    return different
