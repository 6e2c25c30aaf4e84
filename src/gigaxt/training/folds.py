"""Cross-validation: one run a fold, each evaluated on its own fold and trained on the others, and their summary.

OUT/fold-1/  ...  OUT/fold-5/    run folders
OUT/summary.csv                  each score of each fold, mean and standard deviation
"""

from __future__ import annotations

import csv
import math
import signal
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from gigaxt.datasets.split import Fold, check_fold
from gigaxt.errors import CheckpointError, ConfigError, one_line
from gigaxt.replaced_file import replaced_file
from gigaxt.tasks.base import Evaluation
from gigaxt.training.config import RunConfig
from gigaxt.training.loop import train

PREFIX = "fold-"


@dataclass(frozen=True, kw_only=True)
class Spread:
    """A score in each fold."""

    values: list[float]
    """NaN where it is not defined."""
    mean: float
    """Of those that are defined."""
    std: float
    """Of those, with n - 1; NaN for less than two."""


@dataclass(frozen=True, kw_only=True)
class FoldsResult:
    """How `train_folds` ended."""

    done: int
    """Folds whose run is complete."""
    signal: signal.Signals | None
    """What asked it to stop; None: all folds are done."""
    spreads: dict[str, Spread]
    """Score -> its values in the folds; empty until all are done."""


def train_folds(config: RunConfig, out: str | Path, folds: int, *, console: Console | None = None) -> FoldsResult:
    """Train one model a fold, or continue where this was stopped; folds that are complete are left as they are.

    Args:
        config: of each run; its `data.folds` and `data.fold` are set here.
        out: folder of the run folders.
        folds: how many.
        console: where lines and progress bars go; None: standard error.

    Raises:
        ConfigError: fewer than two folds, or `out` holds something else.
        GigaxtError: what `train` raises.
    """
    out = Path(out)
    check_fold(Fold(1, folds))
    if (out / "config.yaml").exists():
        raise ConfigError(f"{out} holds a run, not folds; use another --out")
    others = len(fold_folders(out))
    if others > folds:
        raise ConfigError(f"{out} holds {others} folds, not {folds}; use another --out")
    evaluations = []
    for number in range(1, folds + 1):
        data = replace(config.data, folds=folds, fold=number)
        result = train(replace(config, data=data), out / f"{PREFIX}{number}", console=console)
        if result.signal is not None:
            return FoldsResult(done=number - 1, signal=result.signal, spreads={})
        assert result.best is not None, "a fold is never empty"
        evaluations.append(result.best)
    spreads = spread(evaluations)
    _write(out / "summary.csv", spreads)
    return FoldsResult(done=folds, signal=None, spreads=spreads)


def fold_folders(path: Path) -> list[Path]:
    """The run folders of the folds in `path`, in order; empty where it has none."""
    numbers = (folder.name.removeprefix(PREFIX) for folder in path.glob(f"{PREFIX}*") if folder.is_dir())
    return [path / f"{PREFIX}{number}" for number in sorted(int(number) for number in numbers if number.isdigit())]


def spread(evaluations: Sequence[Evaluation]) -> dict[str, Spread]:
    """Loss and metrics of each fold, with mean and standard deviation."""
    found = {}
    for name in ("loss", *evaluations[0].metrics):
        values = [{"loss": result.loss, **result.metrics}[name] for result in evaluations]
        defined = [value for value in values if math.isfinite(value)]
        found[name] = Spread(
            values=values,
            mean=statistics.fmean(defined) if defined else math.nan,
            std=statistics.stdev(defined) if len(defined) > 1 else math.nan,
        )
    return found


def _write(path: Path, spreads: dict[str, Spread]) -> None:
    folds = len(next(iter(spreads.values())).values)
    try:
        with replaced_file(path) as part, part.open("w", newline="", encoding="utf-8") as file:
            table = csv.writer(file)
            table.writerow(["score", *(f"{PREFIX}{number}" for number in range(1, folds + 1)), "mean", "std"])
            table.writerows([name, *found.values, found.mean, found.std] for name, found in spreads.items())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot write: {one_line(error)}; free some space") from error
