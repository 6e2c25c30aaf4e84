"""A run that takes milliseconds a step: small TIFFs, and a model of two layers with GigaXT's signature.

Run as a script it trains in the folder of its argument: `python tiny_run.py FOLDER OUT`, slowly enough to be killed.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
import torch
from safetensors.torch import save_file
from torch import nn

from gigaxt.streaming.rows import Streaming
from gigaxt.training import RunConfig, initial, run_config, train

IMAGES, VAL = 10, 3


def make_scenes(folder: Path) -> Path:
    """Ten TIFFs of several sizes, seven of them for training; class `b` is brighter."""
    random = np.random.default_rng(0)
    lines = ["image,label,split"]
    for i in range(IMAGES):
        label = "ab"[i % 3 == 0]
        height, width = [(40, 32), (32, 32), (24, 56)][i % 3]
        pixels = random.integers(0, 120, (height, width, 3)) + (100 if label == "b" else 0)
        tifffile.imwrite(folder / f"{i}.tif", pixels.astype(np.uint8), tile=(16, 16), photometric="rgb")
        lines.append(f"{i}.tif,{label},{'val' if i >= IMAGES - VAL else 'train'}")
    csv = folder / "data.csv"
    csv.write_text("\n".join(lines))
    return csv


def tiny_config(csv: Path, **train_settings: Any) -> RunConfig:
    settings = {
        "device": "cpu",
        "epochs": 3,
        "batch": 2,
        "lr": 0.01,
        "warmup_epochs": 1.0,
        "checkpoint_minutes": 60.0,
        **train_settings,
    }
    model = {
        "region_encoder": {"name": "convnextv2_atto", "region": 64},
        "head": {"kind": "classify", "classes": 2},
    }
    return run_config({"data": {"csv": str(csv)}, "model": model, "train": settings})


def segmentation_config(csv: Path, **train_settings: Any) -> RunConfig:
    """A real model, as small as they come, that learns masks of two classes in regions of 64 px."""
    model = {
        "region_encoder": {
            "name": "convnextv2_atto",
            "region": 64,
            "options": {"depths": [1, 1, 1, 1], "dims": [4, 8, 8, 8]},
        },
        "context": {"dim": 16, "depth": 1, "summary": 2},
        "head": {"kind": "segment", "classes": 2, "dim": 8},
    }
    settings = {"epochs": 1, "batch": 1, "device": "cpu", **train_settings}
    return run_config({"data": {"csv": str(csv)}, "model": model, "train": settings})


class TinyModel(nn.Module):
    """Mean colour -> hidden layer with seeded noise -> classes. Also draws from the global generator, as timm may."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config, self.streaming, self.seeds = config, Streaming(), []
        self.encode = nn.ModuleDict({"encoder": nn.Linear(3, 8)})
        self.head = nn.Linear(8, config.head.classes)

    def forward(self, images: Any, targets: Any = None, *, seed: int | None = None) -> torch.Tensor:
        read = [image.read(0, 0, image.width, image.height).mean(axis=(0, 1)) / 255 for image in images]
        gains = [np.prod(getattr(image, "colour", (np.ones(3), 0))[0]) for image in images]
        x = torch.tensor(np.stack(read) * np.stack(gains)[:, None], dtype=torch.float32)
        x = self.encode["encoder"](x).relu()
        if self.training:
            assert seed is not None
            self.seeds.append(seed)
            x = x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)) + 0.01 * torch.rand(())
        logits = self.head(x)
        return logits if targets is None else nn.functional.cross_entropy(logits, torch.tensor(targets))

    def prepare(self, images: Any, targets: Any) -> Any:
        return images

    def evaluate(self, images: Any, targets: Any) -> dict[str, torch.Tensor]:
        logits = self(images)
        return {"logits": logits, "loss": nn.functional.cross_entropy(logits, torch.tensor(targets))}

    def save(self, folder: Path) -> None:
        save_file(self.state_dict(), folder / "model.safetensors")
        (folder / "config.json").write_text("{}")


class SlowModel(TinyModel):
    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        time.sleep(0.03)
        return super().forward(*args, **kwargs)


KILLED_SETTINGS: dict[str, Any] = {
    "epochs": 20,
    "checkpoint_minutes": 0.0,
    "ema": 0.9,
    "augment": {"dihedral": True, "colour": 0.2},
}

if __name__ == "__main__":
    initial.build_model = SlowModel
    train(tiny_config(Path(sys.argv[1]) / "data.csv", **KILLED_SETTINGS), sys.argv[2])
