"""Models as folders: `model.safetensors` and `config.json`, nothing else, never pickle."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes

from gigaxt.config import to_dict
from gigaxt.errors import CheckpointError, ConfigError
from gigaxt.nn.xt import GigaXT, ModelConfig, build_model

FORMAT = 1


def save(model: GigaXT, folder: str | Path) -> None:
    """Write a model folder. A file appears under its name only when it is complete.

    Raises:
        CheckpointError: the folder cannot be written; what stood there before is unchanged.
    """
    folder = Path(folder)
    described = {"format": FORMAT, "gigaxt": version("gigaxt"), "model": to_dict(model.config)}
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / "model.safetensors", to_bytes(weights))
        _write(folder / "config.json", json.dumps(described, indent=2, ensure_ascii=False).encode())
    except OSError as error:
        raise CheckpointError(
            f"{folder}: cannot write the model: {error.strerror or error}; free some space"
        ) from error


def load(folder: str | Path) -> GigaXT:
    """The model of a folder that `model.save` wrote, on the CPU, in evaluation mode.

    Raises:
        CheckpointError: files missing, damaged, or from another architecture.
    """
    folder = Path(folder)
    config = read_config(folder)
    # The weights are in the folder: the backbone's own need not be found again.
    model = build_model(replace(config, region_encoder=replace(config.region_encoder, pretrained=False)))
    model.config = config
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
    dtype = next(iter(weights.values())).dtype
    model.to(dtype) if dtype.is_floating_point else None
    model.load_state_dict(weights)
    return model.eval()


def read_config(folder: Path) -> ModelConfig:
    """The architecture of a model folder.

    Raises:
        CheckpointError: no or a damaged `config.json`.
    """
    path = folder / "config.json"
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
        if described["format"] != FORMAT:
            raise CheckpointError(f"{path}: format {described['format']}, this version reads {FORMAT}: upgrade gigaxt")
        return ModelConfig.from_dict(described["model"])
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder}: expected a model folder with config.json and model.safetensors") from error
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: damaged: {error!r}") from error


def _write(path: Path, data: bytes) -> None:
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
