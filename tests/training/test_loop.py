from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from tiny_run import TinyModel, make_scenes, tiny_config

from gigaxt.errors import ConfigError, DataError, ImageError, TrainingError
from gigaxt.nn.heads import SegmentConfig
from gigaxt.training import RunResult, loop, train
from gigaxt.training.checkpoint import checkpoints, load_checkpoint
from gigaxt.training.data import epoch_order
from gigaxt.training.log import TIME_COLUMNS, RunLog, read_metrics

STEPS_PER_EPOCH = 4  # seven images, two a step


@pytest.fixture
def at_step(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[TinyModel], Any]], None]:
    """Have something happen in the forward pass of a step (from 1, counted over the whole test)."""

    def arrange(step: int, action: Callable[[TinyModel], Any]) -> None:
        original, calls = TinyModel.forward, [0]

        def forward(self: TinyModel, images: Any, targets: Any = None, *, seed: int | None = None) -> Any:
            answer = original(self, images, targets, seed=seed)
            if self.training:
                calls[0] += 1
                if calls[0] == step:
                    changed = action(self)
                    return answer if changed is None else changed * answer
            return answer

        monkeypatch.setattr(TinyModel, "forward", forward)

    return arrange


def numbers(out: Path) -> list[dict[str, str]]:
    """metrics.csv without what depends on the clock."""
    return [
        {key: value for key, value in row.items() if key not in TIME_COLUMNS}
        for row in read_metrics(out / "metrics.csv")
    ]


def final_state(out: Path) -> dict[str, Any]:
    step, state = load_checkpoint(checkpoints(out / "checkpoints")[-1])
    state["state"].pop("seconds")
    return {"step": step, **state}


def assert_same(a: Any, b: Any, where: str = "") -> None:
    """Bitwise."""
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype, where
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}[{i}]")
    elif a == a:  # NaN is not
        assert a == b, where


def stop(model: TinyModel) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_a_run_leaves_its_folder(csv: Path, models: list[TinyModel], tmp_path: Path) -> None:
    result = train(tiny_config(csv, checkpoint_minutes=0), tmp_path / "run")

    assert result == RunResult(out=tmp_path / "run", step=12, total_steps=12, signal=None, best=result.best)
    assert result.best is not None
    assert result.best.images == 3
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {"config.yaml", "checkpoints", "model", "metrics.csv", "tensorboard", "log.txt"}
    assert [path.name for path in checkpoints(tmp_path / "run/checkpoints")] == ["step-00000011", "step-00000012"]
    rows = read_metrics(tmp_path / "run/metrics.csv")
    assert [int(row["step"]) for row in rows if row["split"] == "train"] == list(range(1, 13))
    assert [int(row["step"]) for row in rows if row["split"] == "val"] == [4, 8, 12]


