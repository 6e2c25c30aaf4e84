from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from gigaxt.training.log import MetricsFile, RunLog, duration, read_metrics


def test_a_continued_file_equals_an_unbroken_one(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    file = MetricsFile(path, ["accuracy"], step=0, evaluated=0)
    for step in (1, 2):
        file.write({"step": step, "split": "train", "loss": 0.1 + 0.2})
    file.write({"step": 2, "split": "val", "accuracy": 0.5})
    file.close()
    whole = path.read_text()
    with path.open("a") as more:
        more.write("3,1,train,0.5,,,,,,\n3,1,val,0.5,,,,,,0.1\n4,1,train,0.")  # a process killed while it wrote

    MetricsFile(path, ["accuracy"], step=2, evaluated=2).close()
    assert path.read_text() == whole
    MetricsFile(path, ["accuracy"], step=2, evaluated=0).close()
    assert [row["split"] for row in read_metrics(path)] == ["train", "train"]
    assert float(read_metrics(path)[0]["loss"]) == 0.1 + 0.2


def run(tmp_path: Path, *, terminal: bool) -> str:
    text = io.StringIO()
    console = Console(file=text, force_terminal=terminal, width=100, soft_wrap=True)
    with RunLog(
        tmp_path, ["accuracy"], step=0, evaluated=0, total_steps=20, steps_per_epoch=10, console=console
    ) as log:
        for step in range(1, 5):
            log.train(step, 1, 0.5, 0.1, 1.0, 2, 0.5)
        log.evaluation(4, 1, 0.25, {"accuracy": 0.75})
    return text.getvalue()


def test_plain_lines_without_a_terminal(tmp_path: Path) -> None:
    text = run(tmp_path, terminal=False)
    assert "step 1/20  epoch 1  loss 0.5000  4.00 images/s" in text
    assert "epoch 1 will take about 5 s (0.5 s a step, 10 steps)" in text
    assert "epoch 1  val loss 0.2500  accuracy 0.7500" in text
    assert "\x1b" not in text
    assert "accuracy 0.7500" in (tmp_path / "log.txt").read_text()
    assert list((tmp_path / "tensorboard").iterdir())


@pytest.mark.parametrize("compiled", [False, True])
def test_the_forecast_leaves_slow_steps_out(tmp_path: Path, compiled: bool) -> None:
    text = io.StringIO()
    options: dict[str, Any] = {"step": 0, "evaluated": 0, "total_steps": 20, "compiled": compiled}
    console = Console(file=text, soft_wrap=True)
    with RunLog(tmp_path, [], **options, steps_per_epoch=10, console=console) as log:
        for step, seconds in enumerate([60, *([40, 0.5, 30] if compiled else []), 0.5, 0.5, 0.5], start=1):
            log.train(step, 1, 0.5, 0.1, 1.0, 2, seconds)
    assert "epoch 1 will take about 5 s (0.5 s a step, 10 steps)" in text.getvalue()
    with RunLog(tmp_path, [], **options, steps_per_epoch=2, console=console) as log:
        log.train(1, 1, 0.5, 0.1, 1.0, 2, 3.0)
    assert ("epoch 1 will take about 6 s" in text.getvalue()) != compiled


def test_a_bar_on_a_terminal(tmp_path: Path) -> None:
    text = run(tmp_path, terminal=True)
    assert "4/20" in text
    assert "4.00 images/s" in text
    assert "GiB" in text


def test_durations() -> None:
    assert [duration(s) for s in (3.2, 600, 12_000)] == ["3 s", "10 min", "3.3 h"]
