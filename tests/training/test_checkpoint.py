from __future__ import annotations

import errno
import json
import os
import random
import resource
import signal
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gigaxt.errors import CheckpointError
from gigaxt.training import checkpoint
from gigaxt.training.checkpoint import (
    checkpoints,
    load_checkpoint,
    random_states,
    recover_folder,
    replaced_folder,
    restore_random_states,
    save_checkpoint,
)

STATE = {"weights": {"a.b": torch.arange(6.0).reshape(2, 3).T}, "groups": [{"betas": (0.9, 0.999)}], "by index": {0: 1}}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_state_comes_back_as_it_was(tmp_path: Path) -> None:
    state = {
        **STATE,
        "none": None,
        "text": "ä",
        "nan": float("nan"),
        "inf": -float("inf"),
        "half": torch.ones(2).bfloat16(),
    }
    path = save_checkpoint(tmp_path, 7, state)
    step, back = load_checkpoint(path)
    assert step == 7
    assert torch.equal(back["weights"]["a.b"], STATE["weights"]["a.b"])
    assert torch.equal(back["half"], state["half"])
    assert back["groups"] == [{"betas": (0.9, 0.999)}]
    assert back["by index"] == {0: 1}
    assert np.isnan(back["nan"])
    assert [back[key] for key in ("none", "text", "inf")] == [None, "ä", -float("inf")]
    json.loads((path / "state.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_optimizer_states_come_back(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    _, back = load_checkpoint(save_checkpoint(tmp_path, 1, {"optimizer": optimizer.state_dict()}))
    other = torch.optim.AdamW(model.parameters(), lr=0.5)
    other.load_state_dict(back["optimizer"])
    assert other.param_groups[0]["lr"] == 0.1
    assert str(other.state_dict()) == str(optimizer.state_dict())


def test_two_checkpoints_are_kept_and_remains_removed(tmp_path: Path) -> None:
    (tmp_path / "step-00000001.part").mkdir()
    for step in (1, 2, 10, 3000):
        save_checkpoint(tmp_path, step, STATE)
    assert names(tmp_path) == ["step-00000010", "step-00003000"]
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000010", "step-00003000"]


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[str] = []
    monkeypatch.setattr(checkpoint, "flush_to_disk", lambda path: flushed.append(path.name))
    save_checkpoint(tmp_path, 1, STATE)
    assert sorted(flushed[:3]) == ["state.json", "state.safetensors", "step-00000001.part"]
    assert flushed[3] == tmp_path.name


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_when_writing_fails_the_previous_one_is_intact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    save_checkpoint(tmp_path, 1, STATE)

    def full(tensors: Any, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(CheckpointError, match=f"step-00000002: cannot write: {os.strerror(number)}; free some space"):
        save_checkpoint(tmp_path, 2, STATE)
    assert names(tmp_path) == ["step-00000001"]
    assert load_checkpoint(checkpoints(tmp_path)[-1])[0] == 1


def test_a_limit_on_file_sizes_is_met(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, STATE)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(CheckpointError, match=r"cannot write: .*[Tt]oo large") as caught:
            save_checkpoint(tmp_path, 2, {"large": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert "\n" not in str(caught.value)
    assert names(tmp_path) == ["step-00000001"]


def test_a_full_disk_is_met(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting needs root")
    try:
        save_checkpoint(disk, 1, {"w": torch.ones(150_000)})  # 0.6 MB
        with pytest.raises(CheckpointError, match="No space left") as caught:
            save_checkpoint(disk, 2, {"w": torch.ones(150_000)})
        assert "\n" not in str(caught.value)
        assert names(disk) == ["step-00000001"]
        assert load_checkpoint(checkpoints(disk)[-1])[1]["w"].sum() == 150_000
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("name", ["state.json", "state.safetensors"])
@pytest.mark.parametrize("content", [None, b"", b"{}", b"\xff\xfe damaged"])
def test_damaged_checkpoints_are_refused(tmp_path: Path, name: str, content: bytes | None) -> None:
    path = save_checkpoint(tmp_path, 1, STATE)
    (path / name).unlink()
    if content is not None:
        (path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match="cannot read the checkpoint"):
        load_checkpoint(path)


def test_an_existing_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    target = tmp_path / "model"
    for text in ("old", "new"):
        with replaced_folder(target) as part:
            (part / f"{text}.txt").write_text(text)
            assert (names(target) if target.exists() else []) == (["old.txt"] if text == "new" else [])
    assert names(target) == ["new.txt"]
    assert names(tmp_path) == ["model"]


def test_a_folder_whose_replacement_was_cut_off_comes_back(tmp_path: Path) -> None:
    (tmp_path / "model.old").mkdir()
    recover_folder(tmp_path / "model")
    assert names(tmp_path) == ["model"]


def test_random_streams_go_on(tmp_path: Path) -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    before = random_states()
    _, back = load_checkpoint(save_checkpoint(tmp_path, 1, before))
    expected = draw()
    restore_random_states(back)
    assert draw() == expected
    restore_random_states(before)
