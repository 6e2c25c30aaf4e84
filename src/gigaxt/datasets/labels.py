"""What the rows of a manifest say that is to be learnt: classes, labels in columns of their own, numbers, times."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import quantiles
from typing import Literal

from gigaxt.config import nearest
from gigaxt.errors import DataError

Target = Literal["single", "multi", "regression", "survival"]

LABEL: tuple[str, ...] = ("label",)
SURVIVAL: tuple[str, ...] = ("time", "event")
UNKNOWN = math.nan
"""The number of a label that nobody gave."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What one row says; either is empty where the target has no use for it."""

    classes: tuple[str, ...] = ()
    """Names of the classes that it has, integers in their plain form."""
    numbers: tuple[float, ...] = ()
    """Numbers of a regression; 0, 1 or `UNKNOWN` for each label column; time and event of survival."""


def default_target(header: Sequence[str], label_columns: Sequence[str]) -> Target:
    """The target that a CSV's columns suggest: `multi` with label columns, `survival` for a bare `time,event`."""
    if label_columns:
        return "multi"
    return "survival" if set(SURVIVAL) <= set(header) and not {"label", "mask", "points"} & set(header) else "single"


def answer_columns(path: Path, header: Sequence[str], target: Target, label_columns: Sequence[str]) -> tuple[str, ...]:
    """The columns in which a row's answer stands: `label`, `time` and `event`, or the label columns.

    Raises:
        DataError: label columns where they have no meaning, or columns that the CSV does not have.
    """
    if not label_columns:
        columns = SURVIVAL if target == "survival" else LABEL
    elif target in ("multi", "regression"):
        columns = tuple(name.strip().lower() for name in label_columns)
    else:
        raise DataError(f"`label_columns` are for target multi or regression, not {target}; leave them out")
    for column in columns if columns != LABEL else ():
        if column not in header:
            hint = nearest(column, header) if label_columns else f"; target survival needs {' and '.join(SURVIVAL)}"
            raise DataError(f"{path}: column `{column}` is missing{hint}")
    return columns


def parse_answer(where: str, target: Target, columns: Sequence[str], cells: Mapping[str, str]) -> Answer:
    """What the cells of a row say.

    Args:
        where: CSV and line, for messages.
        target: how cells are read.
        columns: of `answer_columns`.
        cells: of the row, by column, stripped.

    Raises:
        DataError: names the column and what it holds.
    """
    if target == "survival":
        return Answer(numbers=_time_and_event(where, cells))
    if tuple(columns) != LABEL:
        return Answer(numbers=tuple(_column(where, target, name, cells[name]) for name in columns))
    text = cells["label"]
    parts = [text] if target == "single" else [part.strip() for part in text.split("|")] if text else []
    if target == "regression":
        for part in parts or [""]:
            if not _is_number(part):
                raise DataError(
                    f"{where}: `label` is {text!r}; expected a finite number (or several, separated by `|`)"
                )
        return Answer(numbers=tuple(map(float, parts)))
    if (target == "single" and not text) or "" in parts:
        raise DataError(f"{where}: `label` is {text!r}; expected a class name or number")
    return Answer(classes=tuple(str(int(part)) if is_integer(part) else part for part in dict.fromkeys(parts)))


def merged_answer(path: Path, case: str, columns: Sequence[str], rows: Iterable[tuple[int, Answer]]) -> Answer:
    """The one answer of a case: what one of its rows does not know, another may.

    Args:
        path: the CSV, for messages.
        case: its name.
        columns: of `answer_columns`.
        rows: line and answer of each of its rows.

    Raises:
        DataError: two rows contradict each other; names both lines.
    """
    lines: dict[int, int] = {}
    (first_line, first), *others = rows
    classes, numbers = first.classes, list(first.numbers)
    for line, answer in others:
        if set(answer.classes) != set(classes) or len(answer.numbers) != len(numbers):
            raise DataError(
                f"{path} lines {first_line} and {line}: case {case!r} has two labels, {_shown(first)} and "
                f"{_shown(answer)}; its images share one"
            )
        for i, new in enumerate(answer.numbers):
            old = numbers[i]
            if math.isnan(old):
                numbers[i], lines[i] = new, line
            elif not math.isnan(new) and new != old:
                column = columns[i] if len(columns) == len(numbers) else columns[0]
                raise DataError(
                    f"{path} lines {lines.get(i, first_line)} and {line}: case {case!r} has two values of `{column}`, "
                    f"{old:g} and {new:g}; its images share one"
                )
    return Answer(classes=classes, numbers=tuple(numbers))


