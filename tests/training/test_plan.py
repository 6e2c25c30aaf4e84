from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
import yaml
from tiny_run import TinyModel, tiny_config

from gigaxt.errors import CheckpointError, ConfigError, ImageError
from gigaxt.machine import host_memory_gib
from gigaxt.streaming.rows import Streaming
from gigaxt.training import RunConfig, checkpoint, plan, rehearsal, run_config
from gigaxt.training.config_edit import write_streaming
from gigaxt.training.device import check_budgets, pick_device
from gigaxt.training.loop import train
from gigaxt.training.rehearsal import Found

ROOM = plan.Room(device="cpu", host_total=64.0, host_free=40.0, device_total=64.0, device_free=40.0)
CUDA = plan.Room(device="cuda", host_total=64.0, host_free=40.0, device_total=80.0, device_free=70.0)


def found(**changes: Any) -> Found:
    base = Found(
        images=["a.tif"],
        size_px=(1000, 2000),
        regions=100,
        mean_regions=50.0,
        samples=10,
        steps=10,
        step_s=20.0,
        evaluate_s=4.0,
        host_gib=2.0,
        device_gib=0.0,
        graph_gib=0.1,
        maps_gib=0.0,
        passes=2.0,
        streaming={"budget_gib": 0.0, "host_gib": 0.0, "chunk_regions": 4},
        disk_gib=0.5,
        device="cpu",
        chunk_s={"1": 0.2, "2": 0.12, "4": 0.1, "8": 0.11},
        cold_read_s=0.01,
        read_s=0.001,
    )
    return replace(base, **changes)


def test_all_is_kept_where_there_is_room() -> None:
    choice = plan.choose(found(), Streaming(), ROOM)
    assert choice.chunk_regions == 4
    assert choice.budget_gib is not None
    assert 10 <= choice.budget_gib <= 10.3
    assert plan.predicted_gib(found(), Streaming(), choice) == pytest.approx(12.0)
    kept = found(host_gib=12.0, passes=1.0)  # measured with it, the choice is the same
    assert plan.choose(kept, choice, ROOM) == choice


def test_what_fits_is_kept() -> None:
    large = found(regions=1000)
    choice = plan.choose(large, Streaming(), ROOM)
    assert choice.budget_gib == pytest.approx(0.9 * 40 - 2, abs=0.011)
    assert choice.host_gib == 0
    tight = found(regions=1000, host_gib=39.0)
    assert plan.choose(tight, Streaming(), ROOM).budget_gib == 0


def test_a_dense_model_keeps_all_feature_maps_before_some_graphs() -> None:
    dense = found(regions=1000, maps_gib=0.01)
    choice = plan.choose(dense, Streaming(), ROOM)
    assert choice.host_gib == pytest.approx(10.2, abs=0.02)
    assert choice.budget_gib is not None
    assert choice.budget_gib + choice.host_gib == pytest.approx(34, abs=0.02)
    assert plan.choose(found(regions=1000, maps_gib=0.09), Streaming(), ROOM).host_gib == 0
    apart = plan.choose(replace(dense, device_gib=5.0, device="cuda"), Streaming(), CUDA)
    assert apart.budget_gib == pytest.approx(0.9 * 70 - 5, abs=0.011)
    assert apart.host_gib == pytest.approx(10.2, abs=0.02)


def test_graphs_take_more_of_the_host_than_of_a_device() -> None:
    """Each tensor is a block of its own there, of a power of two."""
    graphs = found(regions=1000, device_gib=5.0, device="cuda", hosted_gib=0.15)
    room = replace(CUDA, host_free=64.0)
    choice = plan.choose(graphs, Streaming(), room)
    left = 0.9 * 70 - 5
    assert choice.budget_gib == pytest.approx(left, abs=0.011)
    assert choice.host_gib == pytest.approx(0.9 * 64 - 2, abs=0.011)  # 64 would be needed
    few = plan.choose(replace(graphs, regions=700), Streaming(), room)
    assert few.host_gib == pytest.approx(1.02 * 1.5 * (70 - left), abs=0.02)
    # Measured with it, the choice is the same.
    kept = replace(graphs, regions=700, device_gib=5 + (few.budget_gib or 0), host_gib=2 + 1.5 * (70 - left))
    assert plan.choose(kept, few, room).host_gib == pytest.approx(few.host_gib, abs=0.1)


def test_a_larger_chunk_needs_more() -> None:
    fast = found(regions=1000, chunk_s={"4": 0.1, "8": 0.05})
    choice = plan.choose(fast, Streaming(), ROOM)
    assert choice.chunk_regions == 8
    assert choice.budget_gib == pytest.approx(34 - 0.4, abs=0.011)


