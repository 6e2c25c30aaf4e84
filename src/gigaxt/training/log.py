"""What a run leaves behind while it goes on: log.txt, metrics.csv, TensorBoard events, and lines on the terminal."""

from __future__ import annotations

import csv
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from gigaxt.amounts import GIB
from gigaxt.errors import CheckpointError, one_line
from gigaxt.machine import peak_resident_gib
from gigaxt.replaced_file import replaced_file

TIME_COLUMNS = ("s_per_step", "images_per_s", "memory_gib")
"""Columns that differ between two runs of the same numbers."""
STEP_COLUMNS = ("step", "epoch", "split", "loss", "lr", "grad_norm", *TIME_COLUMNS)
LINE_EVERY_S = 15.0
"""Time between lines where the output is no terminal."""
SLOW_STEPS, SLOW_STEPS_COMPILED = 1, 4
"""First steps, which are slower than the rest and not counted; where chunks of other sizes may be compiled anew."""
TIMED_STEPS = 2
"""Steps after these from which the time of an epoch is forecast."""


class MetricsFile:
    """`metrics.csv`: a `train` line for each step and a `val` line for each evaluation.

    Args:
        path: the file; continued where it exists.
        names: of the evaluation's metrics, which become the last columns.
        step: lines of later steps are removed: a run that continues from a checkpoint repeats them.
        evaluated: step of the last evaluation that counts.
    """

    def __init__(self, path: Path, names: Sequence[str], *, step: int, evaluated: int) -> None:
        self.path, self.columns = path, [*STEP_COLUMNS, *names]
        rows = [
            row
            for row in read_metrics(path)
            if row["step"].isdigit() and int(row["step"]) <= (step if row["split"] == "train" else evaluated)
        ]
        with replaced_file(path) as part, part.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.columns, restval="", extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
        self._file = path.open("a", newline="", encoding="utf-8")
        self._writer = csv.DictWriter(self._file, self.columns, restval="")

    def write(self, row: Mapping[str, object]) -> None:
        """Add a line; it is in the file when this returns."""
        self._writer.writerow(row)
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, str]]:
    """The lines of a `metrics.csv`, without one that was cut off; empty where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if None not in row.values()]


class RunLog:
    """The log of a run; a context manager.

    Args:
        out: the run folder.
        metric_names: of evaluations.
        step: at which the run starts or continues.
        evaluated: step of the last evaluation before that.
        total_steps: of the whole run.
        steps_per_epoch: for the forecast.
        compiled: whether parts of the model are compiled in the first steps.
        console: where lines and the progress bar go; None: standard error.
    """

    def __init__(
        self,
        out: Path,
        metric_names: Sequence[str],
        *,
        step: int,
        evaluated: int,
        total_steps: int,
        steps_per_epoch: int,
        compiled: bool = False,
        console: Console | None = None,
    ) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and not needed before

        self.total_steps, self.steps_per_epoch = total_steps, steps_per_epoch
        self.slow_steps = SLOW_STEPS_COMPILED if compiled else SLOW_STEPS
        self.console = console or Console(stderr=True, highlight=False, soft_wrap=True)
        self.file = (out / "log.txt").open("a", encoding="utf-8")
        self.metrics = MetricsFile(out / "metrics.csv", metric_names, step=step, evaluated=evaluated)
        self.board = SummaryWriter(str(out / "tensorboard"), purge_step=step + 1)
        self.times: list[float] = []
        self._last_line = self._evaluation_began = 0.0
        self._told: set[str] = set()
        self._bar: Progress | None = None
        self._task = TaskID(0)
        if self.console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.completed}/{task.total} {task.fields[figures]}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=self.console,
            )
            self._task = self._bar.add_task("training", total=total_steps, completed=step, figures="")
            self._bar.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        self.file.close()
        self.metrics.close()
        self.board.close()

    def line(self, text: str) -> None:
        """A line in log.txt and on the terminal."""
        self.file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
        self.file.flush()
        self.console.print(text, markup=False)

    def train(
        self, step: int, epoch: int, loss: float, lr: float, grad_norm: float, images: int, seconds: float
    ) -> None:
        """Record a step (counted from 1)."""
        self.times.append(seconds)
        memory = memory_gib()
        figures = {"loss": loss, "lr": lr, "grad_norm": grad_norm}
        speed = {
            "s_per_step": round(seconds, 4),
            "images_per_s": round(images / seconds, 4),
            "memory_gib": round(memory, 3),
        }
        self._write({"step": step, "epoch": epoch, "split": "train", **figures, **speed})
        for name, value in {**figures, **speed}.items():
            self.board.add_scalar(f"train/{name}", value, step)
        short = f"loss {loss:.4f}  {images / seconds:.2f} images/s  {memory:.1f} GiB"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=f"epoch {epoch}", figures=short)
        elif time.monotonic() - self._last_line > LINE_EVERY_S or step == self.total_steps:
            self._last_line = time.monotonic()
            left = duration((self.total_steps - step) * self.seconds_per_step())
            self.line(f"step {step}/{self.total_steps}  epoch {epoch}  {short}  {left} left")
        forecast_after = self.slow_steps + TIMED_STEPS
        if self.steps_per_epoch <= forecast_after and self.slow_steps == SLOW_STEPS:
            forecast_after = 1  # the epoch has no more, and the first step is not so slow
        if len(self.times) == forecast_after < self.steps_per_epoch:
            a_step = self.seconds_per_step()
            self.line(
                f"epoch {epoch} will take about {duration(self.steps_per_epoch * a_step)} ({short_seconds(a_step)} a "
                f"step, {self.steps_per_epoch} steps), without its evaluation"
            )

    def evaluating(self, done: int, total: int) -> None:
        """Say how far an evaluation is; on a terminal, or where it takes long."""
        if done == 0:
            self._evaluation_began = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._task, description=f"evaluating {done}/{total}")
        elif time.monotonic() - self._last_line > LINE_EVERY_S and done:
            self._last_line = time.monotonic()
            left = (time.monotonic() - self._evaluation_began) / done * (total - done)
            self.line(f"evaluated {done}/{total} images  {duration(left)} left")

    def evaluation(
        self, step: int, epoch: int, loss: float, metrics: Mapping[str, float], notes: Sequence[str] = ()
    ) -> None:
        """Record an evaluation after `step`; each of its notes is told once."""
        self._write({"step": step, "epoch": epoch, "split": "val", "loss": loss, **metrics})
        for name, value in {"loss": loss, **metrics}.items():
            if math.isfinite(value):
                self.board.add_scalar(f"val/{name}", value, step)
        text = "  ".join(f"{name} {decimals(value)}" for name, value in metrics.items())
        self.line(f"epoch {epoch}  val loss {decimals(loss)}  {text}")
        for note in notes:
            if note not in self._told:
                self._told.add(note)
                self.line(f"val: {note}")

    def seconds_per_step(self) -> float:
        """Median of the last steps, without the first, which are slower."""
        recent = sorted(self.times[self.slow_steps :][-50:] or self.times[-1:])
        return recent[len(recent) // 2]

    def _write(self, row: Mapping[str, object]) -> None:
        try:
            self.metrics.write(row)
        except OSError as error:
            raise CheckpointError(f"{self.metrics.path}: cannot write: {one_line(error)}; free some space") from error


def memory_gib() -> float:
    """Peak memory so far, GiB: of the CUDA device where one is in use, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / GIB
    return peak_resident_gib()


def decimals(value: float) -> str:
    """A score with four decimals, or that it has no value."""
    return f"{value:.4f}" if math.isfinite(value) else "undefined"


def duration(seconds: float) -> str:
    """E.g. "45 s", "12 min", "3.2 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def short_seconds(seconds: float) -> str:
    """E.g. "0.0042 s", "0.85 s", "12 s": two digits that count."""
    return f"{seconds:.2g} s" if 0.001 <= seconds < 99 else f"{seconds:.0f} s"


def environment() -> dict[str, str]:
    """Versions and hardware, for the report."""
    import platform
    from importlib.metadata import version

    import timm

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"
    return {
        "gigaxt": version("gigaxt"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "platform": platform.platform(),
        "cores": str(os.cpu_count()),
        "device": device,
    }
