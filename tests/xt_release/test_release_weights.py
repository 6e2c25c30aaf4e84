from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from small_release import SWIN, random_state, section
from torch import Tensor

import gigaxt
from gigaxt import CheckpointError, ConfigError
from gigaxt.xt_release.weights import read_state

MODEL = section(n_layer=1)


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return random_state(MODEL)


def load(path: Path, model: dict[str, Any] = MODEL) -> gigaxt.GigaXT:
    return gigaxt.from_xt_release(path, {"model": model}, backbone_overrides=SWIN)


@pytest.mark.parametrize("kind", ["safetensors", "state", "checkpoint", "old format", "half", "odd name"])
def test_files_that_can_be_read(kind: str, state: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / ("weights" if kind == "odd name" else "weights.ckpt")
    if kind in ("safetensors", "odd name"):  # the content decides, not the name
        save_file({f"module.{name}": tensor for name, tensor in state.items()}, path)
    elif kind == "checkpoint":
        torch.save({"epoch": 1, "state_dict": state, "metrics": {"accuracy_top1": 0.5}}, path)
    elif kind == "half":
        torch.save({name: tensor.half() for name, tensor in state.items()}, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=kind == "state")
    loaded = dict(load(path).named_parameters())
    tolerance = 1e-2 if kind == "half" else 0
    torch.testing.assert_close(
        loaded["head.classifier.bias"], state["decoder.cls.1.bias"], rtol=0, atol=tolerance, check_dtype=False
    )
    assert all(parameter.dtype == torch.float32 for parameter in loaded.values())


class Evil:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("protocol", [0, 2, 4, None])
def test_code_is_refused_and_not_run(protocol: int | None, tmp_path: Path) -> None:
    path, trace = tmp_path / "weights.ckpt", tmp_path / "trace"
    data = {"state_dict": {"decoder.cls_token": Evil(trace)}}
    if protocol is None:
        torch.save(data, path)
    else:
        path.write_bytes(pickle.dumps(data, protocol=protocol))
    with pytest.raises(CheckpointError, match=r"weights\.ckpt: (refused|damaged)") as caught:
        load(path)
    assert not trace.exists()
    assert "\n" not in str(caught.value)
    if protocol in (None, 2):  # others torch does not even parse
        assert "refused: beside weights it holds `posix.mkdir`" in str(caught.value)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_truncated_files(zipped: bool, share: float, state: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "weights"
    torch.save(state, path) if zipped else save_file(state, path)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(CheckpointError, match="damaged, or no checkpoint") as caught:
        load(path)
    assert len(str(caught.value)) < 500


def test_other_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="No such file"):
        read_state(tmp_path / "none.ckpt")
    with pytest.raises(CheckpointError, match="cannot read"):
        read_state(tmp_path)
    for data in ([torch.zeros(1)], {"state_dict": {"x": 1}}, {}, {"epoch": 1}):
        torch.save(data, tmp_path / "other.ckpt")
        with pytest.raises(CheckpointError, match="expected weights, or a checkpoint of the xT release"):
            read_state(tmp_path / "other.ckpt")
    (tmp_path / "random.ckpt").write_bytes(np.random.default_rng(0).bytes(5000))
    with pytest.raises(CheckpointError, match="damaged"):
        read_state(tmp_path / "random.ckpt")


def test_all_misfits_are_listed_at_once(state: dict[str, Tensor], tmp_path: Path) -> None:
    wrong = {**state, "decoder.extra": torch.zeros(1), "decoder.cls.1.weight": torch.zeros(4, 128)}
    del wrong["decoder.cls_token"], wrong["encoder.model.patch_embed.proj.bias"]
    save_file(wrong, tmp_path / "weights")
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path / "weights")
    text = str(caught.value)
    assert "2 missing: decoder.cls_token, encoder.model.patch_embed.proj.bias;" in text
    assert "1 unexpected: decoder.extra;" in text
    assert "1 of another shape: decoder.cls.1.weight is (4, 128), expected (5, 128)" in text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"n_layer": 2}, ["n_layer: 1", "missing: decoder.layers.1."]),
        ({"attention_method": "mamba", "n_layer": 1}, ["hyper or naive", "decoder.layers.0.mixer.A_log", "unexpected"]),
        ({"hidden_size": 256, "n_layer": 1}, ["hidden_size: 128", "(1, 1, 128), expected (1, 1, 256)"]),
        ({}, ["cls_head: xl", "missing: decoder.layers.0.bias"]),
    ],
)
def test_config_of_another_checkpoint(
    change: dict[str, Any], words: list[str], state: dict[str, Tensor], tmp_path: Path
) -> None:
    save_file(state, tmp_path / "weights")
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path / "weights", section(**change))
    assert all(word in str(caught.value) for word in words)


def test_naive_checkpoint_with_another_config(tmp_path: Path) -> None:
    save_file(random_state(section()), tmp_path / "weights")
    with pytest.raises(CheckpointError, match="holds cls_head: naive, and does not fit"):
        load(tmp_path / "weights")
    save_file({"backbone.x": torch.zeros(1)}, tmp_path / "other")
    with pytest.raises(CheckpointError, match="holds no model of the release"):
        load(tmp_path / "other")


@pytest.mark.parametrize(
    ("section_name", "change", "message"),
    [
        ("head", {"pooling": "attention"}, "needs a head of kind classify with pooling: mean"),
        ("context", {"order": "hilbert"}, "context.order: xt_release has 'raster', got 'hilbert'"),
        ("context", {"summary": 4}, "context.summary: xt_release has 0"),
        ("context", {"bidirectional": True}, "context.bidirectional: xt_release has False"),
        ("context", {"options": {"attention": "hyper", "windw": 3}}, "did you mean `window`"),
        ("context", {"kind": "xt_release_pooled"}, "takes tokens as they are, 64 wide; got 128"),
    ],
)
def test_hand_made_configs(
    section_name: str, change: dict[str, Any], message: str, state: dict[str, Tensor], tmp_path: Path
) -> None:
    """The context can stand in the YAML of a run, too."""
    from gigaxt.config import to_dict

    save_file(state, tmp_path / "weights")
    plain = to_dict(load(tmp_path / "weights").config)
    if change.get("kind"):
        plain["context"]["options"] = {}
    plain[section_name] |= change
    with pytest.raises(ConfigError, match=message):
        gigaxt.build_model(gigaxt.ModelConfig.from_dict(plain))
