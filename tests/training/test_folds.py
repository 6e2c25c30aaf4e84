from __future__ import annotations

import csv as csv_module
import os
import signal
import statistics
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_run import TinyModel, tiny_config

from gigaxt.errors import ConfigError, DataError
from gigaxt.training import initial, loop
from gigaxt.training.checkpoint import checkpoints
from gigaxt.training.config import DataConfig
from gigaxt.training.folds import fold_folders, spread, train_folds
from gigaxt.training.log import read_metrics


def test_a_run_a_fold_and_their_summary(csv: Path, models: list[TinyModel], tmp_path: Path) -> None:
    result = train_folds(tiny_config(csv, epochs=1), tmp_path / "cv", 3)
    assert (result.done, result.signal) == (3, None)
    assert [path.name for path in fold_folders(tmp_path / "cv")] == ["fold-1", "fold-2", "fold-3"]
    assert all((path / "model/model.safetensors").exists() for path in fold_folders(tmp_path / "cv"))
    with (tmp_path / "cv/summary.csv").open() as file:
        table = {row["score"]: row for row in csv_module.DictReader(file)}
    values = [
        float(read_metrics(path / "metrics.csv")[-1]["balanced_accuracy"]) for path in fold_folders(tmp_path / "cv")
    ]
    row = table["balanced_accuracy"]
    assert [float(row[f"fold-{i}"]) for i in (1, 2, 3)] == values == result.spreads["balanced_accuracy"].values
    assert float(row["mean"]) == pytest.approx(statistics.fmean(values))
    assert float(row["std"]) == pytest.approx(statistics.stdev(values))