def test_training_is_reproducible_and_depends_on_the_seed(csv: Path, models: list[TinyModel], tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(tiny_config(csv, epochs=1, seed=seed), tmp_path / name)
    assert numbers(tmp_path / "a") == numbers(tmp_path / "b")
    assert numbers(tmp_path / "a") != numbers(tmp_path / "c")


def test_the_callers_random_stream_goes_on(csv: Path, models: list[TinyModel], tmp_path: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    train(tiny_config(csv, epochs=1), tmp_path / "run")
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(  # in the first epoch, in the middle of one, at the end of one
    ("step", "number"), [(1, signal.SIGTERM), (6, signal.SIGUSR1), (8, signal.SIGINT)]
)
def test_a_stopped_run_continues_to_the_same_numbers(
    csv: Path, models: list[TinyModel], tmp_path: Path, at_step: Any, step: int, number: signal.Signals
) -> None:
    settings = {"ema": 0.9, "augment": {"dihedral": True, "colour": 0.3}, "sampling": "balanced", "optimizer": "adamw"}
    train(tiny_config(csv, **settings), tmp_path / "whole")
    at_step(step, lambda model: os.kill(os.getpid(), number))

    first = train(tiny_config(csv, **settings), tmp_path / "stopped")
    assert (first.signal, first.step) == (number, step)
    assert f"stopped by {number.name} after step {step} of 12" in (tmp_path / "stopped/log.txt").read_text()
    second = train(tiny_config(csv, **settings), tmp_path / "stopped")
    assert (second.signal, second.step) == (None, 12)

    assert numbers(tmp_path / "stopped") == numbers(tmp_path / "whole")
    assert_same(final_state(tmp_path / "stopped"), final_state(tmp_path / "whole"))
    seeds = [seed for model in models[1:] for seed in model.seeds]
    assert seeds == models[0].seeds


def test_steps_after_the_checkpoint_are_done_again(
    csv: Path, models: list[TinyModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that dies without saving: metrics.csv is ahead of the checkpoint, even of an evaluation."""
    train(tiny_config(csv), tmp_path / "whole")
    config = tiny_config(csv, checkpoint_minutes=60)
    original = loop.Run.step

    def dying(self: loop.Run) -> None:
        if self.state.step == 7:
            raise MemoryError
        original(self)

    monkeypatch.setattr(loop.Run, "step", dying)
    with pytest.raises(MemoryError):
        train(config, tmp_path / "died")
    assert len(numbers(tmp_path / "died")) == 8
    assert checkpoints(tmp_path / "died/checkpoints")[-1].name == "step-00000004"
    monkeypatch.setattr(loop.Run, "step", original)
    train(config, tmp_path / "died")
    assert numbers(tmp_path / "died") == numbers(tmp_path / "whole")


def test_a_log_that_cannot_be_written_loses_no_step(
    csv: Path, models: list[TinyModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = RunLog.train

    def full(self: RunLog, step: int, *args: Any) -> None:
        if step == 7:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(self, step, *args)

    monkeypatch.setattr(RunLog, "train", full)
    with pytest.raises(OSError, match="No space left"):
        train(tiny_config(csv, checkpoint_minutes=60), tmp_path / "run")
    assert checkpoints(tmp_path / "run/checkpoints")[-1].name == "step-00000007"


def test_an_evaluation_that_was_given_up_is_made_by_the_next_run(
    csv: Path, models: list[TinyModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tiny_config(csv), tmp_path / "whole")
    original = TinyModel.evaluate

    def evaluate(self: TinyModel, images: Any, targets: Any) -> Any:
        stop(self)
        return original(self, images, targets)

    monkeypatch.setattr(TinyModel, "evaluate", evaluate)
    assert train(tiny_config(csv), tmp_path / "stopped").step == 4
    assert final_state(tmp_path / "stopped")["state"]["evaluated"] == 0
    assert not [row for row in numbers(tmp_path / "stopped") if row["split"] == "val"]
    monkeypatch.setattr(TinyModel, "evaluate", original)
    train(tiny_config(csv), tmp_path / "stopped")
    assert numbers(tmp_path / "stopped") == numbers(tmp_path / "whole")


def test_a_finished_run_is_left_as_it_is(csv: Path, models: list[TinyModel], tmp_path: Path) -> None:
    train(tiny_config(csv), tmp_path / "run")
    before = numbers(tmp_path / "run")
    assert train(tiny_config(csv), tmp_path / "run").step == 12
    assert numbers(tmp_path / "run") == before
    assert not models[1].seeds


def test_accumulated_steps_equal_large_ones(
    csv: Path, models: list[TinyModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "randn", lambda *shape, **_: torch.zeros(*shape))  # noise is drawn per forward pass
    monkeypatch.setattr(torch, "rand", lambda *shape, **_: torch.zeros(*shape))
    train(tiny_config(csv, batch=4, epochs=1), tmp_path / "large")
    train(tiny_config(csv, batch=1, accumulate=4, epochs=1), tmp_path / "small")
    large, small = (np.array([float(row["loss"]) for row in numbers(tmp_path / name)]) for name in ("large", "small"))
    np.testing.assert_allclose(small, large, rtol=1e-5)


@pytest.mark.parametrize("settings", [{}, {"ema": 0.5}])
def test_a_loss_that_is_not_finite_changes_no_weight(
    csv: Path, models: list[TinyModel], tmp_path: Path, at_step: Any, settings: dict[str, Any]
) -> None:
    weights: dict[str, torch.Tensor] = {}

    def spoil(model: TinyModel) -> float:
        weights.update({name: value.clone() for name, value in model.state_dict().items()})
        return float("nan")

    at_step(6, spoil)
    with pytest.raises(TrainingError, match=r"step 6: the loss is nan, and no weight was changed; images: .*\.tif"):
        train(tiny_config(csv, checkpoint_minutes=60, **settings), tmp_path / "run")
    assert_same(dict(models[0].state_dict()), weights)
    assert final_state(tmp_path / "run")["step"] == 5  # the steps before are saved
    assert_same(final_state(tmp_path / "run")["model"], weights)
    assert not any(path.exists() for path in (tmp_path / "run").glob("**/*.part"))


def test_a_gradient_that_is_not_finite_changes_no_weight(
    csv: Path, models: list[TinyModel], tmp_path: Path, at_step: Any
) -> None:
    weights: dict[str, torch.Tensor] = {}

    def spoil(model: TinyModel) -> torch.Tensor:
        weights.update({name: value.clone() for name, value in model.state_dict().items()})
        return 1 + torch.sqrt(0 * model.head.bias.sum())  # 1, but with a gradient of 0 / 0

    at_step(3, spoil)
    with pytest.raises(TrainingError, match="step 3: the norm of the gradient is nan"):
        train(tiny_config(csv), tmp_path / "run")
    assert_same(dict(models[0].state_dict()), weights)


def test_out_of_memory_halves_the_chunk_and_repeats_the_step(
    csv: Path, models: list[TinyModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tiny_config(csv), tmp_path / "whole")
    original = TinyModel.forward

    def forward(self: TinyModel, images: Any, targets: Any = None, *, seed: int | None = None) -> Any:
        if len(self.seeds) >= 2 and self.streaming.chunk_regions > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")
        return original(self, images, targets, seed=seed)

    monkeypatch.setattr(TinyModel, "forward", forward)
    train(tiny_config(csv), tmp_path / "run")
    log = (tmp_path / "run/log.txt").read_text()
    assert "step 3: out of memory, going on with 4 regions a chunk (CUDA out of memory.)" in log
    assert "step 3: out of memory, going on with 2 regions a chunk" in log
    assert numbers(tmp_path / "run") == numbers(tmp_path / "whole")
    assert final_state(tmp_path / "run")["streaming"]["chunk_regions"] == 2
    log_size = len(log)
    train(tiny_config(csv), tmp_path / "run")
    assert models[-1].streaming.chunk_regions == 2  # the choice stays with the run
    assert "out of memory" not in (tmp_path / "run/log.txt").read_text()[log_size:]


def test_chunks_that_a_stream_has_halved_stay_halved_and_are_told_once(
    csv: Path, models: list[TinyModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = TinyModel.forward

    def forward(self: TinyModel, *args: Any, **kwargs: Any) -> Any:
        if len(self.seeds) >= 2 and self.streaming.chunk_regions > 2:
            self.streaming.most_regions = 2  # as `gigaxt.streaming.rows.Reader` notes it
        return original(self, *args, **kwargs)

    monkeypatch.setattr(TinyModel, "forward", forward)
    train(tiny_config(csv), tmp_path / "run")
    assert (tmp_path / "run/log.txt").read_text().count("out of memory, going on with 2 regions a chunk") == 1
    assert final_state(tmp_path / "run")["streaming"]["chunk_regions"] == 2


def test_out_of_memory_with_the_smallest_chunk_ends_the_run(
    csv: Path, models: list[TinyModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_out(self: TinyModel, *args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(TinyModel, "forward", run_out)
    with pytest.raises(TrainingError, match="out of memory with one region a chunk and nothing kept"):
        train(tiny_config(csv), tmp_path / "run")


def spoil_image(csv: Path, name: str) -> None:
    """Damage the pixels, not the header: it opens, and fails when it is read."""
    path = csv.parent / name
    pixels = np.zeros((64, 64), np.uint8)
    tifffile.imwrite(path, np.stack([pixels] * 3, axis=2), tile=(16, 16), photometric="rgb", compression="zlib")
    data = bytearray(path.read_bytes())
    with tifffile.TiffFile(path) as file:
        for offset, count in zip(file.pages[0].dataoffsets, file.pages[0].databytecounts, strict=True):
            data[offset : offset + count] = b"\xff" * count
    path.write_bytes(bytes(data))


def test_a_bad_image_ends_the_run_with_its_name(csv: Path, models: list[TinyModel], tmp_path: Path) -> None:
    spoil_image(csv, "2.tif")
    with pytest.raises(ImageError, match=r"2\.tif"):
        train(tiny_config(csv), tmp_path / "run")


def test_bad_images_may_be_skipped_and_are_listed(csv: Path, models: list[TinyModel], tmp_path: Path) -> None:
    spoil_image(csv, "2.tif")
    (csv.parent / "4.tif").write_bytes(b"")
    (csv.parent / "8.tif").unlink()  # of the split val
    result = train(tiny_config(csv, on_bad_image="skip"), tmp_path / "run")

    assert result.step == 12
    assert result.best is not None
    assert result.best.images == 2
    log = (tmp_path / "run/log.txt").read_text()
    assert [log.count(f"{name}.tif") for name in (2, 4, 8)] == [1, 1, 1]
    skipped = final_state(tmp_path / "run")["state"]["skipped"]
    assert [Path(path).name for path in sorted(skipped)] == ["2.tif", "4.tif", "8.tif"]


def test_when_all_images_are_bad_the_run_ends(csv: Path, models: list[TinyModel], tmp_path: Path) -> None:
    for path in csv.parent.glob("*.tif"):
        path.write_bytes(b"no image")
    with pytest.raises(TrainingError, match="no image is left"):
        train(tiny_config(csv, on_bad_image="skip"), tmp_path / "run")


def test_errors_about_data_name_the_image(
    csv: Path, models: list[TinyModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: TinyModel, images: Any, targets: Any = None, *, seed: int | None = None) -> None:
        raise DataError("expected 4 bands, got 3")

    monkeypatch.setattr(TinyModel, "forward", refuse)
    with pytest.raises(DataError, match=r"\d\.tif, .*\d\.tif: expected 4 bands, got 3"):
        train(tiny_config(csv), tmp_path / "run")


def test_missing_files_are_found_before_training(csv: Path, models: list[TinyModel], tmp_path: Path) -> None:
    (csv.parent / "9.tif").unlink()
    with pytest.raises(DataError, match=r"9\.tif"):
        train(tiny_config(csv), tmp_path / "run")
    assert not models


def test_another_runs_folder_is_refused(csv: Path, models: list[TinyModel], tmp_path: Path) -> None:
    train(tiny_config(csv, epochs=1), tmp_path / "run")
    with pytest.raises(ConfigError, match=r"holds a run with other settings: train.lr was 0.01, now 0.02"):
        train(tiny_config(csv, epochs=1, lr=0.02), tmp_path / "run")
    train(tiny_config(csv, epochs=1, checkpoint_minutes=3, device="cpu"), tmp_path / "run")  # changes no number


def test_a_folder_of_something_else_is_refused(csv: Path, models: list[TinyModel], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected a new folder or one of a run"):
        train(tiny_config(csv), csv.parent)


def test_changed_rows_are_refused_and_moved_data_is_not(csv: Path, models: list[TinyModel], tmp_path: Path) -> None:
    train(tiny_config(csv, epochs=1), tmp_path / "run")
    other = tmp_path / "moved"
    other.mkdir()
    moved = make_scenes(other)
    train(tiny_config(moved, epochs=1), tmp_path / "run")
    moved.write_text(moved.read_text().replace("1.tif,a", "1.tif,b"))
    with pytest.raises(DataError, match="the rows changed"):
        train(tiny_config(moved, epochs=1), tmp_path / "run")


def test_the_newest_checkpoint_may_be_damaged(csv: Path, models: list[TinyModel], tmp_path: Path) -> None:
    train(tiny_config(csv), tmp_path / "run")
    before = final_state(tmp_path / "run")
    assert len(checkpoints(tmp_path / "run/checkpoints")) == 2
    (checkpoints(tmp_path / "run/checkpoints")[-1] / "state.safetensors").write_bytes(b"damaged")
    assert train(tiny_config(csv), tmp_path / "run").step == 12
    assert_same(final_state(tmp_path / "run"), before)


def test_balanced_class_weights_are_resolved(csv: Path, models: list[TinyModel], tmp_path: Path) -> None:
    train(tiny_config(csv, epochs=1, class_weights="balanced"), tmp_path / "run")
    head = models[0].config.head
    assert head.class_names == ["a", "b"]
    assert head.class_weights == pytest.approx([7 / (2 * 4), 7 / (2 * 3)])
    train(tiny_config(csv, epochs=1, class_weights="balanced"), tmp_path / "run")  # the same settings, asked again


def test_without_a_val_split_the_last_model_is_kept(csv: Path, models: list[TinyModel], tmp_path: Path) -> None:
    csv.write_text(csv.read_text().replace(",val", ",train"))
    result = train(tiny_config(csv, epochs=1), tmp_path / "run")
    assert result.best is None
    assert (tmp_path / "run/model/model.safetensors").exists()


def test_epoch_orders_are_pure_and_balanced_sampling_is_balanced() -> None:
    assert (epoch_order(3, 1, 50) == epoch_order(3, 1, 50)).all()
    assert sorted(epoch_order(3, 1, 50)) == list(range(50))
    assert (epoch_order(3, 1, 50) != epoch_order(3, 2, 50)).any()
    classes = np.arange(1000) < 50  # 5%
    weights = np.where(classes, 1 / 50, 1 / 950)
    drawn = classes[epoch_order(0, 0, 1000, list(weights))].mean()
    assert 0.45 < drawn < 0.55


def test_balanced_sampling_needs_labels(csv: Path, models: list[TinyModel], tmp_path: Path) -> None:
    config = tiny_config(csv, sampling="balanced")
    (csv.parent / "masks.csv").write_text("image,mask,split\n0.tif,0.tif,train\n")
    config.data.csv = str(csv.parent / "masks.csv")
    config.model.head = SegmentConfig(classes=2)
    with pytest.raises(ConfigError, match="sampling balanced needs a label for each image"):
        train(config, tmp_path / "run")
