from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import gigaxt
from gigaxt import CheckpointError, ModelConfig, build_model
from gigaxt.config import to_dict


def make(classes: int = 3) -> gigaxt.GigaXT:
    config = {
        "region_encoder": {
            "name": "convnextv2_atto",
            "region": 64,
            "options": {"depths": [1, 1, 1, 1], "dims": [8, 8, 8, 16]},
        },
        "context": {"dim": 16, "depth": 1, "summary": 2},
        "head": {"kind": "classify", "classes": classes, "class_names": [f"kind {i}" for i in range(classes)]},
        "input": {"mean": [1.0, 2.0, 3.0], "std": [1.0, 1.0, 2.0], "mpp": 0.5},
    }
    return build_model(ModelConfig.from_dict(config))


def test_round_trip(tmp_path: Path) -> None:
    model = make().eval()
    model.save(tmp_path / "model")
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == ["config.json", "model.safetensors"]
    loaded = gigaxt.load(tmp_path / "model")
    assert not loaded.training
    assert to_dict(loaded.config) == to_dict(model.config)
    tensor = torch.rand(1, 3, 70, 64)
    torch.testing.assert_close(loaded(tensor), model(tensor), rtol=0, atol=0)


def test_precision_is_kept(tmp_path: Path) -> None:
    make().double().save(tmp_path)
    assert next(gigaxt.load(tmp_path).parameters()).dtype == torch.float64


def test_pretrained_backbone_is_not_looked_for_again(tmp_path: Path) -> None:
    make().save(tmp_path)
    described = json.loads((tmp_path / "config.json").read_text())
    described["model"]["region_encoder"]["pretrained"] = True
    (tmp_path / "config.json").write_text(json.dumps(described))
    assert gigaxt.load(tmp_path).config.region_encoder.pretrained is True


def test_pixel_size_is_the_models(tmp_path: Path) -> None:
    pixels = np.zeros((64, 64, 3), np.uint8)
    with pytest.raises(gigaxt.DataError, match="does not say its pixel size"):
        make()([gigaxt.open_image(pixels)])


def test_damage_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="expected a model folder"):
        gigaxt.load(tmp_path / "nothing")
    make().save(tmp_path)
    weights = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(CheckpointError, match="cannot read the weights"):
        gigaxt.load(tmp_path)
    make(4).save(tmp_path / "other")
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "other" / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match=r"2 weights do not fit.*head.classifier.bias is \(4,\)"):
        gigaxt.load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="damaged"):
        gigaxt.load(tmp_path)
    (tmp_path / "config.json").write_text('{"format": 99}')
    with pytest.raises(CheckpointError, match="upgrade gigaxt"):
        gigaxt.load(tmp_path)


def test_full_disk_leaves_the_old_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make().eval()
    model.save(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        model.save(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
