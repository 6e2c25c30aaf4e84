"""Parameter groups, timm's optimisers, and the learning rate as a function of the step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from gigaxt.errors import ConfigError
from gigaxt.training.config import TrainConfig

ENCODER = "encode.encoder."
"""Prefix of the region encoder's parameters in a model."""

FUSED = ("adam", "adamw")
"""Of timm's optimisers, those that PyTorch has fused."""


def parameter_groups(model: nn.Module, config: TrainConfig) -> list[dict[str, Any]]:
    """Trainable parameters in up to four groups: region encoder or rest, with weight decay or without.

    Without decay: biases, norms and all other parameters of one dimension or none, and those marked with a true
    attribute `_no_weight_decay`.

    Returns:
        Groups for `torch.optim`, each with `name`, `params`, `lr` and `weight_decay`.

    Raises:
        ConfigError: `encoder_lr` is set and the region encoder has nothing to train, or nothing at all is trainable.
    """
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        part = "encoder" if name.startswith(ENCODER) else "rest"
        decays = parameter.ndim > 1 and not getattr(parameter, "_no_weight_decay", False)
        lr = config.encoder_lr if part == "encoder" and config.encoder_lr is not None else config.lr
        group = groups.setdefault(
            f"{part} {'with' if decays else 'without'} decay",
            {"params": [], "lr": lr, "weight_decay": config.weight_decay if decays else 0.0},
        )
        group["params"].append(parameter)
    if not groups:
        raise ConfigError("the model has no trainable parameter; unfreeze something")
    if config.encoder_lr is not None and not any(name.startswith("encoder") for name in groups):
        raise ConfigError("train.encoder_lr is set, but the region encoder has no trainable parameter; remove it")
    return [{"name": name, **group} for name, group in groups.items()]


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """The optimiser `config.optimizer` of timm over `parameter_groups(model)`.

    On CUDA, of PyTorch's own Adam and AdamW the fused kind: one kernel for all parameters in place of one each.
    """
    from timm.optim import create_optimizer_v2  # type: ignore[attr-defined]  # timm does not mark what it exports

    on_cuda = all(parameter.is_cuda for parameter in model.parameters())
    fused: dict[str, Any] = {"fused": True} if on_cuda and config.optimizer in FUSED else {}
    optimizer: torch.optim.Optimizer = create_optimizer_v2(
        parameter_groups(model, config), opt=config.optimizer, lr=config.lr, weight_decay=config.weight_decay, **fused
    )
    return optimizer


def lr_factor(config: TrainConfig, step: int, steps_per_epoch: int) -> float:
    """The share of the peak learning rate that step `step` (from 0) uses; a pure function, so resuming needs no state.

    Linear over the warm-up, reaching 1 at its last step; then constant, or half a cosine down to `lr_floor`.
    """
    warmup = round(config.warmup_epochs * steps_per_epoch)
    if step < warmup:
        return (step + 1) / warmup
    if config.schedule == "constant":
        return 1.0
    rest = max(1, config.epochs * steps_per_epoch - warmup)
    done = min(1.0, (step - warmup) / rest)
    return config.lr_floor + (1 - config.lr_floor) * 0.5 * (1 + math.cos(math.pi * done))


def set_lr(optimizer: torch.optim.Optimizer, config: TrainConfig, step: int, steps_per_epoch: int) -> float:
    """Give every group its learning rate for `step`; returns that of the groups outside the region encoder."""
    factor = lr_factor(config, step, steps_per_epoch)
    for group in optimizer.param_groups:
        own = config.encoder_lr if group["name"].startswith("encoder") else None
        group["lr"] = (config.lr if own is None else own) * factor
    return config.lr * factor
