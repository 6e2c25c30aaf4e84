"""Weights of a region encoder from a local file, with a report of what was not used."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import safetensors
import safetensors.torch
import timm.models
import torch
from torch import Tensor, nn

from gigaxt.errors import CheckpointError, ConfigError
from gigaxt.nn.backbone import BackboneSpec, create, useful_line


def load_local_weights(module: nn.Module, spec: BackboneSpec, region: int, path: str | Path) -> list[str]:
    """Fill a backbone from a file in timm's, or the model authors', naming.

    The file is loaded into the whole timm network first, through timm's own conversion (names of the original authors,
    patch sizes, the first convolution for another number of bands), and from there into `module`, whose names differ.

    Args:
        module: the feature network, changed in place.
        spec: what it was built from.
        region: px on a side.
        path: a .safetensors file, or one of `torch.save` with nothing but tensors in it.

    Returns:
        Names of weights in the file that no layer of `module` took (classifiers, final norms).

    Raises:
        ConfigError: there is no such file.
        CheckpointError: the file cannot be read, lacks weights of the module, or has others of another shape.
    """
    weights = read_weights(path)
    whole = create(spec, region, features=False)
    report: list[Any] = []
    whole.register_load_state_dict_post_hook(
        lambda _, keys: report.append((list(keys.missing_keys), list(keys.unexpected_keys)))
    )
    try:
        _load_through_timm(whole, spec, weights)
    except Exception as error:  # timm's filters raise anything on names that they do not expect
        raise CheckpointError(f"{path}: does not fit {spec.name} at region {region}: {useful_line(error)}") from error
    missing, unexpected = report[0]
    ours = {_plain(key): tensor for key, tensor in module.state_dict().items()}
    lacking = [key for key in missing if _plain(key) in ours]
    if lacking:
        raise CheckpointError(
            f"{path}: lacks {len(lacking)} of the {len(ours)} weights of {spec.name}: {', '.join(lacking[:3])}"
            f"{', ...' if len(lacking) > 3 else ''}; is it a file of this model?"
        )
    theirs = whole.state_dict()
    with torch.no_grad():
        for key, tensor in theirs.items():
            if _plain(key) in ours:
                ours[_plain(key)].copy_(tensor)
    return sorted([*unexpected, *(key for key in theirs if _plain(key) not in ours and key not in missing)])


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors or torch file; wrappers such as {"model": ...} and "module." prefixes taken off.

    Raises:
        ConfigError: there is no such file.
        CheckpointError: it cannot be read, or holds more than tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(
            f"region_encoder.pretrained: there is no file `{path}`; give a .safetensors or .pth file, "
            "or true for timm's own weights"
        )
    try:
        if path.suffix == ".safetensors":
            data: Any = safetensors.torch.load_file(path)
        else:
            data = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read as weights: {useful_line(error)}") from error
    for wrapper in ("state_dict_ema", "model_ema", "state_dict", "model", "model_state"):
        if isinstance(data, Mapping) and isinstance(data.get(wrapper), Mapping):
            data = data[wrapper]
    if not isinstance(data, Mapping) or not all(isinstance(value, Tensor) for value in data.values()):
        raise CheckpointError(f"{path}: expected names and tensors, got {type(data).__name__} with other things in it")
    return {key.removeprefix("module."): value for key, value in data.items()}


def _load_through_timm(whole: nn.Module, spec: BackboneSpec, weights: dict[str, Tensor]) -> None:
    config = dict(cast(Mapping[str, Any], whole.pretrained_cfg))  # timm sets it on every model
    # The classifier keys would be dropped in silence; as unexpected ones they are reported.
    config |= {"source": None, "state_dict": weights, "custom_load": False, "classifier": None, "label_offset": 0}
    first = config.get("first_conv")
    first = f"{first if isinstance(first, str) else first[0]}.weight" if first else ""
    in_channels = spec.in_channels
    if first in weights:
        file_channels = weights[first].shape[1]
        config["input_size"] = (file_channels, *(config.get("input_size") or (0, 224, 224))[1:])
        if file_channels == in_channels:
            in_channels = 3  # timm < 1.0.20 would try to convert what already fits, and drop it
    filter_function = getattr(sys.modules[type(whole).__module__], "checkpoint_filter_fn", None)
    timm.models.load_pretrained(
        whole, pretrained_cfg=config, num_classes=0, in_chans=in_channels, filter_fn=filter_function, strict=False
    )


def _plain(key: str) -> str:
    """A weight's name without what timm's feature wrappers add: "model.", and "_" for the "." of sequences."""
    return key.removeprefix("model.").removeprefix("body.").replace(".", "_")
