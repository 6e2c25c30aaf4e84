from __future__ import annotations

import contextlib
import json
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import gigaxt
from gigaxt import CheckpointError, ModelConfig, build_model
from gigaxt.config import to_dict
from gigaxt.nn.context import NoContext, base


def make(classes: int = 3, context: dict[str, Any] | None = None) -> gigaxt.GigaXT:
    config = {
        "region_encoder": {
            "name": "convnextv2_atto",
            "region": 64,
            "options": {"depths": [1, 1, 1, 1], "dims": [8, 8, 8, 16]},
        },
        "context": context or {"dim": 16, "depth": 1, "summary": 2},
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
    make().save(tmp_path / "run" / "model")
    with pytest.raises(CheckpointError, match=r"expected a model folder .*run/model is one"):
        gigaxt.load(tmp_path / "run")
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


def edit_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    described = json.loads((folder / "config.json").read_text())
    change(described)
    (folder / "config.json").write_text(json.dumps(described))


class Twice(NoContext):
    """A kind that its author registers."""


def test_kind_that_is_not_registered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "KINDS", dict(base.KINDS))
    gigaxt.register_context("twice", Twice)
    model = make(context={"kind": "twice", "dim": 16}).eval()
    model.save(tmp_path)
    del base.KINDS["twice"]
    with pytest.raises(CheckpointError) as caught:
        gigaxt.load(tmp_path)
    assert "the context is of kind 'twice', which is not registered" in str(caught.value)
    assert "gigaxt.register_context('twice', cls)" in str(caught.value)
    gigaxt.register_context("twice", Twice)
    tensor = torch.rand(1, 3, 70, 64)
    assert torch.equal(gigaxt.load(tmp_path)(tensor), model(tensor))


@pytest.mark.parametrize("kind", ["evil", "evil.Context", "evil:Context", "tmp/evil.py"])
def test_loading_imports_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    make().save(tmp_path)
    (tmp_path / "evil.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    edit_config(tmp_path, lambda described: described["model"]["context"].update(kind=kind))
    modules = set(sys.modules)
    with pytest.raises(CheckpointError, match="which is not registered"):
        gigaxt.load(tmp_path)
    edit_config(tmp_path, lambda described: described["model"]["context"].update(kind="mamba2"))
    edit_config(tmp_path, lambda described: described.update(ready={"context": kind}))
    with pytest.raises(CheckpointError, match="was given ready"):
        gigaxt.load(tmp_path)
    assert "evil" not in set(sys.modules) - modules


class Evil:
    """Pickled, it writes a file when it is read."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("executed"),)


@pytest.mark.parametrize(
    "encoder", [{"options": {"checkpoint_path": "evil.pth"}}, {"pretrained": "evil.pth"}, {"name": "evil"}]
)
def test_loading_executes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoder: dict[str, Any]) -> None:
    make().save(tmp_path)
    (tmp_path / "evil.pth").write_bytes(pickle.dumps(Evil()))
    monkeypatch.chdir(tmp_path)
    edit_config(tmp_path, lambda described: described["model"]["region_encoder"].update(encoder))
    with contextlib.suppress(CheckpointError):
        gigaxt.load(tmp_path)
    assert not Path("executed").exists()


@pytest.mark.parametrize(
    "change",
    [
        lambda described: described.update(model=[1]),
        lambda described: described.update(ready=["context"]),
        lambda described: described.update(ready={"names": "x"}),
        lambda described: described["model"].update(context=None),
        lambda described: described["model"]["context"].update(kind=3),
        lambda described: described["model"]["region_encoder"].update(name="no_such_network"),
    ],
)
def test_damaged_config(tmp_path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    make().save(tmp_path)
    edit_config(tmp_path, change)
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        gigaxt.load(tmp_path)


def test_folders_from_before_ready_modules(tmp_path: Path) -> None:
    make().save(tmp_path)
    edit_config(tmp_path, lambda described: described.pop("ready"))
    assert gigaxt.load(tmp_path).ready == {}
