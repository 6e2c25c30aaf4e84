"""Tables of scores on the terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from gigaxt.tasks import Evaluation
    from gigaxt.training.folds import Spread

WIDE = 200
"""Columns where the output is no terminal: what is read by programs must not be cut off."""


def print_scores(result: Evaluation, title: str, *, brief: bool = False) -> None:
    """Scores with their intervals, then what is not defined.

    Args:
        result: of a split or of a part of it.
        title: stands above.
        brief: leave out the table of classes and what intervals and calibration are.
    """
    from gigaxt.tasks.base import COUNT_COLUMNS
    from gigaxt.tasks.bootstrap import DRAWS
    from gigaxt.tasks.metrics import CALIBRATION_BINS

    console = _console()
    console.print(title, markup=False)
    table = Table()
    for name in ("score", "value", "95%"):
        table.add_column(name, justify="left" if name == "score" else "right")
    for name, value in {"loss": result.loss, **result.metrics}.items():
        if name != "loss" or not math.isnan(value):
            table.add_row(name, _number(value), result.interval(name))
    console.print(table)
    if result.per_class and not brief:
        table = Table()
        table.add_column("class")
        for name in next(iter(result.per_class.values())):
            table.add_column(name, justify="right")
        for name, values in result.per_class.items():
            table.add_row(name, *(_number(value, whole=key in COUNT_COLUMNS) for key, value in values.items()))
        console.print(table)
    notes = list(result.notes)
    if result.intervals and not brief:
        notes.append(f"95%: of {DRAWS:,} draws of groups (without a group: cases or images)")
    if "calibration_error" in result.metrics and not brief:
        notes.append(f"calibration_error: expected calibration error over {CALIBRATION_BINS} equal bins")
    for note in notes:
        console.print(f"- {note}", markup=False, soft_wrap=True)


def print_folds(spreads: Mapping[str, Spread], title: str) -> None:
    """Each score of each fold, with mean and standard deviation over the folds."""
    console = _console()
    console.print(title, markup=False)
    table = Table()
    table.add_column("score")
    for number in range(1, 1 + len(next(iter(spreads.values())).values)):
        table.add_column(f"fold {number}", justify="right")
    table.add_column("mean", justify="right")
    table.add_column("std", justify="right")
    for name, found in spreads.items():
        table.add_row(name, *map(_number, found.values), _number(found.mean), _number(found.std))
    console.print(table)


def print_coco(scores: Mapping[str, Mapping[str, float]], title: str) -> None:
    """What `gigaxt.metrics.coco_score` returns; -1, where there is no object to find, as a dash."""
    console = _console()
    console.print(title, markup=False)
    for part, first in (("stats", "score"), ("per_category_AP", "category")):
        if not scores[part]:
            continue
        table = Table()
        table.add_column(first)
        table.add_column("value" if part == "stats" else "AP", justify="right")
        for name, value in scores[part].items():
            table.add_row(name, _number(value if value >= 0 else math.nan))
        console.print(table)


def _console() -> Console:
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=WIDE)


def _number(value: float, *, whole: bool = False) -> str:
    if math.isnan(value):
        return "-"
    return f"{value:.0f}" if whole else f"{value:.4f}"