def strata(target: Target, columns: Sequence[str], answers: Sequence[Answer]) -> list[str]:
    """A word for each row; a division into splits or folds shares out every word like the whole.

    The class; the rarest of several; whether the event was seen; the quarter in which a number lies.
    """
    if target == "survival":
        return [f"{answer.numbers[1]:g}" for answer in answers]
    if target == "regression":
        known = [answer.numbers[0] for answer in answers if not math.isnan(answer.numbers[0])]
        edges = quantiles(known, n=4) if len(known) > 1 else []
        return [str(sum(answer.numbers[0] >= edge for edge in edges)) for answer in answers]
    names = [
        [column for column, number in zip(columns, answer.numbers, strict=True) if number == 1]
        if answer.numbers
        else list(answer.classes)
        for answer in answers
    ]
    counts = Counter(name for row in names for name in row)
    return [min(row, key=lambda name: (counts[name], name), default="") for row in names]


def class_order(
    path: Path, labels: Sequence[tuple[int, str, str | None]], given: Sequence[str] | None = None
) -> tuple[str, ...]:
    """The given class names; else those that occur, in the order of their ids, without ids sorted (numbers as such).

    Args:
        path: the CSV, for messages.
        labels: line, class name and cell of `label_id` (None where there is no such column) of each label.
        given: the model's classes.

    Raises:
        DataError: a label that is not among the given ones, an id that is no whole number, a class with two ids, or an
            id of two classes.
    """
    names = {name for _, name, _ in labels}
    if given is not None:
        for line, name, _ in labels if names - set(given) else ():
            if name not in given:
                raise DataError(f"{path} line {line}: label {name!r} is not a class of the model{nearest(name, given)}")
        return tuple(given)
    if any(text is None for _, _, text in labels):
        return tuple(sorted(names, key=int if all(map(is_integer, names)) else None))
    ids: dict[str, tuple[int, int]] = {}  # name -> id, line
    owners: dict[int, tuple[int, str]] = {}  # id -> line, name
    for line, name, text in labels:
        if text is None or not is_integer(text):
            raise DataError(f"{path} line {line}: `label_id` is {text!r}; expected a whole number, the same a class")
        number, first = ids.setdefault(name, (int(text), line))
        if number != int(text):
            raise DataError(f"{path} lines {first} and {line}: class {name!r} has two `label_id`s, {number} and {text}")
        first, owner = owners.setdefault(number, (line, name))
        if owner != name:
            raise DataError(f"{path} lines {first} and {line}: `label_id` {number} is of {owner!r} and of {name!r}")
    return tuple(sorted(names, key=lambda name: ids[name]))


def class_name_advice(names: Iterable[str]) -> list[str]:
    """What is odd about names of classes: those that mean the same, and those that mean that nothing is known."""
    names = list(names)
    alike: dict[object, list[str]] = {}
    for name in names:
        alike.setdefault(float(name) if _is_number(name) else name.casefold(), []).append(name)
    found = [
        f"classes {', '.join(same)} differ in spelling alone and are learnt as {len(same)}: write them alike"
        for same in alike.values()
        if len(same) > 1
    ]
    unknown = [name for name in names if name.casefold() in ("nan", "na", "n/a", "#n/a", "null")]
    if unknown:
        found.append(f"{', '.join(unknown)} is learnt as a class: leave out the rows whose class is not known")
    return found


def is_integer(text: str) -> bool:
    """Whether a label is a whole number."""
    return re.fullmatch(r"[+-]?[0-9]{1,18}", text) is not None


def _time_and_event(where: str, cells: Mapping[str, str]) -> tuple[float, float]:
    time, event = (cells[name] for name in SURVIVAL)
    if not _is_number(time) or float(time) < 0:
        raise DataError(f"{where}: `time` is {time!r}; expected a finite number, 0 or more")
    if not _is_number(event) or float(event) not in (0, 1):
        raise DataError(f"{where}: `event` is {event!r}; expected 1 (it happened at `time`) or 0 (not until then)")
    return float(time), float(event)


def _column(where: str, target: Target, name: str, text: str) -> float:
    if not text:
        return UNKNOWN
    if target == "multi" and (not _is_number(text) or float(text) not in (0, 1)):
        raise DataError(f"{where}: `{name}` is {text!r}; expected 0, 1, or nothing where it is not known")
    if not _is_number(text):
        raise DataError(f"{where}: `{name}` is {text!r}; expected a finite number, or nothing where it is not known")
    return float(text)


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _shown(answer: Answer) -> str:
    return "|".join(answer.classes or [f"{number:g}" for number in answer.numbers]) or "none"