def test_stopped_folds_continue(
    csv: Path, models: list[TinyModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train_folds(tiny_config(csv, epochs=2), tmp_path / "whole", 2)
    original = loop.Run.step

    def stopping(self: loop.Run) -> None:
        original(self)
        if self.folder.path.name == "fold-2" and self.state.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(loop.Run, "step", stopping)
    stopped = train_folds(tiny_config(csv, epochs=2), tmp_path / "cv", 2)
    assert (stopped.done, stopped.signal, stopped.spreads) == (1, signal.SIGTERM, {})
    assert not (tmp_path / "cv/summary.csv").exists()
    monkeypatch.setattr(loop.Run, "step", original)
    first = (tmp_path / "cv/fold-1/metrics.csv").read_text()
    built = len(models)
    assert train_folds(tiny_config(csv, epochs=2), tmp_path / "cv", 2).spreads == whole.spreads
    assert (tmp_path / "cv/fold-1/metrics.csv").read_text() == first
    assert not models[built].seeds  # the first fold was done


def test_wrong_folders_and_numbers(csv: Path, models: list[TinyModel], tmp_path: Path) -> None:
    config = tiny_config(csv, epochs=1)
    train_folds(config, tmp_path / "cv", 3)
    with pytest.raises(ConfigError, match="holds 3 folds, not 2"):
        train_folds(config, tmp_path / "cv", 2)
    with pytest.raises(ConfigError, match=r"holds a run with other settings: data\.folds was 3, now 4"):
        train_folds(config, tmp_path / "cv", 4)
    with pytest.raises(ConfigError, match="holds a run, not folds"):
        train_folds(config, tmp_path / "cv/fold-1", 3)
    with pytest.raises(ConfigError, match="at least 2 folds"):
        train_folds(config, tmp_path / "other", 1)
    with pytest.raises(DataError, match="11 folds need at least as many groups"):
        train_folds(config, tmp_path / "other", 11)
    for given in ({"folds": 3}, {"fold": 1}, {"folds": 3, "fold": 4}):
        with pytest.raises(ConfigError, match=r"folds` and `fold` together|numbered from 1"):
            DataConfig(csv="x", **given)


def test_scores_that_are_not_defined_are_left_out_of_the_mean() -> None:
    from gigaxt.tasks import Evaluation

    found = spread(
        [Evaluation(images=1, loss=x, metrics={"a": x, "b": float("nan")}) for x in (1.0, 2.0, float("nan"))]
    )
    assert (found["a"].mean, found["loss"].std) == (1.5, statistics.stdev([1, 2]))
    assert found["b"].mean != found["b"].mean


class CaseModel(TinyModel):
    """Means over the images of a case first."""

    def forward(self, images: Any, targets: Any = None, *, seed: int | None = None) -> torch.Tensor:
        first = [image[0] if isinstance(image, list) else image for image in images]
        return super().forward(first, targets, seed=seed)


@pytest.fixture
def cases(csv: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Ten images of five cases; the model sees lists."""
    monkeypatch.setattr(loop, "write_report", lambda *_: None)
    monkeypatch.setattr(initial, "build_model", CaseModel)
    lines = [f"{i}.tif,{'ab'[i // 2 % 2]},p{i // 2},{'val' if i > 5 else 'train'}" for i in range(10)]
    csv.write_text("\n".join(["image,label,case,split", *lines]))
    return csv


def test_steps_are_of_cases(cases: Path, tmp_path: Path) -> None:
    result = loop.train(
        tiny_config(cases, epochs=1, batch=2, augment={"dihedral": True, "colour": 0.5}), tmp_path / "run"
    )
    assert result.total_steps == 2  # three cases, two a step
    assert result.best is not None
    assert (result.best.images, result.best.cases) == (4, 2)
    log = (tmp_path / "run/log.txt").read_text()
    assert "3 cases of 6 images to train on, 2 cases of 4 images to evaluate on" in log


def test_images_of_a_case_are_changed_in_different_ways(cases: Path) -> None:
    from gigaxt.nn.heads import ClassifyConfig
    from gigaxt.tasks import make_task, read_manifest
    from gigaxt.training.config import AugmentConfig
    from gigaxt.training.data import Samples

    head = ClassifyConfig(classes=2)
    task = make_task(head, read_manifest(head, cases))
    samples = Samples(task.manifest.cases("train"), task)
    colour = AugmentConfig(colour=0.5)
    changed = [samples.augmented(0, seed, colour).images for seed in (1, 1, 2)]
    gains = [[float(image.colour[0][0]) for image in images] for images in changed]
    assert gains[0] == gains[1]
    assert gains[0] != gains[2]
    assert gains[0][0] != gains[0][1]


def test_a_case_with_a_bad_image_is_left_out(cases: Path, tmp_path: Path) -> None:
    (cases.parent / "3.tif").write_bytes(b"no image")
    (cases.parent / "8.tif").write_bytes(b"no image")
    result = loop.train(tiny_config(cases, epochs=1, batch=1, on_bad_image="skip"), tmp_path / "run")
    assert result.best is not None
    assert (result.best.images, result.best.cases) == (2, 1)
    log = (tmp_path / "run/log.txt").read_text()
    assert [log.count(f"skipped: {cases.parent}/{i}.tif") for i in (2, 3, 8, 9)] == [0, 1, 1, 0]


def test_changed_cases_are_refused(cases: Path, tmp_path: Path) -> None:
    loop.train(tiny_config(cases, epochs=1), tmp_path / "run")
    cases.write_text(cases.read_text().replace("1.tif,a,p0", "1.tif,a,p9"))
    with pytest.raises(DataError, match="the rows changed"):
        loop.train(tiny_config(cases, epochs=1), tmp_path / "run")


def test_where_the_score_is_never_defined_the_newest_model_is_kept(
    csv: Path, models: list[TinyModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gigaxt.tasks import Evaluation

    nothing = Evaluation(images=1, loss=1.0, metrics={"balanced_accuracy": float("nan")}, notes=["nothing is defined"])
    monkeypatch.setattr(loop, "tallied", lambda *_, **__: SimpleNamespace(compute=lambda: nothing))
    loop.train(tiny_config(csv, epochs=2), tmp_path / "run")
    log = (tmp_path / "run/log.txt").read_text()
    assert log.count("val: nothing is defined") == 1
    assert "balanced_accuracy undefined" in log
    assert "nan" not in log
    assert "best balanced_accuracy undefined (step 8)" in log
    assert len(checkpoints(tmp_path / "run/checkpoints")) == 2
