"""Where a run's weights come from when it starts from a model instead of at random."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from gigaxt.errors import CheckpointError

HEAD = "head."
"""Prefix of the weights that may have another shape: other classes are another last layer."""


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
