"""Checkpoint files of the release, and the names of their weights."""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from torch import Tensor

from gigaxt.errors import CheckpointError
from gigaxt.xt_release.context import POOLED_KIND

if TYPE_CHECKING:
    from gigaxt.nn.xt import GigaXT

_ENCODER = {"encode.encoder.trunk.model.": "encoder.model.", "encode.encoder.trunk.": "encoder.model."}
CLASS_TOKEN_NAMES = {
    **_ENCODER,
    "encode.project.": "decoder.input_proj.",
    "context.": "decoder.",
    "head.norm.": "decoder.cls.0.",
    "head.classifier.": "decoder.cls.1.",
}
POOLED_NAMES = {
    **_ENCODER,
    "head.expand.": "decoder.layers.0.",
    "head.norm.": "decoder.layers.2.",
    "head.classifier.": "decoder.layers.3.",
}
"""Prefix of our weights -> prefix of the published ones; the first that fits holds (timm wraps Hiera, not Swin)."""

MOST_NAMED = 20
"""Weights of a kind that an error names one by one."""


def read_state(path: str | Path) -> dict[str, Tensor]:
    """The weights of a checkpoint, without the `module.` of distributed training. No code in it is ever run.

    Args:
        path: what the release's `torch.save` wrote, or a safetensors file of the same names; told apart by content.

    Raises:
        CheckpointError: the file is missing, damaged, or holds other things than weights and plain values.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            is_safetensors = file.read(9)[8:] == b"{"  # after the length of its header
    except OSError as error:
        raise CheckpointError(f"{path}: cannot read the checkpoint: {error.strerror or error}") from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickle protocols that torch.save does not use
            data: Any = (
                safetensors.torch.load_file(path)
                if is_safetensors
                else torch.load(path, map_location="cpu", weights_only=True)
            )
    except Exception as error:  # a damaged file makes these readers raise anything
        raise CheckpointError(f"{path}: {_cause(error)}") from error
    if isinstance(data, dict) and isinstance(data.get("state_dict"), dict):
        data = data["state_dict"]
    if not isinstance(data, dict) or not data or not all(isinstance(value, Tensor) for value in data.values()):
        raise CheckpointError(
            f"{path}: expected weights, or a checkpoint of the xT release with a `state_dict`; got neither"
        )
    return {str(name).removeprefix("module."): tensor for name, tensor in data.items()}


def _cause(error: Exception) -> str:
    code = re.search(r"GLOBAL (\S+)", str(error))
    if code:
        return f"refused: beside weights it holds `{code[1]}`, which would be run to read it; nothing was"
    told = "" if isinstance(error, pickle.UnpicklingError) else " ".join(str(error).split()).split(". ")[0][:200]
    return f"damaged, or no checkpoint{f': {told}' if told else ''}; get the file again"


def published_names(model: GigaXT) -> dict[str, str]:
    """Published name -> our name of every weight of an imported model."""
    prefixes = POOLED_NAMES if model.config.context.kind == POOLED_KIND else CLASS_TOKEN_NAMES
    names = {}
    for own in model.state_dict():
        prefix = next(prefix for prefix in prefixes if own.startswith(prefix))
        names[prefixes[prefix] + own.removeprefix(prefix)] = own
    return names


def load_state(model: GigaXT, state: dict[str, Tensor], source: str) -> None:
    """Copy published weights into a model.

    Args:
        model: built from the published config; on the meta device the weights are only compared.
        state: published name -> weight, from `read_state`.
        source: of the weights, for messages.

    Raises:
        CheckpointError: weights are missing, unexpected or of another shape; all kinds are listed, nothing is changed.
    """
    names, own = published_names(model), model.state_dict()
    misshaped = [
        f"{name} is {tuple(state[name].shape)}, expected {tuple(own[names[name]].shape)}"
        for name in sorted(names.keys() & state.keys())
        if state[name].shape != own[names[name]].shape
    ]
    found = {
        "missing": sorted(names.keys() - state.keys()),
        "unexpected": sorted(state.keys() - names.keys()),
        "of another shape": misshaped,
    }
    if any(found.values()):
        listed = "; ".join(f"{len(what)} {kind}: {_list(what)}" for kind, what in found.items() if what)
        raise CheckpointError(f"{source} holds {describe_state(state)}, and does not fit the config: {listed}")
    with torch.no_grad():
        for name, mine in names.items():
            own[mine].copy_(state[name])


def describe_state(state: dict[str, Tensor]) -> str:
    """The settings of a published config that a checkpoint's names and shapes show."""
    if "decoder.cls_token" not in state:
        return "cls_head: naive" if "decoder.layers.3.bias" in state else "no model of the release"
    layers = {name.split(".")[2] for name in state if name.startswith("decoder.layers.")}
    attention = "mamba" if any(".mixer." in name for name in state) else "hyper or naive"
    return (
        f"cls_head: xl, attention_method: {attention}, n_layer: {len(layers)}, "
        f"hidden_size: {state['decoder.cls_token'].shape[-1]}"
    )


def _list(names: Iterable[str]) -> str:
    names = list(names)
    more = len(names) - MOST_NAMED
    return ", ".join(names[:MOST_NAMED]) + (f" and {more} more" if more > 0 else "")
