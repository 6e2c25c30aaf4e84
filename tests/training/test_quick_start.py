"""`train.encoder`, `train.token_cache` and `train.grad_share` in whole runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from safetensors.torch import load_file

from gigaxt.errors import ConfigError
from gigaxt.training import RunConfig, run_config, train
from gigaxt.training.config import read_yaml


@pytest.fixture
def csv(tmp_path: Path) -> Path:
    """Ten small images of two classes."""
    rng = np.random.default_rng(0)
    lines = ["image,label,split"]
    for i in range(10):
        pixels = rng.integers(0, 120, (80, 110, 3), dtype=np.uint8) + np.uint8(100 * (i % 2))
        tifffile.imwrite(tmp_path / f"{i}.tif", pixels, photometric="rgb")
        lines.append(f"{i}.tif,{'ab'[i % 2]},{'val' if i > 7 else 'train'}")
    (tmp_path / "data.csv").write_text("\n".join(lines) + "\n")
    return tmp_path / "data.csv"


def config(csv: Path, **settings: Any) -> RunConfig:
    return run_config(
        {
            "data": {"csv": str(csv)},
            "model": {
                "region_encoder": {
                    "name": "convnextv2_atto",
                    "region": 64,
                    "options": {"depths": [1, 1, 1, 1], "dims": [8, 8, 8, 16], "drop_path_rate": 0.2},
                },
                "context": {"dim": 16, "depth": 1, "summary": 2},
                "head": {"kind": "classify", "classes": 2},
            },
            "train": {"epochs": 2, "batch": 4, "lr": 1e-3, "device": "cpu", **settings},
        }
    )


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model" / "model.safetensors")


def test_a_frozen_run_with_its_tokens_on_disk(csv: Path, tmp_path: Path) -> None:
    """The same numbers to the last bit with and without; the backbone does not move; another run reads the tokens."""
    augment = {"dihedral": True}
    plain = config(csv, encoder="frozen", augment=augment, weight_decay=0.5, ema=0.9)
    cached = config(csv, encoder="frozen", augment=augment, weight_decay=0.5, ema=0.9, token_cache=str(tmp_path / "t"))
    for name, settings in (("plain", plain), ("cached", cached), ("again", cached)):
        train(settings, tmp_path / name)
        if name == "cached":
            made = {path.name: path.stat().st_ino for path in (tmp_path / "t").iterdir()}
    assert {path.name: path.stat().st_ino for path in (tmp_path / "t").iterdir()} == made
    assert len(made) > 10  # turned images have tokens of their own
    expected = weights(tmp_path / "plain")
    for name in ("cached", "again"):
        assert all(torch.equal(value, expected[key]) for key, value in weights(tmp_path / name).items())
    train(config(csv, epochs=1, lr=1e-9, warmup_epochs=0), tmp_path / "start")
    start = weights(tmp_path / "start")
    trunk = [key for key in start if key.startswith("encode.encoder.")]
    assert all((expected[key] - start[key]).abs().max() < 1e-7 for key in trunk)
    assert any((expected[key] - start[key]).abs().max() > 1e-4 for key in start.keys() - set(trunk))
    first_line = (tmp_path / "plain" / "log.txt").read_text().splitlines()[0]
    assert "M weights of which" in first_line


def test_a_frozen_encoder_at_random_weights_is_advised_against(csv: Path, tmp_path: Path) -> None:
    train(config(csv, encoder="frozen", epochs=1), tmp_path / "run")
    assert "frozen at random weights" in (tmp_path / "run" / "log.txt").read_text()
    settings = config(csv, encoder="frozen", epochs=1, init=str(tmp_path / "run" / "model"))
    train(settings, tmp_path / "next")
    text = (tmp_path / "next" / "log.txt").read_text()
    assert "frozen at random" not in text
    assert "train.token_cache FOLDER" in text


def test_last_n_resumes_to_the_same_numbers(csv: Path, tmp_path: Path) -> None:
    settings = config(csv, encoder="last_n", last_n=2, encoder_lr=1e-4, grad_share=0.5)
    train(settings, tmp_path / "whole")
    stopped = replace(settings, train=replace(settings.train, checkpoint_minutes=0.0))

    class Enough(Exception):  # noqa: N818  # stands for a machine that goes away
        pass

    def stop(step: int, total: int) -> None:
        if step == 3:
            raise Enough

    with pytest.raises(Enough):
        train(stopped, tmp_path / "stopped", on_step=stop)
    train(stopped, tmp_path / "stopped")
    expected = weights(tmp_path / "whole")
    assert all(torch.equal(value, expected[key]) for key, value in weights(tmp_path / "stopped").items())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"encoder": "frozen", "grad_share": 0.5}, "a frozen encoder has no gradient to share"),
        ({"grad_share": 0}, r"train.grad_share: expected a share above 0 and up to 1, got 0"),
        ({"grad_share": 1.5}, "up to 1, got 1.5"),
        ({"last_n": 0}, "train.last_n: expected at least 1, got 0"),
        ({"token_cache": "x"}, "only a frozen encoder's features stay the same"),
        ({"token_cache": "x", "encoder": "frozen", "augment": {"colour": 0.1}}, "changed anew each epoch cannot be"),
        ({"token_cache": "x", "encoder": "frozen", "augment": {"crop_area": 0.5}}, "changed anew each epoch cannot be"),
        ({"token_cache": "x", "encoder": "frozen", "token_cache_gib": 0}, "token_cache_gib: expected a positive"),
        ({"encoder": "frozem"}, "train.encoder"),
        ({"encoder": "frozen", "encoder_lr": 1e-4}, None),
    ],
)
def test_refused(csv: Path, tmp_path: Path, settings: dict[str, Any], message: str | None) -> None:
    if message is None:  # known when the model is built
        with pytest.raises(ConfigError, match="the region encoder has no trainable parameter"):
            train(config(csv, **settings), tmp_path / "run")
        return
    with pytest.raises(ConfigError, match=message):
        config(csv, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"encoder": "frozen", "token_cache": "x"}, "kind segment needs the feature maps too"),
        ({"grad_share": 0.5}, "kind segment learns from every region"),
    ],
)
def test_refused_for_masks(csv: Path, settings: dict[str, Any], message: str) -> None:
    model = {"region_encoder": {"name": "convnextv2_atto"}, "head": {"kind": "segment", "classes": 2}}
    with pytest.raises(ConfigError, match=message):
        run_config({"data": {"csv": str(csv)}, "model": model, "train": settings})


def test_the_cache_lies_beside_the_yaml(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("train: {token_cache: tokens}\n")
    assert read_yaml(tmp_path / "run.yaml")["train"]["token_cache"] == str(tmp_path / "tokens")