def test_reading_is_told_to_be_the_limit() -> None:
    slow = plan.Plan(streaming=Streaming(), room=ROOM, found=found(cold_read_s=1.0))
    assert slow.reads_too_slowly
    assert slow.epoch_s == pytest.approx(slow.reading_s * 50 * 10 / 100)
    assert not plan.Plan(streaming=Streaming(), room=ROOM, found=found()).reads_too_slowly


YAMLS = {
    "block": "# mine\ndata: {csv: a.csv}\ntrain:\n  lr: 1.0e-3  # high\n  streaming:\n    budget_gib: 1\n"
    "    chunk_regions: 2\n  # end\n  epochs: 2\nmodel: {a: 1}\n",
    "none": "# mine\ndata: {csv: a.csv}\n",
    "added": "# mine\ntrain:\n    epochs: 2\n\ndata: {csv: a.csv}\n",
    "inline": "# mine\ntrain:\n  streaming: {budget_gib: 1}\n",
    "empty": "# mine\ntrain:\ndata: {csv: a.csv}\n",
}


@pytest.mark.parametrize("name", YAMLS)
def test_the_choice_is_written_and_the_rest_stays(name: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(YAMLS[name])
    before = yaml.safe_load(YAMLS[name])
    write_streaming(path, Streaming(budget_gib=1.5, chunk_regions=16))
    after = yaml.safe_load(path.read_text())
    assert after["train"].pop("streaming") == {"budget_gib": 1.5, "host_gib": 0.0, "chunk_regions": 16}
    (before.get("train") or {}).pop("streaming", None)
    assert after["train"] == (before.get("train") or {})
    assert after.get("data") == before.get("data")
    comments = [line.partition("#")[2] for line in YAMLS[name].splitlines() if "#" in line]
    assert all(comment in path.read_text() for comment in comments)


def test_a_layout_on_one_line_is_rewritten(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("train: {epochs: 2}\n")
    write_streaming(path, Streaming(budget_gib=None))
    assert yaml.safe_load(path.read_text()) == {
        "train": {"epochs": 2, "streaming": {"budget_gib": None, "host_gib": 0.0, "chunk_regions": 4}}
    }


def test_a_child_that_takes_too_much_is_stopped() -> None:
    hungry = "import time\nx = bytearray(300 << 20)\ntime.sleep(60)"
    child = subprocess.Popen([sys.executable, "-c", hungry], start_new_session=True)
    assert 0.2 < plan._watch(child, 0.2) < 0.4
    assert child.returncode is not None
    assert plan._watch(subprocess.Popen([sys.executable, "-c", ""], start_new_session=True), 0.2) == 0


class Here:
    """A child process of a plan, in this process."""

    pid = returncode = 0

    def __init__(self, command: list[str], **_: Any) -> None:
        rehearsal.main(Path(command[3]))

    def wait(self, timeout: float = 0.0) -> int:
        return 0

    poll = wait


def rehearsed_here(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> Found | None:
    """What `make_plan` finds, by a rehearsal in this process."""
    monkeypatch.setattr(plan.subprocess, "Popen", Here)
    monkeypatch.setattr(rehearsal, "keep_freed_memory", lambda: None)
    return plan.make_plan(config, probe=False).found


def test_what_a_rehearsal_raises_is_raised(csv: Path, models: list[TinyModel], monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors of images, too, which are made of more than their text."""
    (csv.parent / "0.tif").write_bytes(b"II*\0garbage")
    with pytest.raises(ImageError, match=r"0\.tif: expected a TIFF file, got 11 bytes"):
        rehearsed_here(tiny_config(csv), monkeypatch)


def test_a_disk_that_has_no_room_for_the_rehearsal_is_named(
    csv: Path, models: list[TinyModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "free_disk_gib", lambda _: 1e-9)
    with pytest.raises(CheckpointError, match=r"a checkpoint takes at least .*; gigaxt plan works in .* TMPDIR"):
        rehearsed_here(tiny_config(csv), monkeypatch)


@pytest.mark.parametrize(("device", "sizes"), [("cpu", "1 2 4 8"), ("cuda", "1 2 4 8 16 32 64")])
def test_chunks_that_a_host_has_no_room_for_are_not_tried(
    device: str, sizes: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rehearsal would be ended, and a run that fits be told not to."""
    monkeypatch.setattr(rehearsal, "_time_chunk", lambda run, batch, size, amp: 1 / size)
    monkeypatch.setattr(rehearsal, "host_memory_gib", lambda: (8.0, 1.0))
    run: Any = SimpleNamespace(device=torch.device(device), settings=SimpleNamespace(amp="off"))
    batch: Any = SimpleNamespace(full_size=64)
    assert list(rehearsal._time_chunks(run, batch, 1 << 26)) == sizes.split()


@pytest.mark.parametrize("compiled", [False, True])
def test_an_evaluation_is_timed_without_compiling(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    took = [30.0, 1.0] if compiled else [1.0]
    clock = [0.0]
    settings = SimpleNamespace(compile=compiled, amp="off")
    task = SimpleNamespace(answer=lambda *_: clock.append(clock[-1] + took.pop(0)))
    run: Any = SimpleNamespace(
        settings=settings, task=task, device=torch.device("cpu"), evaluated_model=torch.nn.Identity()
    )
    monkeypatch.setattr(rehearsal.time, "monotonic", lambda: clock[-1])
    assert rehearsal._evaluate(run, []) == pytest.approx(1.0)
    assert run.evaluated_model.training


def test_a_host_out_of_memory_is_a_run_that_does_not_fit(csv: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rehearsal, "rehearse", lambda job, folder: torch.empty(1 << 50))
    assert rehearsed_here(tiny_config(csv), monkeypatch) is None


def test_a_rehearsal_ends_with_the_process_that_started_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, parents = tmp_path / "job", iter([7, 7, 1])
    (folder / "run").mkdir(parents=True)
    monkeypatch.setattr(rehearsal, "WATCH_S", 0.0)
    monkeypatch.setattr(rehearsal.os, "getppid", lambda: next(parents))
    monkeypatch.setattr(rehearsal.os, "_exit", sys.exit)
    with pytest.raises(SystemExit):
        rehearsal.end_with(7, folder)
    assert not folder.exists()
    assert not list(parents)


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_budgets_that_are_no_budgets(value: float) -> None:
    with pytest.raises(ConfigError, match="expected a number of GiB from 0"):
        Streaming(budget_gib=value)
    with pytest.raises(ConfigError, match="expected a number of GiB from 0"):
        Streaming(host_gib=value)


def test_more_than_the_machine_has_is_refused_before_anything_is_written(csv: Path) -> None:
    total = host_memory_gib()[0]
    check_budgets(Streaming(budget_gib=0.9 * total), pick_device("cpu"))
    for streaming in (Streaming(budget_gib=total + 1), Streaming(budget_gib=total / 2, host_gib=total * 0.6)):
        with pytest.raises(ConfigError, match=r"expected at most the .* GiB that this machine has"):
            train(tiny_config(csv, streaming=streaming), csv.parent / "out")
    assert not (csv.parent / "out").exists()


@pytest.mark.usefixtures("models")
def test_a_disk_without_room_is_refused(csv: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "free_disk_gib", lambda _: 1e-9)
    with pytest.raises(CheckpointError, match=r"a checkpoint takes at least"):
        train(tiny_config(csv), csv.parent / "out")


def scenes(folder: Path, side: int) -> Path:
    random = np.random.default_rng(0)
    for name, size in (("a", side), ("b", side // 2), ("v", side // 2)):
        for kind, shape in (("", (size, size, 3)), ("_mask", (size, size))):
            data = random.integers(0, 2, shape).astype(np.uint8)
            tifffile.imwrite(folder / f"{name}{kind}.tif", data, tile=(256, 256), compression="zlib")
    lines = [f"{name}.tif,x,{name}_mask.tif,{split}" for name, split in (("a", "train"), ("b", "train"), ("v", "val"))]
    (folder / "data.csv").write_text("\n".join(["image,label,mask,split", *lines]).replace("b.tif,x", "b.tif,y"))
    return folder / "data.csv"


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "budget_gib"), [("classify", 3.0), ("segment", 0.0)])
def test_memory_is_predicted_within_a_tenth(kind: str, budget_gib: float, tmp_path: Path) -> None:
    csv = scenes(tmp_path, 768 if kind == "classify" else 384)
    model = {
        "region_encoder": {"name": "convnextv2_atto", "region": 128},
        "context": {"kind": "mamba2", "dim": 32, "depth": 1},
        "head": {"kind": kind, "classes": 2, **({"dim": 8} if kind == "segment" else {})},
    }
    # With CUDA graphs, which a CPU has not, passes are counted in the first step.
    streaming = {"budget_gib": budget_gib, "cuda_graphs": kind == "classify"}
    settings = {"epochs": 1, "batch": 1, "streaming": streaming}
    data = {"data": {"csv": str(csv)}, "model": model, "train": settings}
    made = plan.make_plan(run_config(data), probe=False)
    assert made.found is not None
    assert made.found.images == [str(tmp_path / "a.tif")]
    assert made.found.passes == pytest.approx(1 if budget_gib else 3)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(data))
    verb = "import sys; from gigaxt.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", verb, "train", "--config", str(tmp_path / "run.yaml"), "--out"]
    subprocess.run([*command, str(tmp_path / "run")], check=True, capture_output=True)
    rows = [line.split(",") for line in (tmp_path / "run" / "metrics.csv").read_text().splitlines()]
    column = rows[0].index("memory_gib")
    measured = max(float(row[column]) for row in rows[1:] if row[column])
    assert made.found.host_gib == pytest.approx(measured, rel=0.1)
