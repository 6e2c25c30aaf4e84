"""Models as folders: `model.safetensors` and `config.json`, nothing else, never pickle."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import nn

from gigaxt.config import convert, to_dict
from gigaxt.errors import CheckpointError, ConfigError
from gigaxt.nn.context import base
from gigaxt.nn.ready import Ready
from gigaxt.nn.xt import GigaXT, ModelConfig
from gigaxt.replaced_file import replaced_file

FORMAT = 1


def save(model: GigaXT, folder: str | Path) -> None:
    """Write a model folder. A file appears under its name only when it is complete.

    Raises:
        CheckpointError: the folder cannot be written; what stood there before is unchanged.
    """
    folder = Path(folder)
    described = {
        "format": FORMAT,
        "gigaxt": version("gigaxt"),
        "model": to_dict(model.config),
        "ready": model.ready,
    }
    # Cloned: a ready module may have one tensor under two names, which safetensors refuses.
    weights = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / "model.safetensors", to_bytes(weights))
        _write(folder / "config.json", json.dumps(described, indent=2, ensure_ascii=False).encode())
    except OSError as error:
        raise CheckpointError(
            f"{folder}: cannot write the model: {error.strerror or error}; free some space"
        ) from error


def load(
    folder: str | Path,
    *,
    region_encoder: nn.Module | None = None,
    context: nn.Module | None = None,
    head: nn.Module | None = None,
) -> GigaXT:
    """The model of a folder that `model.save` wrote, on the CPU, in evaluation mode.

    A folder is data only: nothing in it is executed, and no module is imported because of a name in it. A context of
    your own has to be made known first (`gigaxt.register_context`), and modules that `build_model` was given ready are
    given here again.

    Args:
        folder: with `config.json` and `model.safetensors`.
        region_encoder: a module like the one that `build_model` was given ready; gets its weights from the folder.
        context: likewise.
        head: likewise.

    Raises:
        CheckpointError: files missing, damaged, or from another architecture; a ready module or a registration is
            missing, or the module does not fit.
    """
    folder = Path(folder)
    config, given_ready = _read(folder)
    ready = Ready(region_encoder, context, head)
    _expect_ready(folder, given_ready, ready)
    # The weights are in the folder: the backbone's own need not be found again.
    try:
        model = GigaXT(replace(config, region_encoder=replace(config.region_encoder, pretrained=False)), ready)
    except ConfigError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    model.config = config
    _fill(model, folder)
    return model.eval()


def _fill(model: GigaXT, folder: Path) -> None:
    """Give the model the weights of a folder, and their dtypes.

    Raises:
        CheckpointError: they cannot be read, or are those of another architecture.
    """
    path = folder / "model.safetensors"
    try:
        weights = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot read the weights: {error}") from error
    own = model.state_dict()
    wrong = [
        *(f"missing {name}" for name in own.keys() - weights.keys()),
        *(f"unexpected {name}" for name in weights.keys() - own.keys()),
        *(
            f"{name} is {tuple(weights[name].shape)}, the model has {tuple(own[name].shape)}"
            for name in own.keys() & weights.keys()
            if own[name].shape != weights[name].shape
        ),
    ]
    if wrong:
        shown = "; ".join(sorted(wrong)[:4]) + ("; ..." if len(wrong) > 4 else "")
        raise CheckpointError(f"{path}: {len(wrong)} weights do not fit {folder / 'config.json'}: {shown}")
    model.to(next((w.dtype for w in weights.values() if w.is_floating_point()), torch.float32))
    for name, tensor in model.state_dict(keep_vars=True).items():  # a ready module may have a dtype of its own
        tensor.data = tensor.data.to(weights[name].dtype)
    model.load_state_dict(weights)


def read_config(folder: Path) -> ModelConfig:
    """The architecture of a model folder.

    Raises:
        CheckpointError: no or a damaged `config.json`, or a context kind that is not registered.
    """
    return _read(folder)[0]


def _read(folder: Path) -> tuple[ModelConfig, dict[str, str]]:
    """Config, and which sections were given ready: section -> class name."""
    path = folder / "config.json"
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
        if described["format"] != FORMAT:
            raise CheckpointError(f"{path}: format {described['format']}, this version reads {FORMAT}: upgrade gigaxt")
        _expect_registered(path, described["model"])
        given_ready = convert(dict[str, str], described.get("ready", {}), "ready")
        if not given_ready.keys() <= set(Ready._fields):
            raise ConfigError(
                f"ready: expected sections among {', '.join(Ready._fields)}, got {', '.join(given_ready)}"
            )
        return ModelConfig.from_dict(described["model"]), given_ready
    except FileNotFoundError as error:
        inside = f"; {folder / 'model'} is one" if (folder / "model" / "config.json").is_file() else ""
        raise CheckpointError(
            f"{folder}: expected a model folder with config.json and model.safetensors{inside}"
        ) from error
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: damaged: {error!r}") from error


def _expect_registered(path: Path, model: Mapping[str, Any]) -> None:
    kind = model.get("context", {}).get("kind")
    if isinstance(kind, str) and kind not in base.KINDS:
        raise CheckpointError(
            f"{path}: the context is of kind {kind!r}, which is not registered: call "
            f"gigaxt.register_context({kind!r}, cls) with its class first; known: {', '.join(base.KINDS)}"
        )


def _expect_ready(folder: Path, given_ready: Mapping[str, str], ready: Ready) -> None:
    missing = [section for section in given_ready if section not in ready.given()]
    if missing:
        parts = " and ".join(f"the {section.replace('_', ' ')} ({given_ready[section]})" for section in missing)
        arguments = ", ".join(f"{section}=your_module" for section in missing)
        raise CheckpointError(
            f"{folder}: {parts} was given ready to build_model and is not described in the folder: "
            f"gigaxt.load(folder, {arguments})"
        )


def _write(path: Path, data: bytes) -> None:
    with replaced_file(path) as part, part.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
